r"""BD3-LM: block diffusion, autoregressive over blocks (arXiv:2503.09573).

Blocks of B tokens are diffused one after another, each given the clean ones
before it. All of them train in one pass over two streams, [z ; x0], under the
mask `TwoStream`; each block has its own time. Times may be clipped to an
interval in which the loss varies least, found on held-out text; its ends are
`Process.state`, so that moving them compiles nothing. Block 1 is autoregressive,
block L is MDLM. Families that came after it differ by fields.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core.mask import (
  BlockCausal,
  Causal,
  decided_first,
  Full,
  MaskSpec,
  TwoStream,
)
from dllm_jax.core.schedule import (
  Cosine,
  Linear,
  Polynomial,
  Schedule,
  SCHEDULES,
  Times,
)
from dllm_jax.core.time import draw_times
from dllm_jax.core.types import (
  Batch,
  Loss,
  ModelInputs,
  ModelOutputs,
  Process,
)
from dllm_jax.objectives.base import (
  check_choice,
  Discrete,
  Drawn,
  TokenSpace,
)
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.texts import Fill, with_one_masked

_LEAST = 1e-3
"""What the original adds to small mask probabilities, schedule by schedule."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Polynomial):
  """1 - alpha(t) = max(t^2, 1e-3), the original's "square"."""

  power: float = 2.0

  def masked(self, t: Times) -> Times:
    """Returns 1 - alpha(t)."""
    return jnp.maximum(super().masked(t), _LEAST)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareRoot(Square):
  """1 - alpha(t) = max(t^(1/2), 1e-3), the original's "square_root"."""

  power: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCosine(Cosine):
  """1 - alpha(t) = 1 - (1 - 1e-3) cos(pi t / 2), the original's "cosine"."""

  ceiling: float = 1.0 - _LEAST

  def weight(self, t: Times) -> Times:
    """Returns -alpha' / (1 - alpha + 1e-3), its own weight."""
    return -self.dalpha(t) / (self.masked(t) + _LEAST)


_SCHEDULES = SCHEDULES | {
  "square": Square,
  "square_root": SquareRoot,
  "block_cosine": BlockCosine,
}

Attention = Literal["block_causal", "causal_context", "decided_first"]

