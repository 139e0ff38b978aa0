"""A conversation as text, and what of it counts, by the model's own template.

What the assistant says counts, its end included. A template that marks it
(`{% generation %}`) says so itself. Of any other, the messages before an answer
are rendered with the header that asks for one, and those up to the answer: the
answer is what the second text has more, if both begin the whole. Nothing is
looked for in the text.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, NamedTuple

from dllm_jax.core import paths
from dllm_jax.data import chat
from dllm_jax.data.conversations.forms import Conversation
from dllm_jax.data.huggingface import HuggingFace

_MARKS = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")
_PROBE = (
  {"role": "user", "content": "the question"},
  {"role": "assistant", "content": "an answer"},
)


def templated(tokenizer: Any, file: str | None) -> Any:
  """Returns a tokenizer with the chat template of a file, if one is named.

  What ends a turn there then ends what is sampled, too.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the tokenizer has no special tokens for a template to name.
  """
  if file is None:
    return tokenizer
  check(tokenizer)
  place = paths.place(file)
  if not place.is_file():
    raise FileNotFoundError(
      f"data.template {file!r} does not exist; give a file with a Jinja "
      "template"
    )
  try:
    text = place.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"data.template {file!r} is no text in UTF-8; give a file with a Jinja "
      "template"
    ) from error
  try:
    chat.check(text)
  except ValueError as error:
    raise ValueError(f"data.template {file!r}: {error}") from error
  made = dataclasses.replace(tokenizer, chat_templates={"default": text})
  end = made.turn_end_id
  if end is None or end in made.end_ids:
    return made
  return dataclasses.replace(made, end_ids=(*made.end_ids, end))


def check(tokenizer: Any) -> None:
  """Raises ValueError if a tokenizer cannot have a chat template."""
  if not isinstance(tokenizer, HuggingFace):
    raise ValueError(
      f"conversations need a tokenizer.json with special tokens, which "
      f"{type(tokenizer).__name__.lower()} tokens do not have: fine-tune a model "
      "that was imported, or set data.tokenizer to a tokenizer.json; or "
      "data.format=text to train on a field of text"
    )


class Written(NamedTuple):
  """A conversation as text.

  Attributes:
    text: the whole, as the template writes it.
    spans: what counts of it: where each answer begins and ends, characters.
  """

  text: str
  spans: tuple[tuple[int, int], ...]


class Writer:
  """Writes conversations by a tokenizer's template.

  Args:
    tokenizer: it has the template and what that may name.
    supervise: "all" answers count, or the "last".

  Raises:
    ValueError: there is no template.
  """

  def __init__(self, tokenizer: HuggingFace, supervise: str):
    check(tokenizer)
    if not tokenizer.chat_templates:
      raise ValueError(
        "the model has no chat template: give one with "
        "--config.data.template=FILE, or train on text with "
        "--config.data.format=text"
      )
    self._tokenizer, self._supervise = tokenizer, supervise

  def __call__(self, conversation: Conversation) -> Written:
    """Returns a conversation up to its last answer that counts.

    Raises:
      ValueError: there is no answer; the template refuses the messages, or does
        not say what counts.
    """
    said = conversation.messages
    # What opens a conversation answers nothing: nobody asks a model for it.
    turns = [
      k
      for k in range(max(conversation.given, 1), len(said))
      if said[k]["role"] == "assistant"
    ]
    if not turns:
      raise ValueError(
        "no message of the assistant's answers another, so that nothing counts"
      )
    turns = turns[-1:] if self._supervise == "last" else turns
    said = said[: turns[-1] + 1]
    view = _View(self, conversation)
    whole = view.closed(said)
    spans = view.marked(said, turns[0])
    if not spans:
      spans = [view.answer(whole, said, k) for k in turns]
    spans = tuple((a, min(b, len(whole))) for a, b in spans)
    if not any(a < b for a, b in spans):
      raise ValueError("the chat template leaves the answers out")
    return Written(whole, spans)

  def render(
    self,
    said: Sequence[Mapping[str, Any]],
    conversation: Conversation,
    *,
    answer: bool,
  ) -> chat.Rendered:
    """Returns messages by the template that the conversation's tools choose."""
    tools = conversation.tools
    template = chat.choose(self._tokenizer.chat_templates, tools=tools)
    names = {**self._tokenizer.named, **conversation.variables}
    return chat.render(template, said, answer=answer, tools=tools, **names)

  def marks(self, conversation: Conversation) -> bool:
    """Whether the template of a conversation marks what counts."""
    templates = self._tokenizer.chat_templates
    return bool(_MARKS.search(chat.choose(templates, tools=conversation.tools)))

  @functools.cached_property
  def dangling(self) -> str | None:
    """What ends a turn, if the template begins an answer after every one.

    LLaDA's does, whatever `add_generation_prompt` says.

    Raises:
      ValueError: no special token ends a turn there.
    """
    probe = Conversation(list(_PROBE))
    try:
      texts = [
        self.render(probe.messages, probe, answer=answer).text
        for answer in (False, True)
      ]
      asked = self.render(probe.messages[:1], probe, answer=True).text
    except ValueError:  # It wants more than that, and is asked in earnest.
      return None
    if texts[0] != texts[1]:
      return None
    end = self._tokenizer.turn_end_id
    token = end if end is None else self._tokenizer.name_of(end)
    behind = (
      texts[0].rpartition(token)[2] if token else _common(texts[0], asked)
    )
    if not behind.strip():
      return None
    if token is None:
      raise ValueError(
        "the chat template begins another answer after the last one "
        f"({behind!r}) and ends none with a special token: give one that heeds "
        "add_generation_prompt, with --config.data.template=FILE"
      )
    return token


