r"""Processors of logits, run on chunks of positions inside the sampler.

A processor is `(logits [B, c, V], z, counts) -> logits`, a function of each
position alone; -inf forbids a token. Several are applied in order. Nothing
sorts: a set of best tokens is found by bisection on a threshold.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core import check
from dllm_jax.core.vocabulary import best

Logits = Float[Array, "B c V"]
Counts = Int[Array, "B 1 V"] | None
"""How often each token stands in its row; None where nobody counted."""
Processor = Callable[[Logits, PyTree, Counts], Logits]
_COLD = 1e-3
_LEAST = float(jnp.finfo(jnp.float32).min)


def compose(
  processors: Sequence[Processor],
  logits: Logits,
  z: PyTree,
  counts: Counts = None,
) -> Logits:
  """Returns the logits after each processor in turn."""
  for processor in processors:
    logits = processor(logits, z, counts)
  return logits


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Divides logits by a temperature; 0 leaves the best token only.

  Attributes:
    value: at least 0; 1 changes nothing.
  """

  value: float
  counts = False

  def __post_init__(self):
    if not 0.0 <= self.value < float("inf"):
      raise ValueError(
        f"temperature must be 0 (the best token) or more, not {self.value}"
      )

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns logits / value."""
    if self.value == 1.0:
      return logits
    if self.value >= _COLD:
      return logits / self.value
    return heated(logits, self.value) if self.value else best_only(logits)


@dataclasses.dataclass(frozen=True)
class TopK:
  """Keeps the k most probable tokens, the lower id first among equals.

  Attributes:
    k: tokens to keep, at least 1.
  """

  k: int
  counts = False

  def __post_init__(self):
    if self.k < 1:
      raise ValueError(f"top-k must keep at least 1 token, not {self.k}")

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf outside the best k."""
    return logits if self.k >= logits.shape[-1] else top_k(logits, self.k)


