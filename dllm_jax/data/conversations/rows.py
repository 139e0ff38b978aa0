"""Conversations as rows: one a row, or several that do not see each other.

    conversations  p p a | p a a a | p a a      a counts, $ ends a text
    one a row      p p a $ $ $ $ $              what fills a row: `Fill`
    packed         p a a a p p a .              segments 1 1 1 1 2 2 2 0
                   p a a . . . . .
    to whole       p a a a p p a $              each begins at a multiple of
    blocks of 4    p a a $ . . . .              `Fill.multiple` tokens

Which conversations lie in a row together is fixed by their lengths; rows are
shuffled, as all rows are.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dllm_jax.data.conversations.examples import check_size, Example, Reading
from dllm_jax.data.conversations.forms import Form
from dllm_jax.data.conversations.report import prompts, Report
from dllm_jax.data.dataset import Dataset
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.packing import Row, TextSize
from dllm_jax.objectives.texts import Fill

_PROMPTS = 3  # That are answered while training.


class ConversationRows:
  """Rows of conversations that lie in memory, by index.

  Args:
    examples: the conversations, none longer than a row.
    length: tokens a row.
    packed: whether rows hold several.
    fill: what is behind a conversation.
    fill_id: the token that fills; None: nothing needs it.
    cut: whether each conversation lacks its end; nothing then fills its row that
      counts.

  Raises:
    ValueError: there is something to fill, and no token for it.
  """

  def __init__(
    self,
    examples: Sequence[Example],
    *,
    length: int,
    packed: bool,
    fill: Fill,
    fill_id: int | None,
    cut: Sequence[bool] | None = None,
  ):
    fills = fill.kind != "none" and (fill.multiple or not packed)
    if fills and fill_id is None:
      raise ValueError(
        "the tokenizer names no end of text, which fills rows of conversations:"
        " set objective.fill=none, or name an eos_token in tokenizer_config.json"
      )
    self.length, self.examples = length, list(examples)
    self._fill, self._fill_id = fill if fills else Fill(), fill_id
    self._cut = np.zeros(len(self.examples), bool) if cut is None else cut
    self._multiple = fill.multiple or 1
    sizes = [self._whole(len(example.tokens)) for example in examples]
    self.members = (
      pack(sizes, length) if packed else [[i] for i in range(len(sizes))]
    )

  def _whole(self, tokens: int) -> int:
    """Returns the end of the block that a number of tokens ends in."""
    return min(-(-tokens // self._multiple) * self._multiple, self.length)

  def __len__(self) -> int:
    return len(self.members)

  def __getitem__(self, index: int) -> Row:
    tokens, segments = np.zeros((2, self.length), np.int32)
    counts = np.zeros(self.length, bool)
    start = 0
    for number, i in enumerate(self.members[index], 1):
      example = self.examples[i]
      stop = start + len(example.tokens)
      tokens[start:stop], counts[start:stop] = example
      end = self._whole(stop)
      if self._fill.kind != "none":
        last = end if self._fill.multiple else self.length
        tokens[stop:last] = self._fill_id
        counts[stop:last] = self._fill.kind == "counted" and not self._cut[i]
        stop = last
      segments[start:stop] = number
      start = end
    return Row(tokens, segments, counts)

  @property
  def fills(self) -> int:
    """The tokens that count and only fill, of all rows."""
    real = sum(int(example.counts.sum()) for example in self.examples)
    return sum(int(self[i].mask.sum()) for i in range(len(self))) - real


class Loaded(NamedTuple):
  """Conversations as rows of both sides; see `data.corpus.Corpus`.

  Attributes:
    train: what to train on.
    held_out: what to evaluate on, or None.
    held_out_text: the answers that are held out.
    held_out_fill: tokens of held-out rows that count, but only fill.
    texts_apart: whether rows hold several.
    reports: what is said of them.
    prompts: prompts to answer while training, and in how many tokens each.
  """

  train: ConversationRows
  held_out: ConversationRows | None
  held_out_text: TextSize | None
  held_out_fill: int
  texts_apart: bool
  reports: tuple[Report, ...]
  prompts: tuple[tuple[tuple[int, ...], int], ...]


def load_rows(
  dataset: Dataset,
  files: Sequence[str],
  form: Form,
  tokenizer: HuggingFace,
  fill: Fill,
) -> Loaded:
  """Returns the rows of conversations.

  Args:
    dataset: what to read.
    files: its files.
    form: their form.
    tokenizer: that of the model, with its template.
    fill: what is behind a conversation.

  Raises:
    ValueError: as `load_examples`, or as `ConversationRows`.
  """
  check_size(dataset, dataset.path, files)
  reading = Reading(dataset, tokenizer, form)
  sides = reading.sides(files)
  eos, pad = tokenizer.eos_id, tokenizer.pad_id
  train, held_out = (
    ConversationRows(
      [made.example for made in side],
      length=dataset.length,
      packed=dataset.packing == "packed",
      fill=fill,
      fill_id=pad if eos is None else eos,
      cut=[made.cut for made in side],
    )
    for side in sides
  )
  report = Report(
    path=dataset.path,
    form=f"{form.name} ({', '.join(form.fields)})",
    count=reading.count,
    train=len(sides[0]),
    held_out=len(sides[1]),
    rows=len(train),
    first=train[0],
    tokenizer=tokenizer,
  )
  asked = held_out if sides[1] else train
  return Loaded(
    train=train,
    held_out=held_out if sides[1] else None,
    held_out_text=sum((made.size for made in sides[1]), TextSize())
    if sides[1]
    else None,
    held_out_fill=held_out.fills,
    texts_apart=dataset.packing == "packed",
    reports=(report,),
    prompts=prompts(asked.examples, dataset.length, _PROMPTS),
  )


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Returns which items lie in each row: best fit, the longest first.

  Args:
    sizes: of the items, none above `length`.
    length: the room of a row.

  Returns:
    The items of each row in ascending order, rows in the order of their first
    items: a function of the sizes alone.
  """
  rows: list[list[int]] = []
  room: list[int] = []  # Of some rows, ascending, with a row of each beside it.
  open_rows: dict[int, list[int]] = {}
  for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    at = bisect.bisect_left(room, sizes[item])
    if at == len(room):
      left, row = length, len(rows)
      rows.append([])
    else:
      left = room[at]
      row = open_rows[left].pop()
      if not open_rows[left]:
        del open_rows[left], room[at]
    rows[row].append(item)
    left -= sizes[item]
    if left not in open_rows:
      bisect.insort(room, left)
    open_rows.setdefault(left, []).append(row)
  return sorted((sorted(row) for row in rows), key=lambda row: row[0])