def _common(a: str, b: str) -> str:
  """Returns how two texts end alike."""
  n = 0
  while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
    n += 1
  return a[len(a) - n :]


class _View:
  """One conversation under a writer."""

  def __init__(self, writer: Writer, conversation: Conversation):
    self._writer, self._conversation = writer, conversation

  def _render(self, said, answer: bool = False) -> chat.Rendered:
    return self._writer.render(said, self._conversation, answer=answer)

  def closed(self, said: Sequence[Mapping[str, Any]]) -> str:
    """Returns messages as text that ends where the last of them does."""
    text, end = self._render(said).text, self._writer.dangling
    if end is None:
      return text
    # The last such token: what is behind it is the header of no answer.
    head, found, _ = text.rpartition(end)
    return head + found if found else text

  def marked(
    self, said: Sequence[Mapping[str, Any]], first: int
  ) -> list[tuple[int, int]]:
    """Returns what the template marks from a message on; none if nothing."""
    if not self._writer.marks(self._conversation):
      return []
    before = any(m["role"] == "assistant" for m in said[:first])
    skipped = len(self._render(said[:first]).spans) if before else 0
    spans = list(self._render(said).spans[skipped:])
    if not spans:
      raise ValueError(
        "the chat template marks nothing of these messages with "
        "{% generation %}: mend it, or leave the tag out for what prefixes say"
      )
    return spans

  def answer(
    self, whole: str, said: Sequence[Mapping[str, Any]], k: int
  ) -> tuple[int, int]:
    """Returns where message k stands in the whole, its header apart."""
    asked = self._render(said[:k], answer=True).text
    until = whole if k + 1 == len(said) else self.closed(said[: k + 1])
    if whole.startswith(asked) and whole.startswith(until):
      return len(asked), len(until)
    raise self._differs(whole, said, k)

  def _differs(self, whole, said, k: int) -> ValueError:
    mark = (
      "give a template with {% generation %} by --config.data.template=FILE"
    )
    fewer = any(m["role"] == "assistant" for m in said[k + 1 :])
    advice = f"set data.supervise=last, or {mark}" if fewer else mark
    for n in range(1, k + 2):
      try:
        same = whole.startswith(self.closed(said[:n]))
      except ValueError:  # No conversation ends here.
        continue
      if not same:
        return ValueError(
          f"the chat template does not say what counts: message {n} "
          f"({said[n - 1]['role']}) is written otherwise when messages "
          f"{n + 1} to {len(said)} follow; {advice}"
        )
    return ValueError(
      f"the chat template does not say what counts: the header that asks for "
      f"message {k + 1} (add_generation_prompt) is not the one before it in "
      f"the conversation; {mark}"
    )
