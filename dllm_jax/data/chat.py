"""Chat templates: a list of messages to one text, as a model was trained on it.

Templates are the Jinja programs that published folders carry. They run in
Jinja's sandbox, without access to Python, files or attributes, and see what
transformers (5.24.0, `render_jinja_template`) lets them see: the messages,
`tools`, `documents`, `add_generation_prompt`, the tokenizer's special tokens by
name, `raise_exception`, `strftime_now`, a `tojson` that escapes nothing, and the
tag `{% generation %}` around what a model is to learn.
"""

from collections.abc import Mapping, Sequence
import contextvars
import datetime
import functools
import json
import os
from typing import Any, NamedTuple

from dllm_jax.core.paths import Path

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text or parts, ...}`."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUED = "THE-MESSAGE-GOES-ON-FROM-HERE "
# What is rendered so far, and the spans in it, of the rendering under way.
_kept: contextvars.ContextVar = contextvars.ContextVar("rendering")


class Rendered(NamedTuple):
  """A conversation as text.

  Attributes:
    text: the whole.
    spans: where `{% generation %}` began and ended, characters.
  """

  text: str
  spans: tuple[tuple[int, int], ...]


def read_templates(folder: str | os.PathLike) -> dict[str, str]:
  """Returns the chat templates of a published folder by name.

  They stand in `chat_template.jinja`, which is "default", and
  `additional_chat_templates/NAME.jinja`, or else in `tokenizer_config.json` as
  one template or a list of named ones, or in `chat_template.json`.

  Raises:
    ValueError: a file holds something else.
  """
  folder = Path(folder)
  found = {}
  alone = folder / "chat_template.jinja"
  if alone.is_file():
    found["default"] = alone.read_text(encoding="utf-8")
  for file in sorted(folder.glob("additional_chat_templates/*.jinja")):
    found[file.stem] = file.read_text(encoding="utf-8")
  for name in ("tokenizer_config.json", "chat_template.json"):
    found = found or _listed(folder / name)
  return found


def _listed(path: Path) -> dict[str, str]:
  """Returns the templates that a JSON file holds."""
  if not path.is_file():
    return {}
  try:
    given = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
  except (ValueError, AttributeError) as error:
    raise ValueError(
      f"{path} is not JSON ({error}); mend or remove it"
    ) from error
  if isinstance(given, list):
    given = {one.get("name"): one.get("template") for one in given}
  elif not isinstance(given, Mapping):
    given = {} if given is None else {"default": given}
  for template in given.values():
    if not isinstance(template, str):
      raise ValueError(f"{path}: chat_template must be text")
  return dict(given)


def check(template: str) -> None:
  """Raises ValueError if a text is no Jinja template."""
  import jinja2  # noqa: PLC0415

  try:
    _program(template)
  except jinja2.TemplateError as error:
    raise ValueError(f"it is no Jinja template ({error})") from error


def choose(
  templates: Mapping[str, str],
  *,
  name: str | None = None,
  tools: Sequence[Any] | None = None,
) -> str:
  """Returns the template of a conversation.

  Args:
    templates: by name.
    name: which; None for "tool_use", if there are tools and such a template, or
      else "default".
    tools: what the model may call.

  Raises:
    ValueError: there is none, or none of the name.
  """
  if not templates:
    raise ValueError(
      "this tokenizer has no chat template; use a model with a"
      " chat_template in its tokenizer_config.json"
    )
  if name is None:
    usable = tools is not None and "tool_use" in templates
    name = "tool_use" if usable else "default"
  if name not in templates:
    raise ValueError(
      f"there is no chat template {name!r}; legal: {', '.join(templates)}"
    )
  return templates[name]


def render(
  template: str,
  messages: Sequence[Message],
  *,
  answer: bool = True,
  continued: bool = False,
  tools: Sequence[Mapping[str, Any]] | None = None,
  documents: Sequence[Mapping[str, Any]] | None = None,
  **variables: Any,
) -> Rendered:
  """Returns messages as one text.

  Args:
    template: a Jinja template.
    messages: the conversation so far.
    answer: whether the text ends where the model's answer begins
      (`add_generation_prompt`).
    continued: whether the last message goes on: its turn is left open
      (`continue_final_message`), and no answer begins.
    tools: JSON schemas of what the model may call.
    documents: what it may read, `{"title": ..., "text": ...}` each.
    **variables: names that the template may use, such as `bos_token`.

  Raises:
    ValueError: a message lacks its role or content, or the template fails.
  """
  import jinja2  # noqa: PLC0415  Only chats need it.

  given = [_message(message) for message in messages]
  if not given:
    raise ValueError("a conversation needs at least one message")
  last = _mark(given[-1]) if continued else ""
  found, spans = [], []
  try:
    program = _program(template)
    token = _kept.set((found, spans))
    try:
      for piece in program.generate(
        messages=given,
        tools=_plain(tools),
        documents=_plain(documents),
        add_generation_prompt=answer and not continued,
        **_plain(variables),
      ):
        found.append(piece)
    finally:
      _kept.reset(token)
  except (
    jinja2.TemplateError,
    TypeError,
    ArithmeticError,
    LookupError,
  ) as error:
    raise ValueError(
      f"the chat template refuses these messages: {' '.join(str(error).split())}"
    ) from error
  text = "".join(found)
  return Rendered(_open(text, last) if continued else text, tuple(spans))


def _message(message: Message) -> dict[str, Any]:
  """Returns a message as templates see it: of JSON's types, nothing null."""
  plain = {k: v for k, v in _plain(message).items() if v is not None}
  if "role" not in plain or len(plain) < 2:
    raise ValueError(
      f"a message needs a role and a content, not {sorted(plain) or 'neither'}"
    )
  thought = next((plain[k] for k in _REASONING if k in plain), None)
  if thought is not None:
    plain = {"thinking": thought} | plain | {"reasoning_content": thought}
  return plain


def _plain(value: Any) -> Any:
  """Returns a value of JSON's types alone: nothing that has methods to call."""
  if isinstance(value, Mapping):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  for kind in (bool, int, float, str):
    if isinstance(value, kind):
      return kind(value)
  if value is None:
    return None
  return (
    f"<{type(value).__name__}>"  # Templates look whether there is a picture.
  )


def _mark(message: dict[str, Any]) -> str:
  """Marks the end of a message's text, which is to go on; returns the text.

  Raises:
    ValueError: it has none.
  """
  content = message.get("content")
  if isinstance(content, str):
    message["content"] = content + _CONTINUED
    return content
  for part in reversed(content if isinstance(content, list) else []):
    if isinstance(part, dict) and "text" in part:
      text = part["text"]
      part["text"] = text + _CONTINUED
      return text
  raise ValueError("the last message has no text that could go on")


def _open(text: str, last: str) -> str:
  """Returns a rendered text up to the end of the message that goes on."""
  at = text.rfind(_CONTINUED.strip())
  if at < 0 or last.strip() not in text:
    raise ValueError(
      "the chat template leaves out the end of the last message, so that it"
      " cannot go on"
    )
  if text[at : at + len(_CONTINUED)] == _CONTINUED:
    return text[:at]
  return text[:at].rstrip()  # The template has trimmed the message.


@functools.cache
def _tag() -> type:
  """Returns Jinja's extension for `{% generation %}`."""
  import jinja2  # noqa: PLC0415
  from jinja2 import ext  # noqa: PLC0415

  class Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: its body, whose place is kept."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
      call = self.call_method("_keep")
      return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _keep(self, caller):
      text = caller()
      found, spans = _kept.get()
      start = sum(map(len, found))
      spans.append((start, start + len(text)))
      return text

  return Generation


@functools.lru_cache(maxsize=8)
def _program(template: str):
  """Returns a template, compiled in transformers' own environment."""
  import jinja2  # noqa: PLC0415
  from jinja2 import sandbox  # noqa: PLC0415

  def refuse(text):
    raise jinja2.TemplateError(text)

  made = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_tag(), "jinja2.ext.loopcontrols"],
  )
  made.globals["raise_exception"] = refuse
  made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(
    form
  )
  made.filters["tojson"] = _to_json
  return made.from_string(template)


def _to_json(
  value, ensure_ascii=False, indent=None, separators=None, sort_keys=False
):
  """Returns a value as JSON: Jinja's own filter escapes what HTML reads."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )
