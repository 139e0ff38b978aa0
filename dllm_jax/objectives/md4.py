r"""MD4: simplified masked diffusion with clipped schedules (arXiv:2406.04329).

The process and the network are those of `mdlm.py`; alpha runs from 1 - eps to
eps, times share one offset, and the bound has its two end terms. In discrete
time the weight T (alpha(s) - alpha(t)) / (1 - alpha(t)) is the paper's
T expm1(gamma(t) - gamma(s)) alpha(s) with gamma = logit alpha (eq. 8, negated).
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.core.noise import Tag
from dllm_jax.core.schedule import Linear, Schedule, SCHEDULES
from dllm_jax.core.time import TimeRule
from dllm_jax.core.types import (
  Loss,
)
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.base import check_choice, note
from dllm_jax.objectives.mdlm import MDLM

Draw = Literal["ancestral", "mean"]
Spacing = Literal["cosine", "uniform"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MD4(MDLM):
  """Simplified and generalised masked diffusion (Shi et al. 2024).

  Attributes:
    schedule: alpha(t), clipped at both ends: its `ceiling` is 1 - eps. `sine`
      is the paper's "cosine".
    time_rule: "shared_offset" is the published one.
    time_epsilon: training times lie in [time_epsilon, 1).
    time_conditioning: whether the network is told 1000 t.
    spacing: sampling times: cos(pi k / 2T), or even ones.
    reverse_draw: "ancestral" draws z_s at once; "mean" draws x0 for each mask
      and then which ones are revealed: the same law. (The paper's third
      sampler, "topp", is ancestral behind a top-p processor.)

  Examples:
    >>> md4 = MD4(vocab_size=5, mask_id=4)
    >>> [round(float(t), 3) for t in md4.grid(2)]  # cos(pi k / 2T)
    [1.0, 0.707, 0.0]
  """

  schedule: Schedule = dataclasses.field(
    default=Linear(floor=1e-4, ceiling=1.0 - 1e-4),
    metadata={"choices": SCHEDULES},
  )
  time_rule: TimeRule = "shared_offset"
  time_epsilon: float = 0.0
  time_conditioning: bool = True
  spacing: Spacing = "cosine"
  reverse_draw: Draw = "ancestral"

  def __post_init__(self):
    super().__post_init__()
    check_choice("spacing", self.spacing, Spacing)
    check_choice("reverse_draw", self.reverse_draw, Draw)
    if self.time_change != "none":
      raise ValueError(
        f"time_change {self.time_change!r} belongs to mdlm; md4 keeps none"
      )
    if not isinstance(self.schedule, Schedule) or self.schedule.ceiling >= 1.0:
      raise ValueError(
        "md4 needs a schedule with a ceiling below 1, such as 0.9999: its "
        "weights are infinite at t = 0 otherwise"
      )

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns 1000 t if the network is told the time."""
    return 1000.0 * t if self.time_conditioning else None

  def end_terms(self) -> Float[Array, ""]:
    r"""Returns reconstruction and prior terms, nats per token.

    (1 - alpha(0)) log V: a token that is masked at time 0 is guessed evenly;
    the published `loss_recon`. alpha(1) log V: one that is kept at time 1 is
    paid for under a prior that keeps as often and guesses evenly; the original
    drops it.
    """
    ends = self.schedule.masked(jnp.array([0.0, 1.0]))
    return (ends[0] + 1.0 - ends[1]) * jnp.log(self.vocab_size - 1.0)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of one network evaluation, end terms in the bound."""
    loss = super().loss(process, denoise, drawn, batch, step=step)
    ends = jnp.where(batch.loss_mask, self.end_terms(), 0.0)
    return loss.replace(bound=loss.bound + ends)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to 0; the last step removes every mask.

    Deviates: the original leaves masks with probability 1 - alpha(0) and takes
    their argmax afterwards, at the cost of a further evaluation.
    """
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    u = jnp.linspace(0.0, 1.0, steps + 1)
    times = jnp.cos(jnp.pi / 2.0 * u) if self.spacing == "cosine" else 1.0 - u
    return times.at[-1].set(0.0)

  def reverse(
    self, process, noise, out, z, t, s, *, reading=None, window=None
  ) -> Any:
    """Returns z_s, drawn as `reverse_draw` says."""
    if self.reverse_draw == "ancestral":
      return super().reverse(
        process, noise, out, z, t, s, reading=reading, window=window
      )

    def draw(logits, z, t, noise, rows):
      seen = logits if reading is None else reading.logits(logits, z, t, rows)
      log_q = self.log_x0(process, seen, z, t)
      token = noise.categorical(Tag.TOKEN, log_q)
      return token, note(reading, logits, z, rows, log_q, token)

    rows = None if reading is None else reading.rows
    x0, noted = reduce(draw, out, z, t, noise, rows, window=window)
    revealed = noise.uniform(Tag.TRANSFER, 1)[..., 0] >= self.stay(t, s)
    z = jnp.where((z == self.mask_id) & revealed, x0, z)
    return z if reading is None else (z, noted)
