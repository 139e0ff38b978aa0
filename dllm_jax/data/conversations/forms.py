"""The forms in which conversations are published, by the fields of a record."""

from collections.abc import Callable, Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

from dllm_jax.data import source
from dllm_jax.data.conversations import messages
from dllm_jax.data.dataset import Dataset

_TURNS = re.compile(r"\n\n(Human|Assistant):")
_TEXT = Dataset().text_field
# What a template reads of the conversation itself.
_RENDERED = ("messages", "tools", "add_generation_prompt")
# What stands before answers that are compared.
_BEFORE = ("prompt", "conversations", "question")


class Conversation(NamedTuple):
  """What was said.

  Attributes:
    messages: role and content of each.
    given: messages that are the prompt whoever they are from: nothing of them
      counts.
    tools: what the assistant may call, or None.
    variables: what else the row has a template read.
  """

  messages: list[dict[str, Any]]
  given: int = 0
  tools: list[Any] | None = None
  variables: Mapping[str, Any] = {}

  def key(self) -> str:
    """Returns a text that tells it from others."""
    said = [self.messages, self.tools]
    return json.dumps(said, sort_keys=True, ensure_ascii=False, default=str)


class Comparison(NamedTuple):
  """Two answers to one prompt, the preferred one first."""

  chosen: Conversation
  rejected: Conversation

  def key(self) -> str:
    """Returns a text that tells it from others."""
    return self.chosen.key() + self.rejected.key()


class Form(NamedTuple):
  """A way to write conversations.

  Attributes:
    name: what it is called.
    fields: those by which it is known.
    read: makes of a record a `Conversation` or a `Comparison`.
  """

  name: str
  fields: tuple[str, ...]
  read: Callable[[Mapping[str, Any]], Conversation | Comparison]


def _said(field: str):
  """Returns the reader of a field of messages."""

  def read(record):
    said = messages.normal(record[field])
    return _conversation(record, [], said, given=0)

  return read


def _asked(question: str, answer: str):
  """Returns the reader of a prompt and what follows it."""

  def read(record):
    prompt = _turns(record[question], "user")
    return _conversation(record, prompt, _turns(record[answer], "assistant"))

  return read


def _instructed(record):
  """Returns Alpaca's: an instruction, what it is about, turns before it."""
  before = []
  for turn in record.get("history") or []:
    if (
      not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2
    ):
      raise ValueError(
        f"history must be pairs of what was asked and answered, not {turn!r}"
      )
    before += [_one("user", turn[0]), _one("assistant", turn[1])]
  task = [record["instruction"], record.get("input")]
  words = "\n\n".join(text for text in task if text)
  answer = [_one("assistant", record["output"])]
  return _conversation(record, [*before, _one("user", words)], answer)


def _compared(record):
  """Returns two answers, each alone or with the whole conversation before it."""
  answers = [record["chosen"], record["rejected"]]
  before = next((record[name] for name in _BEFORE if name in record), None)
  if before is None and all(isinstance(a, str) for a in answers):
    said = [_spoken(answer) for answer in answers]
  else:
    said = [_turns(answer, "assistant") for answer in answers]
  prompt = [] if before is None else _turns(before, "user")
  if prompt and all(one[: len(prompt)] == prompt for one in said):
    said = [one[len(prompt) :] for one in said]  # Which repeat it.
  if not prompt:
    shared = 0
    for a, b in zip(*said, strict=False):
      if a != b:
        break
      shared += 1
    shared = min(shared, *(len(one) - 1 for one in said))
    prompt = said[0][:shared]
    said = [one[shared:] for one in said]
  return Comparison(*(_conversation(record, prompt, one) for one in said))


def _spoken(text: str) -> list[dict[str, Any]]:
  """Returns the messages of a text that names who speaks, as in HH-RLHF."""
  before, *turns = _TURNS.split(text)
  if before.strip() or not turns:
    raise ValueError(
      "chosen and rejected are texts without a prompt: give it in a field "
      "'prompt', or write them as messages"
    )
  roles = {"Human": "user", "Assistant": "assistant"}
  pairs = zip(turns[::2], turns[1::2], strict=True)
  return [_one(roles[who], said.strip()) for who, said in pairs]


