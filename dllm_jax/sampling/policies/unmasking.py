"""Policies that reveal masked slots by confidence, or at the process's jumps.

`Unmasking` is composed of a score, a selection and a revision (`score`,
`selection`, `revision`), which are most of the published samplers;
`FirstHitting` follows the times at which a slot changes.
"""

import dataclasses
from typing import Any, Literal

from flax import struct
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from dllm_jax.core.noise import Tag
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.policy import check_literal, check_mask
from dllm_jax.sampling.policies.processors import (
  compose,
  Processor,
  Temperature,
)
from dllm_jax.sampling.policies.revision import (
  empty,
  MaskPredict,
  Memory,
  Revision,
  Taken,
)
from dllm_jax.sampling.policies.rows import NONE, plainly
from dllm_jax.sampling.policies.score import (
  at,
  confidence,
  entropy,
  log_prob,
  log_sum,
  Score,
  score,
  SCORES,
)
from dllm_jax.sampling.policies.selection import Even, Progress, Seen


@struct.dataclass
class Hitting(Progress):
  """Progress, and the time of each row.

  Attributes:
    t: the next time at which a slot is revealed.
  """

  t: Float[Array, "B 1"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstHitting(Stepwise):
  """Reveals one random slot at each of the process's jumps (BD3-LM).

  With n masked slots the next jump of a linear schedule is at t u^(1/n): no
  call is spent on a step that changes nothing (arXiv:2409.02908, alg. 1).
  Which slot jumps is uniform among the masked ones.

  Examples:
    >>> from dllm_jax.objectives import MDLM
    >>> mdlm = MDLM(vocab_size=5, mask_id=4)
    >>> FirstHitting(objective=mdlm, steps=8).least_steps(8)
    8
  """

  def __post_init__(self):
    super().__post_init__()
    check_mask(self)

  stands = True

  def least_steps(self, width: int) -> int:
    """Returns the fewest steps that finish a window: one for each slot."""
    return width

  def init(self, process, z, window) -> Hitting:
    """Returns the state at a window's start: t = 1, before the first jump."""
    base = super().init(process, z, window)
    t = jnp.ones((window.shape[0], 1))
    return Hitting(**vars(base), t=t)

  def time(self, state: Hitting) -> Float[Array, "B 1"]:
    """Returns the time of the last jump."""
    return state.t

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""

    def draw(logits, z, noise, rows):
      read = self.filtered(logits, z, rows, guide)
      token, law = self.token(read, z, rows, noise)
      return token, self.noted(law, token)

    token, info = reduce(draw, out, z, noise, rows, window=window)
    sure = jnp.exp(info["log_prob"])
    masked = self.masked(process, z, active)
    luck = noise.uniform(Tag.TRANSFER, 1)[..., 0]
    seen = Seen(candidates=masked, score=luck, confidence=sure)
    chosen = seen.best(jnp.ones_like(seen.left))
    # The uniform of the first masked slot: one for the row.
    first = masked & (jnp.cumsum(masked, axis=1) == 1)
    u = jnp.sum(
      jnp.where(first, noise.uniform(Tag.TIME, 1)[..., 0], 0.0),
      axis=1,
      keepdims=True,
    )
    left = jnp.maximum(seen.left, 1)[:, None]
    t = jnp.where(u > 0, state.t * u ** (1.0 / left), state.t)
    z = jnp.where(chosen, token, z)
    state = state.replace(step=state.step + 1, t=t)
    return z, state, info | {"confidence": sure}


@struct.dataclass
class Course(Progress):
  """Progress, and what a revision remembers.

  Attributes:
    memory: of the revision, or None.
  """

  memory: Memory | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unmasking(Stepwise):
  """Draws a token at every masked slot and reveals the best of them.

  Attributes:
    score: what ranks masked slots (`score.score`).
    selection: how many are revealed (`selection`).
    revision: what happens to tokens that stand already, or None (`revision`).
    doubts: applied to the logits that scores are read from, and to nothing
      else: LLaDA forbids end-of-text there. A slot whose draw they forbid comes
      after all others.
    noise_temperature: of Gumbel noise on the score (Dream's `alg_temp`): slots
      are chosen with probability as softmax(score / temperature), without
      replacement; 0 for the best.
    falling: how that noise falls to 0, on the score's logarithm: with the share
      of "masked" slots (MaskGIT), or "compounding", at step i of n by the factor
      1 - (i + 1) / n (MMaDA); None for noise that stays, on the score.

  Examples:
    >>> from dllm_jax.objectives import MDLM
    >>> from dllm_jax.sampling.policies import Threshold
    >>> mdlm = MDLM(vocab_size=5, mask_id=4)
    >>> sure = Unmasking(objective=mdlm, steps=8, selection=Threshold(value=0.9))
    >>> sure.score, sure.least_steps(8)
    ('confidence', 1)
  """

  score: Score = "confidence"
  selection: Any = Even()
  revision: Revision | None = None
  doubts: tuple[Processor, ...] = ()
  noise_temperature: float = 0.0
  falling: Literal["masked", "compounding"] | None = None

  forces = True

  def __post_init__(self):
    super().__post_init__()
    check_mask(self)
    check_literal("score", self.score, SCORES)
    if not 0.0 <= self.noise_temperature < float("inf"):
      raise ValueError(
        "noise_temperature must be 0 (the best slots) or more, not "
        f"{self.noise_temperature}"
      )

  @property
  def stands(self) -> bool:
    """Whether what is revealed stays: it does if nothing revises it."""
    return self.revision is None

  @property
  def paces(self) -> bool:
    """Whether rows may take fewer steps.

    Not where what is masked again, noise that falls or the times that a network
    is told go by their number, too.
    """
    others = isinstance(self.revision, MaskPredict)
    others |= self.falling == "compounding" or self.objective.reads_time
    return self.selection.paces and not others

  @property
  def extra(self) -> int:
    """Calls beyond `steps` that the revision may add."""
    return 0 if self.revision is None else self.revision.extra

  def init(self, process, z, window) -> Course:
    """Returns the state at a window's start."""
    base = super().init(process, z, window)
    return Course(
      **vars(base),
      memory=None if self.revision is None else empty(window.shape),
    )

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that need no further call; a revision may want more."""
    if self.revision is None:
      return super().done(process, z, state, window)
    over = state.step >= self.steps + self.extra
    full = ~jnp.any(self.masked(process, z, window), axis=1)
    return over | self.revision.done(state.memory, full)

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    slot = jnp.broadcast_to(jnp.arange(active.shape[1]), active.shape)

    def draw(logits, z, noise, slot, rows):
      look = lambda policy, rows: policy.draw(
        logits, z, noise, slot, rows, guide
      )
      return plainly(look, self, rows)

    token, sure, ranks, h, info = reduce(
      draw, out, z, noise, slot, rows, window=window
    )
    masked = self.masked(process, z, active)
    seen = Seen(
      candidates=masked,
      score=self._noised(ranks, noise, masked, state),
      confidence=sure,
      entropy=h,
      uniform=noise.uniform(Tag.TRANSFER, 1)[..., 0]
      if self.selection.uniform
      else None,
      threshold=rows.threshold,
    )
    steps = self.steps if rows.steps is None else rows.steps
    chosen = self.selection(seen, state, steps, self.objective)
    if must is not None:
      chosen = (chosen & ~jnp.any(must, axis=1, keepdims=True)) | (
        masked & must
      )
    new_z, memory = jnp.where(chosen, token, z), state.memory
    if self.revision is not None:
      taken = Taken(
        before=z,
        z=new_z,
        token=token,
        sure=sure,
        active=active,
        step=state.step,
        steps=self.steps,
        maskable=state.maskable,
        mask_id=self.objective.mask_id,
      )
      new_z, memory = self.revision(taken, memory)
    state = state.replace(step=state.step + 1, memory=memory)
    return new_z, state, info | {"confidence": sure}

  def draw(self, logits, z, noise, slot, rows, guide):
    """Returns tokens, how sure they are, scores, entropies and `info`."""
    read = self.filtered(logits, z, rows, guide)
    token, law = self.token(read, z, rows, noise)
    likely, of_all = self._sums(read, token, z, rows)
    info = self.noted(law, token, likely)
    if self.doubts or rows.proposal is not None:
      read = compose(self.doubts, rows.within(read, read), z, rows.counts)
      of_all = None
    sure = confidence(read, token, of_all)
    h = entropy(read) if self.selection.entropy else None
    ranks = score(self.score, read, sure, noise, slot)
    if self.doubts:  # Whatever is ranked by: a doubted draw comes last.
      ranks = jnp.where(sure > 0.0, ranks, -jnp.inf)
      h = None if h is None else jnp.where(sure > 0.0, h, jnp.inf)
    return token, sure, ranks, h, info

  def _sums(self, read, token, z, rows):
    """Returns the log-probability of draws, and the log-sum that scores read.

    From one pass over the vocabulary, where tokens are drawn from what scores
    read, less the mask; else None of what takes others.
    """
    if rows.proposal is not None:
      return None, None
    best = rows.options is None and self.processors == (Temperature(0.0),)
    largest = at(read, token) if best else None
    # From the others to all, no digit is lost: the other way is a difference.
    others = log_sum(self._legal(read), largest)
    of_all = jnp.logaddexp(others, read[..., self.objective.mask_id])
    near = lambda: log_prob(read, token, others)
    if rows.options is None:
      plain = best or not self.processors
      return near() if plain else None, of_all
    if rows.fixed(self.processors):
      return None, of_all
    plain = self.sharpens or ~jnp.any(rows.warm)
    law = lambda: log_prob(self.law(read, z, rows), token)
    return lax.cond(plain, near, law), of_all

  def _noised(self, ranks, noise, masked, state):
    """Returns the score with its Gumbel noise."""
    if self.noise_temperature == 0.0:
      return ranks
    u = noise.uniform(Tag.CONFIDENCE, 1)[..., 0]
    gumbel = -jnp.log(-jnp.log(u))
    if self.falling is None:
      return ranks / self.noise_temperature + gumbel
    if self.falling == "masked":
      left = jnp.sum(masked, axis=1) / jnp.maximum(state.maskable, 1)
    else:
      n = self.steps
      rest = np.cumprod(1.0 - np.arange(1, n + 1, dtype=np.float32) / n)
      left = jnp.asarray(rest)[jnp.minimum(state.step, n - 1)]
    heat = self.noise_temperature * left[:, None]
    return jnp.log(jnp.maximum(ranks, 1e-30)) + heat * gumbel
