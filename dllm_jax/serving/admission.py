"""Where a request goes, and what of its prompt is there already.

Keys and values of a prefix depend on nothing after it where attention never looks
ahead of a block: an exact cache of one row holds the beginning of every prompt
that begins alike. Networks that see the whole canvas have no such prefixes: theirs
depend on what is being written, and are made anew at each block.
"""

from collections.abc import Sequence
import dataclasses

from dllm_jax.core.mask import BlockCausal
from dllm_jax.sampling.requests import Template
from dllm_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """How a request is admitted; the arguments of `slots.admit`.

  Attributes:
    row: where it goes.
    source: whose cache holds its first slots.
    start: how many.
    width: slots from there that a program puts into the cache; 0 for none.
  """

  row: int
  source: int
  start: int = 0
  width: int = 0


class Admission:
  """Knows what each row's exact cache holds.

  Args:
    sampler: how is sampled.
    rows: how many rows there are.
    widths: of prompts, as compiled, in ascending order; none without such a cache.
  """

  def __init__(self, sampler: Sampler, *, rows: int, widths: Sequence[int]):
    self._sampler, self._widths = sampler, widths
    self._kept: list[list[int]] = [[] for _ in range(rows)]
    self._used = [0] * rows  # when a row was last given away, in admissions
    self._count = 0

  def keeps(self, row: int, tokens: Sequence[int]) -> None:
    """Notes the tokens whose keys and values a row has, from slot 0."""
    self._kept[row] = list(tokens)

  def moved(self, source: int, row: int) -> None:
    """Notes that what is in a row is in another one now."""
    self._kept[row], self._used[row] = self._kept[source], self._used[source]

  def place(self, canvas: Template, free: Sequence[int]) -> Place:
    """Returns where a request goes, of the free rows.

    To the row that has most of it, if that is free; else to the one that was given
    away longest ago, whose cache is least likely to be wanted again. Without exact
    caches, to the first.
    """
    if not self._widths:
      return Place(row=min(free), source=min(free))
    self._count += 1
    row = min(free, key=lambda row: (self._used[row], row))
    known = self._known(canvas)
    if not known:
      self._used[row] = self._count
      self._kept[row] = []
      return Place(row=row, source=row)
    common = [self._common(canvas[:known], kept) for kept in self._kept]
    source = max(range(len(common)), key=lambda at: (common[at], at in free))
    start = common[source]
    if start and source in free:
      row = source
    self._used[row] = self._count
    self._kept[row] = list(canvas[:known])
    if start == known:
      return Place(row=row, source=source, start=start)
    width = next(w for w in self._widths if w >= known - start)
    # What is put there may end in the room behind the canvas, not past it.
    start = min(start, self._whole(self._sampler.length + self._room - width))
    return Place(row=row, source=source, start=start, width=width)

  @property
  def _room(self) -> int:
    block, length = self._sampler.block_length, self._sampler.length
    return block if block < length else 0

  def _whole(self, slots: int) -> int:
    """Returns slots less those of a block that is not whole."""
    spec = self._sampler.objective.mask_spec
    return (
      slots - slots % spec.block if isinstance(spec, BlockCausal) else slots
    )

  def _known(self, canvas: Template) -> int:
    """Returns how many slots are put into the cache before the first call."""
    given = next((i for i, t in enumerate(canvas) if t is None), len(canvas))
    return max(self._whole(given) - self._sampler.objective.shift, 0)

  def _common(self, prompt: Template, kept: Sequence[int]) -> int:
    """Returns how many slots of a prompt are kept, in whole blocks."""
    if self._sampler.guidance is not None and self._sampler.guidance.scale:
      return (
        0  # Without the prompt, what was given differs from what was drawn.
      )
    if self._sampler.objective.two_passes:
      return 0  # Layers with a window no longer have what lies before it.
    pairs = enumerate(zip(prompt, kept, strict=False))
    shared = min(len(prompt), len(kept))
    same = next((i for i, (a, b) in pairs if a != b), shared)
    return self._whole(same)