def _one(role: str, text: Any) -> dict[str, Any]:
  if not isinstance(text, str):
    raise ValueError(f"text was expected, not {type(text).__name__}: {text!r}")
  return {"role": role, "content": text}


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
  """Returns messages: as they are, or a text as one of a role."""
  if value is None or isinstance(value, bool | int | float | str):
    return [_one(role, value)]
  return messages.normal(value)


def _conversation(
  record: Mapping[str, Any],
  prompt: list[dict[str, Any]],
  answer: list[dict[str, Any]],
  given: int | None = None,
) -> Conversation:
  said = [*prompt, *answer]
  given = len(prompt) if given is None else given
  system = record.get("system")
  told = isinstance(system, str) and system
  if told and said and said[0]["role"] != "system":
    said, given = [_one("system", system), *said], given and given + 1
  tools = messages.parsed(record.get("tools"))
  tools = None if tools == "null" else tools
  if tools and not isinstance(tools, list):
    raise ValueError(f"tools must be a list, or its JSON, not {tools!r}")
  return Conversation(
    messages=said, given=given, tools=tools or None, variables=_names(record)
  )


def _names(record: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the names that a template reads of a row, besides its messages."""
  names = messages.parsed(record.get("chat_template_kwargs")) or {}
  if not isinstance(names, Mapping):
    raise ValueError(
      f"chat_template_kwargs must be an object, or its JSON, not {names!r}"
    )
  own = [name for name in names if name in _RENDERED]
  if own:
    raise ValueError(
      f"chat_template_kwargs may not name {own[0]!r}: training sets it itself"
    )
  return names


FORMS = {
  form.name: form
  for form in (
    Form("preferences", ("chosen", "rejected"), _compared),
    Form("messages", ("messages",), _said("messages")),
    Form("conversations", ("conversations",), _said("conversations")),
    Form(
      "prompt_completion",
      ("prompt", "completion"),
      _asked("prompt", "completion"),
    ),
    Form("instruction", ("instruction", "output"), _instructed),
    Form(
      "question_answer", ("question", "answer"), _asked("question", "answer")
    ),
  )
}


def recognise(dataset: Dataset, files: Sequence[str]) -> Form | None:
  """Returns the form of files of records; None: they are text.

  It is known from the fields of the first record, unless `format` says it. A
  `text_field` other than the default says that they are text.

  Raises:
    ValueError: `format` is unknown, or not that of the files; `text_field` names
      conversations.
  """
  if dataset.format == "text" or source.are_tokens(files):
    return None
  first = next((r for f in files[:1] for r in source.records(f)), None)
  fields = first if isinstance(first, Mapping) else {}
  if dataset.format is not None:
    form = FORMS[dataset.format]
    missing = [name for name in form.fields if name not in fields]
    if missing:
      raise ValueError(
        f"{files[0]}: data.format is {form.name}, but the first record has no "
        f"field {missing[0]!r}; its fields are: {', '.join(fields) or 'none'}"
      )
    return form
  found = next(
    (f for f in FORMS.values() if all(name in fields for name in f.fields)),
    None,
  )
  if found and dataset.text_field != _TEXT:
    value = fields.get(dataset.text_field)
    if dataset.text_field in found.fields and not isinstance(value, str):
      raise ValueError(
        f"{files[0]}: {dataset.text_field!r} holds conversations, not text: "
        "leave text_field out, and dllm train reads them as they are"
      )
    return None
  return found


def check_text(path: str, files: Sequence[str], text_field: str) -> None:
  """Raises ValueError if files hold conversations where text is wanted."""
  found = recognise(Dataset(text_field=text_field), files)
  first = next((r for f in files[:1] for r in source.records(f)), {})
  if found and text_field not in first:
    raise ValueError(
      f"{path} holds conversations ({found.name}): dllm train reads them as "
      f"they are, with --config.data.path={path}"
    )