@dataclasses.dataclass(frozen=True)
class TopP:
  """Keeps the smallest set of best tokens whose probability reaches p.

  The token that crosses p is kept, so that at least one is; the lower id comes
  first among equals. Also called nucleus sampling (arXiv:1904.09751).

  Attributes:
    p: a probability in (0, 1].
    crossing: whether the token that crosses p is kept; ReMDM leaves it out,
      unless it is the first.
  """

  p: float
  crossing: bool = True
  counts = False

  def __post_init__(self):
    check.within("top-p", self.p, "(0, 1]")

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf outside the nucleus."""
    if self.p == 1.0:
      return logits
    return top_p(logits, self.p, crossing=self.crossing)


@dataclasses.dataclass(frozen=True)
class MinP:
  """Keeps tokens at least so probable beside the best one (arXiv:2407.01082).

  Attributes:
    p: a share of the best token's probability, in [0, 1]; 0 keeps all.
  """

  p: float
  counts = False

  def __post_init__(self):
    check.within("min-p", self.p, "[0, 1]")

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf where p(token) < p max p."""
    return logits if self.p == 0.0 else min_p(logits, self.p)


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
  """Divides positive logits of tokens that the row has by a factor (CTRL).

  Negative ones are multiplied (arXiv:1909.05858, sec. 4.1).

  Attributes:
    value: above 0; 1 changes nothing, more makes repetition rarer.
  """

  value: float
  counts = True

  def __post_init__(self):
    if not 0.0 < self.value < float("inf"):
      raise ValueError(
        f"the repetition penalty must be above 0 (1: none), not {self.value}"
      )

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, those of known tokens made smaller."""
    if self.value == 1.0 or counts is None:
      return logits
    return penalised(logits, counts, repetition=self.value)


@dataclasses.dataclass(frozen=True)
class Banned:
  """Forbids tokens; of end-of-text, it suppresses early ends.

  Attributes:
    tokens: ids.
  """

  tokens: tuple[int, ...]
  counts = False

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf at the tokens."""
    return jnp.where(_among(self.tokens, logits), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Forced:
  """Allows some tokens only; a token at one slot is forced by the request.

  Attributes:
    tokens: ids, at least one.
  """

  tokens: tuple[int, ...]
  counts = False

  def __post_init__(self):
    if not self.tokens:
      raise ValueError("forcing needs at least one allowed token")

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf at all other tokens."""
    return jnp.where(_among(self.tokens, logits), logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Within:
  """Allows a run of tokens only: those of pictures.

  Attributes:
    start: the first of them.
    stop: the token after the last.
  """

  start: int
  stop: int
  counts = False

  def __call__(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns the logits, -inf at all other tokens."""
    ids = jnp.arange(logits.shape[-1])
    return jnp.where((ids >= self.start) & (ids < self.stop), logits, -jnp.inf)


def heated(logits: Logits, value: float | Float[Array, "B 1 1"]) -> Logits:
  """Returns logits / value, for values above 0; next to 0, less their best."""
  most = jnp.max(logits, axis=-1, keepdims=True)
  # Quotients would overflow, their differences may.
  off = jnp.where(value < _COLD, jnp.maximum(most, _LEAST), 0.0)
  return (logits - off) / value


def best_only(logits: Logits) -> Logits:
  """Returns 0 at the best token, the lower id among equals, and -inf elsewhere."""
  ids = jnp.arange(logits.shape[-1])
  return jnp.where(ids == best(logits)[..., None], 0.0, -jnp.inf)


def top_k(logits: Logits, k: int | Int[Array, "B 1 1"]) -> Logits:
  """Returns the logits, -inf outside the best k; k of 0 keeps all."""
  k = jnp.where(k > 0, k, logits.shape[-1]).astype(jnp.float32)
  keep = _best(logits, jnp.ones_like(logits), k)
  return jnp.where(keep, logits, -jnp.inf)


def top_p(
  logits: Logits, p: float | Float[Array, "B 1 1"], *, crossing: bool = True
) -> Logits:
  """Returns the logits, -inf outside the nucleus; p of 1 keeps all."""
  weight = jax.nn.softmax(logits)
  keep = _best(logits, weight, p)
  if not crossing:
    keep = _without_last(logits, weight, keep, p)
  return jnp.where(keep | (p >= 1.0), logits, -jnp.inf)


def min_p(logits: Logits, p: float | Float[Array, "B 1 1"]) -> Logits:
  """Returns the logits, -inf where a token's probability is under p max p."""
  least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
  return jnp.where(logits >= least, logits, -jnp.inf)


def penalised(
  logits: Logits,
  counts: Int[Array, "B 1 V"],
  written: Counts = None,
  *,
  repetition: float | Float[Array, "B 1 1"] = 1.0,
  presence: float | Float[Array, "B 1 1"] = 0.0,
  frequency: float | Float[Array, "B 1 1"] = 0.0,
) -> Logits:
  """Returns the logits, those of tokens that stand in the row made smaller.

  First l / repetition where l > 0 and l * repetition elsewhere, of all tokens of
  the row; then l - presence - frequency * count, of those that were written, as
  OpenAI's interface has it: c = count, l - c frequency - (c > 0) presence.

  Args:
    logits: of a chunk.
    counts: how often each token stands in its row.
    written: the same without what was given; None for no such penalty.
    repetition: above 0; 1 for none.
    presence: nats; 0 for none.
    frequency: nats for each time; 0 for none.
  """
  smaller = jnp.where(logits > 0, logits / repetition, logits * repetition)
  known = (counts > 0) & jnp.isfinite(logits)
  logits = jnp.where(known, jnp.clip(smaller, _LEAST, -_LEAST), logits)
  if written is None:
    return logits
  return logits - jnp.where(written > 0, presence + frequency * written, 0.0)


def _among(tokens: tuple[int, ...], logits: Logits) -> Bool[Array, "V"]:
  ids = jnp.arange(logits.shape[-1])
  return jnp.any(ids[:, None] == jnp.array(tokens, jnp.int32), axis=-1)


def _without_last(logits, p, keep, target):
  """Returns a nucleus less the token that crosses the target."""
  inside = jnp.sum(jnp.where(keep, p, 0.0), axis=-1, keepdims=True)
  worst = jnp.min(jnp.where(keep, logits, jnp.inf), axis=-1, keepdims=True)
  last = keep & (logits == worst)
  # Of equal ones the highest id is the last.
  last &= jnp.cumsum(last, axis=-1) == jnp.sum(last, axis=-1, keepdims=True)
  several = jnp.sum(keep, axis=-1, keepdims=True) > 1
  return keep & ~(last & several & (inside > target))


def _best(
  logits: Logits,
  weight: Float[Array, "B c V"],
  target: float | Float[Array, "B 1 1"],
) -> Bool[Array, "B c V"]:
  """Returns the fewest best tokens whose weights sum to `target` or more.

  Bisects over the integers that order float32 numbers, so that 32 halvings
  reach the exact logit at which the target is met; equal ones are then taken by
  id.
  """
  bits = lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
  order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # Monotone in the float.

  def mass(threshold):
    kept = jnp.where(order >= threshold, weight, 0.0)
    return jnp.sum(kept, axis=-1, keepdims=True)

  def halve(_, bounds):
    low, high = bounds
    middle = (low | high) - ((low ^ high) >> 1)  # Rounded up, no overflow.
    enough = mass(middle) >= target
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  bounds = (
    jnp.min(order, axis=-1, keepdims=True),
    jnp.max(order, axis=-1, keepdims=True),
  )
  threshold, _ = lax.fori_loop(0, 32, halve, bounds)
  above, tied = order > threshold, order == threshold
  missing = target - jnp.sum(jnp.where(above, weight, 0.0), -1, keepdims=True)
  earlier = (jnp.cumsum(tied, axis=-1) - 1) * weight
  return above | (tied & (earlier < missing))
