"""Questions and a context on one canvas, with masks where labels are to stand."""

from collections.abc import Sequence
import dataclasses

from dllm_jax.data.tokenizer import Tokenizer

MOST_LABELS = 255


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What is asked about a context.

  Attributes:
    instructions: the question, or a statement that may be true.
    labels: the answers that there are, as texts; 2 to 255, all different.
    hints: a description of each; "" for none.
  """

  instructions: str
  labels: tuple[str, ...] = ("yes", "no")
  hints: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.instructions.strip():
      raise ValueError("a question needs instructions: what is asked")
    if not 2 <= len(self.labels) <= MOST_LABELS:
      raise ValueError(
        f"a question needs 2 to {MOST_LABELS} labels, not {len(self.labels)}"
      )
    if len(set(self.labels)) < len(self.labels) or not all(self.labels):
      raise ValueError("labels must differ from each other, none empty")
    if self.hints and len(self.hints) != len(self.labels):
      raise ValueError("give each label a description, or none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """A canvas with answers to be read.

  Attributes:
    row: token ids, None at each slot of an answer.
    slots: the first slot of each answer.
    labels: of each question, the tokens of its labels.
  """

  row: tuple[int | None, ...]
  slots: tuple[int, ...]
  labels: tuple[tuple[tuple[int, ...], ...], ...]

  @property
  def tokens(self) -> int:
    """The tokens that are given."""
    return sum(token is not None for token in self.row)


def laid_out(
  context: str | Sequence[dict[str, str]],
  questions: Sequence[Question],
  tokenizer: Tokenizer,
) -> Layout:
  """Returns the canvas of some questions about a context.

  A text is followed by each question and its answer. Messages become a
  conversation by the model's own template: the last user's turn asks all
  questions, the assistant's begins with the answers.

  Args:
    context: a text, or messages.
    questions: what is asked.
    tokenizer: text to tokens.

  Raises:
    ValueError: there is no question, or no template for messages.
  """
  if not questions:
    raise ValueError("nothing to decide: give at least one question")
  ends = [f"A{i + 1}:" for i in range(len(questions))]
  labels = [
    _tokens(end, question.labels, tokenizer)
    for end, question in zip(ends, questions, strict=True)
  ]
  slots = [max(map(len, of)) for of in labels]
  asked = [_asked(i, question) for i, question in enumerate(questions)]
  if isinstance(context, str):
    parts = [context.rstrip() + "\n\n" if context.strip() else ""]
    for text, end, count in zip(asked, ends, slots, strict=True):
      parts[-1] += f"{text}\n{end}"
      parts += [count, "\n"]
    row = tokenizer.encode_spans(parts)
  else:
    row = _conversation(context, asked, tokenizer)
    parts = []
    for end, count in zip(ends, slots, strict=True):
      parts += ["\n" + end if parts else end, count]
    row += _inner(tokenizer, parts)
  return Layout(row=tuple(row), slots=_starts(row, slots), labels=tuple(labels))


def _asked(i: int, question: Question) -> str:
  """Returns a question as it stands on the canvas."""
  hints = question.hints or ("",) * len(question.labels)
  labels = "; ".join(
    f"{label} ({hint})" if hint else label
    for label, hint in zip(question.labels, hints, strict=True)
  )
  return f"Q{i + 1}: {question.instructions.strip()} [{labels}]"


def _tokens(end, labels, tokenizer) -> tuple[tuple[int, ...], ...]:
  """Returns the tokens of labels behind a text, none of which begins another."""
  spelled = lambda text: tuple(int(i) for i in tokenizer.encode(text))
  before = spelled(end)

  def of(label):
    whole = spelled(f"{end} {label}")
    if whole[: len(before)] == before and len(whole) > len(before):
      return whole[len(before) :]
    return spelled(f" {label}")

  found = [of(label) for label in labels]
  begins = any(a != b and b[: len(a)] == a for a in found for b in found)
  if begins:  # What ends a label is then part of it.
    found = [(*tokens, *spelled("\n")) for tokens in found]
  if len(set(found)) < len(found):
    raise ValueError("this tokenizer spells two of the labels alike")
  return tuple(found)


def _conversation(messages, asked, tokenizer) -> list[int]:
  messages = [dict(message) for message in messages]
  text = "\n".join([*asked, "Answer each with one of its labels."])
  if messages and messages[-1]["role"] == "user":
    messages[-1]["content"] += "\n\n" + text
  else:
    messages.append({"role": "user", "content": text})
  if not getattr(tokenizer, "chat_templates", None):
    raise ValueError(
      "the model has no chat template for messages: give the context as a text"
    )
  return [int(i) for i in tokenizer.chat(messages)]


def _inner(tokenizer, parts) -> list[int | None]:
  """Returns parts of a text with slots, without what stands around texts."""
  row = list(tokenizer.encode_spans(parts))
  begin, end = len(tokenizer.begin_ids), len(tokenizer.after_ids)
  return row[begin : len(row) - end]


def _starts(
  row: Sequence[int | None], counts: Sequence[int]
) -> tuple[int, ...]:
  """Returns where runs of so many free slots begin."""
  free = [i for i, token in enumerate(row) if token is None]
  starts, at = [], 0
  for count in counts:
    starts.append(free[at])
    at += count
  return tuple(starts)
