"""How a canvas is sampled, checked before anything is compiled."""

import dataclasses
from typing import Literal

from dllm_jax.core.mask import BlockCausal, Causal, Full
from dllm_jax.core.types import Objective
from dllm_jax.sampling.forward import CacheKind, CACHES
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.policy import Policy
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.policies.windows.parts import Sliding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How a canvas is sampled; hashable, static under jit.

  Attributes:
    policy: what each network call reveals; knows the objective and the steps.
    length: slots of the canvas (T).
    block_length: slots sampled together, left to right; None for the whole
      canvas at once.
    blocks_from: where blocks are counted from: each row's "prompt" (its end;
      LLaDA, Dream) or the "start" of the canvas (BD3-LM, SDAR, LLaDA2).
    cache: what is kept between network calls (`forward`).
    refresh: calls between passes over the canvas inside a block, for
      approximate caches; 0 for one at each block's entry.
    reach: slots from a block's start that a prefix cache recomputes: as many as
      follow a prompt at most, or None for the canvas (`forward`).
    guidance: of two branches, or None.
    end_ids: a row stops after the block in which it draws one of these tokens,
      and its free slots after the first hold that too; empty for no such stop.
    fill_id: what those slots hold instead, or None.
    extend: whether slots after the block are hidden: the text grows block by
      block, and the canvas is only room.
    context: slots that are seen at once, up to the block's end; None for all.
    least_calls: network calls that a block takes at least; the cached originals
      of Fast-dLLM take 2.
  """

  policy: Policy
  length: int
  block_length: int | None = None
  blocks_from: Literal["prompt", "start"] = "prompt"
  cache: CacheKind = "none"
  refresh: int = 0
  reach: int | None = None
  guidance: Guidance | None = None
  end_ids: tuple[int, ...] = ()
  fill_id: int | None = None
  extend: bool = False
  context: int | None = None
  least_calls: int = 1

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"the canvas needs at least 1 slot, not {self.length}")
    width = self.length if self.block_length is None else self.block_length
    if not 1 <= width <= self.length:
      raise ValueError(
        f"block_length must lie in [1, {self.length}], the canvas, or be None "
        f"for all of it, not {self.block_length}"
      )
    if self.blocks_from not in ("prompt", "start"):
      raise ValueError(
        f"blocks_from must be prompt or start, not {self.blocks_from!r}"
      )
    if self.refresh < 0 or self.least_calls < 1:
      raise ValueError(
        "refresh must be 0 (at a block's entry) or more and least_calls at "
        f"least 1, not {self.refresh} and {self.least_calls}"
      )
    if self.refresh and self.cache not in ("prefix", "dual"):
      raise ValueError(
        "refresh is for caches 'prefix' and 'dual', which grow old: leave it 0 "
        f"with cache {self.cache!r}"
      )
    if self.reach is not None and (
      self.cache != "prefix" or not width <= self.reach <= self.length
    ):
      raise ValueError(
        f"reach is for cache 'prefix' and lies in [{width}, {self.length}], from "
        f"a block to the canvas, not {self.reach} with cache {self.cache!r}"
      )
    if self.context is not None and not width <= self.context <= self.length:
      raise ValueError(
        f"context must lie in [{width}, {self.length}], from a block to the "
        f"canvas, or be None, not {self.context}"
      )
    if self.guidance is not None:
      self.guidance.check(self.objective)
    if self.policy.resizes and (self.block_length or self.cache != "none"):
      raise ValueError(
        "gaps that grow and shrink are seen whole: leave block_length None, and"
        " cache 'none'"
      )
    self._check_drafts()
    self._check_part(width)
    self._check_steps(width)
    if self.slides:
      self._check_slides()
      return
    check_cache(
      self.cache,
      self.objective,
      block_length=self.block_length,
      blocks_from=self.blocks_from,
      forces=self.policy.forces,
      extend=self.extend,
    )

  def _check_drafts(self) -> None:
    if isinstance(self.policy, Speculation) and self.cache != "block":
      raise ValueError(
        "drafts are tested on kept keys and values: leave cache and block_length"
        f" as the preset has them, not cache={self.cache!r},"
        f" block_length={self.block_length}"
      )

  def _check_part(self, width: int) -> None:
    if self.part is None:
      return
    if not self.objective.opens:
      raise ValueError(
        "parts of a block are read alone where the call before it gives its first"
        " token (objective.opens): use another preset"
      )
    if self.cache != "block":
      raise ValueError(
        "parts of a block are read alone on kept keys and values: use cache"
        f" 'block', not {self.cache!r}, or another preset"
      )
    if self.steps < width:
      raise ValueError(
        f"a call of a part of a block predicts no other: leave steps at {width},"
        f" one a slot, not {self.steps}, or use preset 'fast_dllm_v2'"
      )
    if width % self.part:
      raise ValueError(
        f"a part of {self.part} slots is no divisor of a block of {width}"
      )

  def _check_steps(self, width: int) -> None:
    least, why = self.policy.least_steps(width), "one a slot"
    if self.cache in ("prefix", "dual") and self.objective.shift and width > 1:
      # The first call sees to the block's first slot alone (`loop`).
      least, why = max(least, 2), "of which the first fills one slot"
    if self.steps < least:
      raise ValueError(
        f"{type(self.policy).__name__} needs at least {least} steps, {why}, to "
        f"fill a block of {width} slots, not {self.steps}: shorten the block, or "
        "take more steps"
      )

  def _check_slides(self) -> None:
    if getattr(self.objective, "attention", None) != "decided_first":
      raise ValueError(
        "a cache behind a sliding window is exact where masks come after decided"
        f" tokens (WeDLM), not in {type(self.objective).__name__}: use cache"
        " 'none'"
      )
    if self.steps < self.length or self.block_length or self.guidance:
      raise ValueError(
        "a cache behind a sliding window needs block_length None, no guidance"
        f" and at least as many steps as the canvas has slots, {self.length}, not"
        f" {self.steps}; or use cache 'none'"
      )

  @property
  def slides(self) -> bool:
    """Whether calls read a window that slides on, and what is behind is kept."""
    rule = getattr(self.policy, "selection", None)
    return self.cache == "block" and isinstance(rule, Sliding)

  def check_languages(self) -> None:
    """Raises ValueError unless the text of a row can be kept in a language."""
    whole = self.policy.proposes and not self.policy.resizes
    if not whole or self.slides or hasattr(self.objective, "step_law"):
      raise ValueError(
        f"{type(self.policy).__name__} of {type(self.objective).__name__} cannot"
        " keep a text in a language: it does not draw the tokens of a window"
        " together; use a preset that reveals masks, such as 'llada'"
      )

  @property
  def objective(self) -> Objective:
    """The diffusion that the network was trained for."""
    return self.policy.objective

  @property
  def wide(self) -> int | None:
    """Slots that a call works on; None for the whole canvas."""
    if isinstance(self.policy, Speculation):
      return self.policy.width
    if self.slides:  # what was decided behind the first mask, and masks
      return 2 * self.policy.selection.width
    return self.block_length

  @property
  def part(self) -> int | None:
    """Slots of a block's part that calls may read alone; None for none."""
    part = getattr(getattr(self.policy, "selection", None), "part", None)
    return part and min(part, self.block_length or self.length)

  @property
  def steps(self) -> int:
    """Network calls for each block, at most."""
    return self.policy.steps

  @property
  def row_steps(self) -> int | None:
    """The same, which rows may lower; None where they may not."""
    return self.steps if self.policy.paces and not self.slides else None

  @property
  def most_calls(self) -> int:
    """Network calls for each block, at most, with that of keeping it."""
    stores = self.cache == "block" and self.objective.shift == 0
    stores &= not self.objective.opens
    return max(self.steps + self.policy.extra + stores, self.least_calls)

  @property
  def calls_a_pass(self) -> int:
    """Of so many calls in a block, the first makes an approximate cache anew."""
    return min(self.refresh or self.most_calls, self.most_calls)

  @property
  def blocks(self) -> int:
    """The number of blocks of a row without a prompt, the longest case."""
    return -(-self.length // (self.block_length or self.length))


def check_cache(
  kind: CacheKind,
  objective: Objective,
  *,
  block_length: int | None,
  blocks_from: str,
  forces: bool,
  extend: bool = False,
) -> None:
  """Raises ValueError unless a cache is right for an objective.

  Args:
    kind: the cache.
    objective: what the network was trained for.
    block_length: slots of a block, or None for the whole canvas.
    blocks_from: where blocks begin, "prompt" or "start".
    forces: whether the policy can be told to reveal a slot.
    extend: whether slots after a block are hidden.
  """
  if kind not in CACHES:
    raise ValueError(f"unknown cache {kind!r}; legal: {', '.join(CACHES)}")
  name, spec = type(objective).__name__, objective.mask_spec
  if objective.opens or objective.two_passes:
    _check_passes(kind, objective, block_length, blocks_from, forces)
    return
  if kind == "none":
    return
  if block_length is None:
    raise ValueError(
      f"cache {kind!r} needs a block_length, shorter than the canvas"
    )
  if kind != "block":
    if isinstance(spec, (BlockCausal, Causal)):
      raise ValueError(
        f"cache {kind!r} approximates networks that see the whole canvas; "
        f"{name} does not: use cache 'block', which is exact, or 'none'"
      )
    if objective.shift and not forces:
      raise ValueError(
        f"cache {kind!r} with the shifted outputs of {name} needs a policy that "
        "reveals by confidence, or cache 'none'"
      )
    return
  if isinstance(spec, Causal) and objective.shift == 1 and block_length == 1:
    return
  if isinstance(spec, Full) and extend and not objective.shift:
    return
  if not isinstance(spec, BlockCausal):
    raise ValueError(
      f"cache 'block' needs a block-causal network, an autoregressive one with "
      f"block_length 1, or extend, not {name} with block_length {block_length}:"
      " use 'dual', 'prefix' or 'none'"
    )
  if spec.block != block_length or blocks_from != "start" or objective.shift:
    raise ValueError(
      f"cache 'block' of {name} needs its own blocks: block_length {spec.block} "
      f"counted from slot 0, not {block_length} from the {blocks_from}"
    )


def _check_passes(kind, objective, block_length, blocks_from, forces) -> None:
  """Does so for networks that read finished blocks by a pass of another kind."""
  name, spec = type(objective).__name__, objective.mask_spec
  if objective.opens:
    own = block_length is not None
    if isinstance(spec, BlockCausal):
      own = spec.block == block_length and blocks_from == "start"
    if kind != "block" or not own:
      raise ValueError(
        f"blocks of this {name} open with a token of the pass that stores the"
        " one before: use cache 'block' and its own blocks, of"
        f" {objective.block_length} slots"
      )
    if not forces:
      raise ValueError(
        f"blocks of this {name} open with a token of their own: use a policy"
        " that reveals by confidence"
      )
    return
  if (kind, blocks_from) == ("block", "prompt") and (
    block_length == objective.block_length
  ):
    return
  raise ValueError(
    f"{name} reads finished text by a pass of its own, whose keys and values "
    f"are kept, and has canvases of {objective.block_length} slots: it needs "
    f"cache 'block' and block_length {objective.block_length} counted from "
    f"the prompt, not cache {kind!r} and {block_length} from the {blocks_from}"
  )