_REDRAWS = 32
"""Attempts to draw a block whose masked share lies in the clip interval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BD3LM(MDLM):
  """Block discrete denoising diffusion (Arriola et al. 2025).

  Attributes:
    length: tokens in a row (L).
    block_size: tokens in a block, a divisor of length.
    schedule: alpha(t); linear is the published one (`loglinear` there), and
      `Square`, `SquareRoot`, `Logarithmic` and `BlockCosine` are its others.
    clip_low: the least training time at the start; above 0.5 the weight is 1.
    clip_high: the greatest training time at the start.
    clip_search_widths: widths of the intervals that are compared at each
      evaluation while training, on held-out text; the one in which the loss
      varies least is then trained in. None: the interval stays.
    clip_search_delta: distance between the starts of those intervals.
    resample: whether blocks are drawn again until their masked share is in the
      clip interval too (an end at time_epsilon or 1 does not bind).
    ignore_bos: whether the first token of a row stays clean and counts nothing.
    attention: "block_causal": a block sees itself both ways, and earlier ones.
      "causal_context": but clean tokens read causally (Nemotron).
      "decided_first": causal, decided tokens before masks (WeDLM).
    opens: whether a block's first token is that of the pass that stores the last.
    times_of: whether blocks, or whole rows, have a time of their own.
    complement: whether rows are trained on again with the other tokens masked.
    delete_id, split_id: LLaDA2.2's tokens that delete and insert, or None.

  Examples:
    >>> bd3lm = BD3LM(vocab_size=5, mask_id=4, length=8, block_size=4)
    >>> bd3lm.block_length, bd3lm.exact
    (4, False)
    >>> bd3lm.with_blocks(1).exact  # autoregressive
    True
  """

  length: int
  block_size: int = 16
  schedule: Schedule = dataclasses.field(
    default=Linear(), metadata={"choices": _SCHEDULES}
  )
  clip_low: float = 1e-3
  clip_high: float = 1.0
  clip_search_widths: tuple[float, ...] = ()
  clip_search_delta: float = 0.05
  resample: bool = False
  ignore_bos: bool = False
  attention: Attention = "block_causal"
  opens: bool = False
  times_of: Literal["block", "row"] = "block"
  complement: bool = False
  delete_id: int | None = None
  split_id: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.block_size < 1 or self.length % self.block_size:
      raise ValueError(
        f"block_size {self.block_size} must be at least 1 and divide the "
        f"length {self.length}"
      )
    if not 0.0 <= self.clip_low < self.clip_high <= 1.0:
      raise ValueError(
        "clip_low and clip_high must be 0 <= low < high <= 1, not "
        f"{self.clip_low} and {self.clip_high}"
      )
    # A list, as JSON has it, would not be hashable.
    widths = tuple(self.clip_search_widths)
    object.__setattr__(self, "clip_search_widths", widths)
    if not all(0.0 < x <= 1.0 for x in (*widths, self.clip_search_delta)):
      raise ValueError(
        "clip_search_widths and clip_search_delta must lie in (0, 1], not "
        f"{widths} and {self.clip_search_delta}"
      )
    if self.steps is not None or self.time_change != "none":
      raise ValueError(
        "bd3lm is of continuous, unchanged time: leave steps None and "
        'time_change "none"'
      )
    if self.shift and not self.opens:
      raise ValueError(
        "bd3lm predicts each block's tokens from its own slots: leave shift 0,"
        " or set opens"
      )
    check_choice("attention", self.attention, Attention)
    check_choice("times_of", self.times_of, Literal["block", "row"])

  @classmethod
  def over(cls, space: TokenSpace, **fields) -> "BD3LM":
    """Returns the objective over a token space and its row length."""
    return cls(
      vocab_size=space.vocab_size,
      mask_id=space.mask_id,
      length=space.length,
      **fields,
    )

  @property
  def mask_spec(self) -> MaskSpec:
    """Clean blocks see themselves and earlier ones: how a canvas is sampled."""
    if self.attention == "decided_first":
      return Causal()
    if self.attention == "causal_context":  # what is stored is read otherwise
      return Full()
    return BlockCausal(self.block_size)

  @property
  def stored_spec(self) -> MaskSpec:
    """Who sees whom where finished tokens are stored."""
    return Causal() if self.attention == "causal_context" else self.mask_spec

  @property
  def block_length(self) -> int | None:
    """Slots that are sampled together: a block, where windows do not slide."""
    return None if self.attention == "decided_first" else self.block_size

  @property
  def exact(self) -> bool:
    """Whether blocks are single tokens: each is masked, every time."""
    return self.block_size == 1

  def with_blocks(self, size: int) -> "BD3LM":
    """Returns the objective with blocks of another size."""
    return dataclasses.replace(self, block_size=size)

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns the clip interval, `[low, high]`.

    With block 1 every time has the same expectation, the autoregressive
    likelihood, and t = 1 has no variance: the interval is that point.
    """
    return self.clipped(Process(), (self.clip_low, self.clip_high))

  def clipped(
    self, process: Process, interval: tuple[float, float] | Float[Array, "2"]
  ) -> Process:
    """Returns the process with another clip interval; nothing recompiles."""
    if self.block_size == 1:
      interval = (1.0, 1.0)
    clip = jnp.asarray(interval, jnp.float32)
    return process.replace(state={"clip": clip})

  def unbiased(self, process: Process) -> Process:
    """Returns the process with all times, on which the bound is a bound."""
    return self.clipped(process, (self.time_epsilon, 1.0))

  def block_times(
    self, process: Process, key: Key[Array, ""], shape: tuple[int, int]
  ) -> Float[Array, "B L"]:
    """Returns a time for each block, low-discrepancy over batch x blocks."""
    low, high = process.state["clip"]
    blocks = 1 if self.times_of == "row" else shape[1] // self.block_size
    u = draw_times(key, (shape[0], blocks), self.time_rule)
    t = (high - low) * u + low
    return jnp.repeat(t, shape[1] // blocks, axis=1)

  def draw(self, process, key, batch, *, step) -> Drawn:
    """Returns times and corrupted rows; unsupervised tokens stay clean."""
    x0 = batch.tokens
    key_t, key_z = jax.random.split(key)
    t = self.block_times(process, key_t, x0.shape)
    z = self.corrupt(process, key_z, x0, t)
    if self.resample:
      z = self._redraw(process, key_z, x0, t, z)
    batch = self.supervised(batch)
    z = jnp.where(batch.loss_mask, z, x0)
    if self.mask_at_least_one:
      z = with_one_masked(key, z, batch, self.mask_id)
    return Drawn(t=t, z=z)

  def _redraw(self, process, key, x0, t, z):
    """Returns z with blocks outside the clip interval drawn again."""
    low, high = process.state["clip"]

    def outside(z):
      blocks = z.reshape(z.shape[0], -1, self.block_size)
      share = jnp.mean(blocks == self.mask_id, axis=-1)
      out = (share < low) & (low > self.time_epsilon)
      out |= (share > high) & (high < 1.0)
      return jnp.repeat(out, self.block_size, axis=1)

    def body(carry):
      attempt, z = carry
      fresh = self.corrupt(process, jax.random.fold_in(key, attempt), x0, t)
      return attempt + 1, jnp.where(outside(z), fresh, z)

    def unfinished(carry):
      # A narrow interval may hold no multiple of 1 / block: give up at last.
      return (carry[0] < _REDRAWS) & jnp.any(outside(carry[1]))

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), z))[1]

  @classmethod
  def filling(cls, fields) -> Fill:
    """Returns what conversations have behind them: whole blocks."""
    return Fill(fields["fill"], fields["fill_to"] or fields["block_size"])

  def supervised(self, batch: Batch) -> Batch:
    """Returns the batch with all that counts."""
    batch = super().supervised(batch)
    if not self.ignore_bos:
      return batch
    return batch.replace(loss_mask=batch.loss_mask.at[:, 0].set(False))

  def two_streams(
    self, z: Int[Array, "B L"], t: Float[Array, "B L"], batch: Batch
  ) -> ModelInputs:
    """Returns what the network sees in training: [z ; x0], positions twice.

    A network that is told the time is told sigma(t) on the noisy half, 0 on the
    clean one.
    """
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    sigma = self.conditioning(t)
    if sigma is not None:
      sigma = jnp.broadcast_to(sigma, z.shape)
      sigma = jnp.concatenate([sigma, jnp.zeros_like(sigma)], axis=1)
    clean = None if self.attention == "block_causal" else 1
    extra = None
    if self.attention == "decided_first":
      extra = decided_first(twice(z == self.mask_id))
      extra |= jnp.arange(2 * z.shape[1]) >= z.shape[1]
    return ModelInputs(
      latent=jnp.concatenate([z, batch.tokens], axis=1),
      conditioning=sigma,
      positions=twice(batch.positions),
      segment_ids=twice(batch.segment_ids),
      cond=batch.cond,
      mask=TwoStream(z.shape[1], self.block_size, clean),
      extra_mask=extra,
    )

  def inputs(self, process, z, t, batch) -> ModelInputs:
    """Returns what the network sees for the latent z at time t."""
    inputs = super().inputs(process, z, t, batch)
    if self.attention != "decided_first":
      return inputs
    order = decided_first(z == self.mask_id)
    return inputs.replace(mask=Full(), extra_mask=order)

  def emphasis(self, process, z, t, batch) -> Float[Array, "B #L"]:
    """Returns MDLM's factor at each token's time; 1 under heavy masking."""
    factor = super().emphasis(process, z, t, batch)
    heavy = process.state["clip"][0] > 0.5
    return jnp.where(heavy, 1.0, factor)

  def outputs(self, process, denoise, drawn, batch) -> ModelOutputs:
    """Returns what the noisy one of two streams says."""
    out = denoise(self.two_streams(drawn.z, drawn.t, batch))
    return out.replace(hidden=out.hidden[:, : drawn.z.shape[1]])

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of one pass over two streams, or of two."""
    loss = super().loss(process, denoise, drawn, batch, step=step)
    if self.complement:
      supervised = self.supervised(batch)
      left = supervised.loss_mask & (drawn.z != self.mask_id)
      other = drawn.replace(z=jnp.where(left, self.mask_id, batch.tokens))
      more = super().loss(process, denoise, other, batch, step=step)
      loss = loss.replace(
        total=loss.total + more.total, weight=loss.weight + more.weight
      )
    low, high = process.state["clip"]
    ends = {"clip_low": low, "clip_high": high}
    return loss.replace(metrics={**loss.metrics, **ends})

  grid = Discrete.grid  # even times from 1 to 0, for each block

  @property
  def adapts(self) -> bool:
    """Whether the clip interval is searched while training."""
    return bool(self.clip_search_widths)

  def clip_candidates(self) -> Float[Array, "C 2"]:
    """Returns the intervals that a search compares: all times, then windows."""
    found = [(self.time_epsilon, 1.0)]
    for width in self.clip_search_widths:
      starts = int((1.0 - width) / self.clip_search_delta + 1e-6) + 1
      for i in range(starts):
        low = i * self.clip_search_delta
        found.append((max(low, self.time_epsilon), min(low + width, 1.0)))
    return jnp.array(found, jnp.float32)

  def measure(self, process, denoise, key, batch) -> Float[Array, "C"]:
    """Returns the variance of block losses under each candidate interval.

    The data-driven criterion (sec. 5.2): of the mean loss of every block of the
    batch, each at its own time in the interval. One network evaluation for each
    candidate.
    """
    step = jnp.zeros((), jnp.int32)

    def variance(candidate):
      trial = self.clipped(process, candidate)
      drawn = self.draw(trial, key, batch, step=step)
      loss = self.loss(trial, denoise, drawn, batch, step=step).bound
      # From the bound's weights to those of the loss.
      loss *= self.emphasis(trial, drawn.z, drawn.t, batch)
      loss /= self.weight(drawn.t)
      blocks = loss.reshape(loss.shape[0], -1, self.block_size)
      return jnp.var(jnp.mean(blocks, axis=-1), ddof=1)

    return jax.lax.map(variance, self.clip_candidates())

  def adapt(self, process: Process, measured: Float[Array, "C"]) -> Process:
    """Returns the process clipped to the interval of least summed variance."""
    return self.clipped(process, self.clip_candidates()[jnp.argmin(measured)])
