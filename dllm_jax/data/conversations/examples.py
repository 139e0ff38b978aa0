"""Conversations as tokens, with which of them count.

A text is tokenised once, as a whole, so that its tokens are those of any other
program; a token counts if it has a character of what counts. The token that ends
a turn behind an answer counts too, whether the template marks it or not; where a
template ends no turn by a special token, the end of text follows the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any, NamedTuple

from jaxtyping import Bool, Int
import numpy as np

from dllm_jax.data import source
from dllm_jax.data.conversations import forms, supervision
from dllm_jax.data.dataset import Dataset
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.packing import text_size, TextSize

_AT_ONCE = 512  # Conversations that are tokenised together.


class Example(NamedTuple):
  """A conversation as tokens.

  Attributes:
    tokens: the ids, `[n]`, int32.
    counts: which of them are supervised, `[n]`.
  """

  tokens: Int[np.ndarray, "n"]
  counts: Bool[np.ndarray, "n"]

  @property
  def given(self) -> int:
    """The tokens before the first that counts: the prompt."""
    return int(np.argmax(self.counts))


class Made(NamedTuple):
  """A conversation, tokenised.

  Attributes:
    example: its tokens.
    cut: whether its end is missing.
    shortened: whether its end or some of its prompt is.
    size: what counts of it: tokens, and the text that they stand for.
  """

  example: Example
  cut: bool
  shortened: bool
  size: TextSize


@dataclasses.dataclass
class Count:
  """What became of rows.

  Attributes:
    rows: all of them.
    dropped: those too long that were left out.
    shortened: those too long that lost some of their prompt or end.
    bad: those that cannot be trained on, which were left out.
    reason: why the first of those cannot.
  """

  rows: int = 0
  dropped: int = 0
  shortened: int = 0
  bad: int = 0
  reason: str = ""


class Examples(NamedTuple):
  """The conversations of a data set, tokenised.

  Attributes:
    train: what to train on.
    held_out: what to evaluate on.
  """

  train: list[Example]
  held_out: list[Example]


def load_examples(dataset: Dataset, tokenizer: HuggingFace) -> Examples:
  """Returns the conversations that a dataset names, as examples.

  Args:
    dataset: what to read; no more than `length` tokens of each are kept.
    tokenizer: that of the model, with its template, unless `dataset` names one.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: a row cannot be trained on, and `skip_bad` is off; the data are
      no conversations; there are none.
  """
  form, files = find(dataset, dataset.path)
  tokenizer = supervision.templated(tokenizer, dataset.template)
  sides = Reading(dataset, tokenizer, form).sides(files)
  return Examples(*([made.example for made in side] for side in sides))


def find(dataset: Dataset, path: str) -> tuple[forms.Form, list[str]]:
  """Returns the form of the conversations at a path, and their files.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: there are no conversations, or more than is held in memory.
  """
  files = source.find(path)
  form = forms.recognise(dataset, files)
  if form is None:
    legal = ", ".join(
      f"{f.name} ({', '.join(f.fields)})" for f in forms.FORMS.values()
    )
    raise ValueError(f"{path} holds no conversations; forms: {legal}")
  check_size(dataset, path, files)
  return form, files


def check_size(dataset: Dataset, path: str, files: Sequence[str]) -> None:
  """Raises ValueError if files are more than is held in memory."""
  size = source.size(files)
  if size > dataset.in_memory_bytes:
    raise ValueError(
      f"{path}: conversations are held in memory as tokens, 5 bytes each, and "
      f"these are {size} bytes of files; raise data.in_memory_bytes (now "
      f"{dataset.in_memory_bytes}), or name fewer files"
    )


class Reading:
  """Reads conversations.

  Attributes:
    count: what became of the rows so far.

  Args:
    dataset: what is read how.
    tokenizer: that of the model.
    form: the form of the rows.
  """

  def __init__(self, dataset: Dataset, tokenizer: Any, form: forms.Form):
    self._dataset, self._form = dataset, form
    self._writer = supervision.Writer(tokenizer, dataset.supervise)
    self._tokenizer, self.count = tokenizer, Count()
    ends = {*tokenizer.end_ids, tokenizer.turn_end_id, tokenizer.eos_id}
    self._ends = np.asarray(sorted(ends - {None}), np.int32)
    self._special = np.asarray(sorted(tokenizer.special_ids), np.int32)
    turn, eos = tokenizer.turn_end_id, tokenizer.eos_id
    self._behind = eos if turn is None else None

  def sides(self, files: Sequence[str]) -> tuple[list[Made], list[Made]]:
    """Returns what is for training and what is held out, of `held_out_path` too.

    Of preferences, the chosen answers.

    Raises:
      ValueError: as `load_examples`.
    """
    sides = [], []
    for row, (made, *_) in self.read(files):
      held = source.is_held_out(row.key(), self._dataset.held_out_of_path)
      sides[held].append(made)
    if path := self._dataset.held_out_path:
      held_out = self.read(source.find(path))
      sides[1].extend(made for _, (made, *_) in held_out)
    if not sides[0]:
      raise self.nothing(files)
    return sides

  def nothing(self, files: Sequence[str]) -> ValueError:
    """Returns the error of data without a row to train on."""
    c = self.count
    return ValueError(
      f"{self._dataset.path}: of {c.rows} rows in {len(files)} files none is "
      f"left to train on ({c.dropped} longer than data.length "
      f"{self._dataset.length}, {c.bad} bad{c.reason and ': ' + c.reason})"
    )

  def read(self, files: Sequence[str]) -> Iterator[tuple[Any, list[Made]]]:
    """Yields rows as the form reads them, with examples of what is in them.

    A row of which one is too long, or that is bad, is left out and counted.

    Raises:
      ValueError: a row is bad, and is not to be left out.
    """
    rows = (
      (f"{path}: row {n}", record)
      for path in files
      for n, record in enumerate(source.records(path), 1)
    )
    while chunk := list(itertools.islice(rows, _AT_ONCE)):
      written = [
        (where, *found)
        for where, record in chunk
        if (found := self._write(where, record))
      ]
      texts = [one.text for *_, ones in written for one in ones]
      tokens = iter(self._tokenizer.encode_places(texts))
      for where, row, ones in written:
        tokenised = [(one, *next(tokens)) for one in ones]
        found = self._guarded(where, self._made, tokenised)
        if found is not None:
          yield row, found

  def _guarded(self, where: str, function, *args):
    """Returns what a function makes of a row, None if the row is bad."""
    try:
      return function(*args)
    except (ValueError, KeyError, TypeError) as error:
      reason = f"{where}: {error}"
      if not self._dataset.skip_bad:
        raise ValueError(
          f"{reason} (data.skip_bad leaves such rows out)"
        ) from error
      self.count.bad += 1
      self.count.reason = self.count.reason or reason
      return None

  def _write(self, where: str, record: Any):
    self.count.rows += 1
    return self._guarded(where, self._written, record)

  def _written(self, record: Any):
    """Returns a row, and each of its conversations as text."""
    if not isinstance(record, Mapping):
      raise ValueError(
        f"an object with fields was expected, not {record!r:.80}"
      )
    missing = [name for name in self._form.fields if name not in record]
    if missing:
      raise ValueError(
        f"there is no field {missing[0]!r}; fields: {', '.join(record)}"
      )
    row = self._form.read(record)
    both = [row] if isinstance(row, forms.Conversation) else list(row)
    return row, [self._writer(conversation) for conversation in both]

  def _made(self, ones: list[tuple]) -> list[Made] | None:
    """Returns the examples of a row, None if one of them is too long."""
    made = [self._example(*one) for one in ones]
    if None in made:
      self.count.dropped += 1
      return None
    if len(made) > 1 and np.array_equal(*(m.example.tokens for m in made)):
      raise ValueError("chosen and rejected are the same answer")
    self.count.shortened += any(m.shortened for m in made)
    return made

  def _example(self, written, ids, places) -> Made | None:
    """Returns a conversation as tokens, None if it is too long."""
    if self._tokenizer.mask_id in ids:
      name = self._tokenizer.name_of(self._tokenizer.mask_id)
      raise ValueError(f"a text contains the mask token {name!r}; remove it")
    counts = np.zeros(len(ids), bool)
    for start, stop in written.spans:
      counts |= (places[:, 0] < stop) & (places[:, 1] > start)
    ends = np.isin(ids, self._ends)
    counts[1:] |= counts[:-1] & ends[1:]
    if self._behind is not None:
      ids, counts = np.append(ids, self._behind), np.append(counts, True)
      places = np.append(places, [[len(written.text)] * 2], axis=0)
    whole = Example(ids.astype(np.int32), counts)
    kept = self._kept(whole)
    if kept is None:
      return None
    example = Example(*(part[kept].copy() for part in whole))
    special = places[kept][np.isin(ids[kept], self._special)]
    text = _answered(written, places[kept], special)
    return Made(
      example=example,
      cut=kept.stop < len(ids),
      shortened=len(example.tokens) < len(ids),
      size=text_size(text, example.tokens[example.counts]),
    )

  def _kept(self, example: Example) -> slice | None:
    """Returns which tokens of an example make a row; None for none.

    Raises:
      ValueError: no answer would be left.
    """
    length, n = self._dataset.length, len(example.tokens)
    if n <= length:
      return slice(0, n)
    if self._dataset.too_long == "drop":
      return None
    left = self._dataset.too_long == "left"
    if (n - example.given > length) if left else (example.given >= length):
      raise ValueError(
        f"the answer leaves no room: {example.given} tokens of prompt and "
        f"{n - example.given} after it, in rows of data.length {length}"
      )
    return slice(n - length, n) if left else slice(0, length)


def _answered(written, places, special) -> str:
  """Returns the text that counts of some tokens, without special ones."""
  inside = np.zeros(len(written.text), bool)
  for start, stop in written.spans:
    inside[start:stop] = True
  for start, stop in special:
    inside[start:stop] = False
  inside[: places[0, 0]] = inside[places[-1, 1] :] = False
  return "".join(itertools.compress(written.text, inside))
