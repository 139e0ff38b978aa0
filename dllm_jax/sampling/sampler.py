"""How a canvas is sampled, checked before anything is compiled."""

import dataclasses
from typing import Literal

from dllm_jax.core.types import Objective, Policy
from dllm_jax.sampling.forward import CacheKind, check_cache
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.speculation import Speculation


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
    self._check_steps(width)
    check_cache(
      self.cache,
      self.objective,
      block_length=self.block_length,
      blocks_from=self.blocks_from,
      forces=self.policy.forces,
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

  @property
  def objective(self) -> Objective:
    """The diffusion that the network was trained for."""
    return self.policy.objective

  @property
  def wide(self) -> int | None:
    """Slots that a call works on; None for the whole canvas."""
    drafts = isinstance(self.policy, Speculation)
    return self.policy.width if drafts else self.block_length

  @property
  def steps(self) -> int:
    """Network calls for each block, at most."""
    return self.policy.steps

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
