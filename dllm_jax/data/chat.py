"""Chat templates: a list of messages to one text, as a model was trained on it.

Templates are the Jinja programs that published folders carry. They run in
Jinja's sandbox, without access to Python, files or attributes.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

Message = Mapping[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""


def read_template(folder: str | pathlib.Path) -> str | None:
  """Returns the chat template of a published folder, or None.

  It stands in `chat_template.jinja`, or in `tokenizer_config.json` as one
  template or a list of named ones, of which "default" is taken.

  Raises:
    ValueError: the file holds something else.
  """
  folder = pathlib.Path(folder)
  alone = folder / "chat_template.jinja"
  if alone.is_file():
    return alone.read_text(encoding="utf-8")
  path = folder / "tokenizer_config.json"
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
  except (ValueError, AttributeError) as error:
    raise ValueError(
      f"{path} is not JSON ({error}); mend or remove it"
    ) from error
  if isinstance(found, list):
    named = {one.get("name"): one.get("template") for one in found}
    found = named.get("default", next(iter(named.values()), None))
  if found is not None and not isinstance(found, str):
    raise ValueError(f"{path}: chat_template must be text")
  return found


def render(
  template: str,
  messages: Sequence[Message],
  *,
  answer: bool = True,
  **tokens: Any,
) -> str:
  """Returns messages as one text.

  Args:
    template: a Jinja template.
    messages: the conversation so far.
    answer: whether the text ends where the model's answer begins.
    **tokens: names that the template may use, such as `bos_token`.

  Raises:
    ValueError: a message lacks its role or content, or the template fails.
  """
  import jinja2  # noqa: PLC0415  Only chats need it.
  from jinja2 import sandbox  # noqa: PLC0415

  for message in messages:
    if not {"role", "content"} <= set(message):
      raise ValueError(
        f"a message needs a role and a content, not {sorted(message)}"
      )

  def refuse(text):
    raise jinja2.TemplateError(text)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )
  environment.globals["raise_exception"] = refuse
  environment.filters["tojson"] = lambda x, **kw: json.dumps(
    x, ensure_ascii=False, indent=kw.get("indent")
  )
  try:
    return environment.from_string(template).render(
      messages=[dict(message) for message in messages],
      add_generation_prompt=answer,
      **tokens,
    )
  except (jinja2.TemplateError, TypeError, ArithmeticError) as error:
    raise ValueError(
      f"the chat template refuses these messages: {' '.join(str(error).split())}"
    ) from error
