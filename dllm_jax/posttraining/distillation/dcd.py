r"""DCD: discrete consistency distillation of uniform diffusion (arXiv:2506.10892).

Uniform diffusion of tokens is the argmax of Gaussian diffusion of their one-hot
vectors, e the tokens' and epsilon the noise's:

    z_t = argmax_v [ sqrt(sigmoid(-gamma_t)) e_x + sqrt(sigmoid(gamma_t)) epsilon ]_v

With one epsilon for all times that is a deterministic path of tokens, and one
network can be taught at z_t what another one says at z_s, s = t - delta, nearer
to the text:

    L = mean_i KL( p_student(. | z_t)_i || p_teacher(. | z_s)_i )

with gradients through the student only. delta doubles every round, and the
teacher of a round is the student of its start: 2^k delta steps in one.

No vector over the vocabulary is drawn. z_t depends on epsilon by three numbers a
position: epsilon_x, the largest of the others, and which token has that; the
last is uniform, whatever the first two are.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.types import (
  Batch,
  Denoise,
  Denoiser,
  Loss,
  ModelInputs,
  Objective,
  Process,
)
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.base import check_choice
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.posttraining.objective import InPlaceOf

Divergence = Literal["reverse", "forward"]
Teacher = Literal["newest", "averaged"]

_NODES = 257  # of the quadrature
_REACH = 8.0  # standard deviations on either side; beyond lie 1e-15


class Latents(NamedTuple):
  """All that z_t of every t needs of Gaussian noise over the vocabulary.

  Attributes:
    own: the noise of the clean token.
    best: the largest noise of another one.
    other: which token that is.
  """

  own: Float[Array, "B L"]
  best: Float[Array, "B L"]
  other: Int[Array, "B L"]


@struct.dataclass
class Path:
  """Two points of a path, and where they lie.

  Attributes:
    t: the later time.
    s: the earlier one.
    z_t: the tokens at t.
    z_s: the tokens at s.
  """

  t: Float[Array, "B 1"]
  s: Float[Array, "B 1"]
  z_t: Int[Array, "B L"]
  z_s: Int[Array, "B L"]


def draw_latents(
  key: Key[Array, ""], x0: Int[Array, "B L"], vocab_size: int
) -> Latents:
  """Returns what Gaussian noise over the vocabulary says at each position.

  The largest of n normal numbers is that whose distribution function is u^(1/n),
  u uniform; by its upper tail, which float32 resolves.
  """
  key_own, key_best, key_other = jax.random.split(key, 3)
  u = jax.random.uniform(key_best, x0.shape, minval=1e-7, maxval=1.0)
  tail = -jnp.expm1(jnp.log(u) / (vocab_size - 1))
  other = jax.random.randint(key_other, x0.shape, 0, vocab_size - 1)
  return Latents(
    own=jax.random.normal(key_own, x0.shape),
    best=-ndtri(tail),
    other=(other + (other >= x0)).astype(jnp.int32),
  )


def tokens_at(
  latents: Latents, x0: Int[Array, "B L"], gamma: Float[Array, "B #L"]
) -> Int[Array, "B L"]:
  """Returns z: the argmax of a latent whose log noise-to-signal is gamma."""
  signal = jnp.sqrt(jax.nn.sigmoid(-gamma))
  noise = jnp.sqrt(jax.nn.sigmoid(gamma))
  kept = signal + noise * latents.own > noise * latents.best
  return jnp.where(kept, x0, latents.other)


def kept_probability(
  gamma: Float[Array, "*n"], vocab_size: int
) -> Float[Array, "*n"]:
  r"""Returns P(gamma), the probability that the argmax is the clean token.

      P(gamma) = int phi(z - exp(-gamma / 2)) Phi(z)^(V - 1) dz

  (arXiv:2506.10892, eq. 10), by the trapezium rule, whose error falls faster
  than any power of the step where the integrand vanishes at both ends.
  """
  offset = jnp.linspace(-_REACH, _REACH, _NODES)
  step = 2.0 * _REACH / (_NODES - 1)
  z = jnp.exp(-gamma / 2.0)[..., None] + offset
  log_p = -0.5 * offset**2 + (vocab_size - 1) * log_ndtr(z)
  return step / math.sqrt(2.0 * math.pi) * jnp.sum(jnp.exp(log_p), axis=-1)


def alpha_of(kept: Float[Array, "*n"], vocab_size: int) -> Float[Array, "*n"]:
  """Returns alpha, for tokens that are kept, by chance or not, so often.

  A token is kept with alpha, and else any of V: P = alpha + (1 - alpha) / V.
  """
  return (vocab_size * kept - 1.0) / (vocab_size - 1.0)


def divergence(
  kind: Divergence,
  log_student: Float[Array, "*n V"],
  log_teacher: Float[Array, "*n V"],
) -> Float[Array, "*n"]:
  """Returns KL(student || teacher) if "reverse", else the other way, nats."""
  if kind == "forward":
    log_p, log_q = log_teacher, log_student
  else:
    log_p, log_q = log_student, log_teacher
  p = jnp.exp(log_p)
  return jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCD:
  """Discrete consistency distillation (Sahoo et al. 2025).

  Attributes:
    steps: T: the first round's delta is 1 / T.
    round_steps: training steps of a round, after which delta doubles and the
      student becomes the teacher.
    divergence: "reverse" is KL(student || teacher), "forward" the other.
    teacher: whether a round's teacher is the student as it is, or its average.
    gamma_min: gamma at time 0.
    gamma_max: gamma at time 1.
  """

  steps: int = 512
  round_steps: int = 10_000
  divergence: Divergence = "reverse"
  teacher: Teacher = "newest"
  gamma_min: float = -4.0
  gamma_max: float = -1.0

  def __post_init__(self):
    check.at_least(self, 1, "steps", "round_steps", prefix="dcd.")
    check_choice("dcd.divergence", self.divergence, Divergence)
    check_choice("dcd.teacher", self.teacher, Teacher)
    if self.gamma_min >= self.gamma_max:
      raise ValueError(
        f"dcd.gamma_min {self.gamma_min} must be below dcd.gamma_max "
        f"{self.gamma_max}"
      )

  def check(self, objective: Objective) -> None:
    """Checks that a network can be distilled so.

    Raises:
      ValueError: it is no uniform diffusion.
    """
    if not isinstance(objective, UDLM):
      raise ValueError(
        "dcd is for uniform diffusion (objective.name udlm), which "
        f"{type(objective).__name__} is not; masked diffusion is distilled by "
        "--method=dparallel or d3llm"
      )

  def delta(self, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns t - s at a training step: 2^round / T, at most 1."""
    doubled = jnp.exp2(step // self.round_steps)
    return jnp.minimum(doubled / self.steps, 1.0).astype(jnp.float32)

  def gamma(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the log noise-to-signal ratio at a time, linear in it."""
    return self.gamma_min + t * (self.gamma_max - self.gamma_min)

  def times(
    self, t: Float[Array, "B 1"], step: Int[Array, ""]
  ) -> tuple[Float[Array, "B 1"], Float[Array, "B 1"]]:
    """Returns (t, s) of evenly spread times: t moved up by delta, s below it."""
    delta = self.delta(step)
    t = jnp.clip(t + delta, 0.0, 1.0)
    return t, t - delta

  def path(
    self,
    latents: Latents,
    x0: Int[Array, "B L"],
    times: tuple[Float[Array, "B 1"], Float[Array, "B 1"]],
  ) -> Path:
    """Returns the tokens at two times of one path."""
    t, s = times
    at = lambda time: tokens_at(latents, x0, self.gamma(time))
    return Path(t=t, s=s, z_t=at(t), z_s=at(s))

  def sigma(
    self, t: Float[Array, "B 1"], vocab_size: int
  ) -> Float[Array, "B 1"]:
    """Returns -log alpha, what the network is told of a time of the path."""
    kept = kept_probability(self.gamma(t), vocab_size)
    return -jnp.log(alpha_of(kept, vocab_size))

  def inputs(
    self,
    objective: Objective,
    process: Process,
    z: Int[Array, "B L"],
    t: Float[Array, "B 1"],
    batch: Batch,
  ) -> ModelInputs:
    """Returns what a network sees at a time of the path."""
    inputs = objective.inputs(process, z, t, batch)
    if inputs.conditioning is None:
      return inputs
    return inputs.replace(conditioning=self.sigma(t, objective.vocab_size))

  def terms(
    self,
    objective: Objective,
    process: Process,
    student: Denoise,
    teacher: Denoise,
    path: Path,
    batch: Batch,
  ) -> Float[Array, "B L"]:
    """Returns the divergence at each position, nats."""
    there = self.inputs(objective, process, path.z_t, path.t, batch)
    here = self.inputs(objective, process, path.z_s, path.s, batch)
    said = jax.lax.stop_gradient(teacher(here))

    def compare(logits, z_t, z_s, t, s):
      log_student = objective.log_x0(process, logits[0], z_t, t)
      log_teacher = objective.log_x0(process, logits[1], z_s, s)
      return divergence(self.divergence, log_student, log_teacher)

    outs = student(there), said
    at = path.z_t, path.z_s, path.t, path.s
    return reduce(compare, outs, *at, live=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Consistent(InPlaceOf):
  """The loss of the method; `Process.constants` are the teacher's parameters.

  Attributes:
    denoiser: the network, of student and teacher.
    method: how it is distilled.
  """

  denoiser: Denoiser
  method: DCD

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Path:
    """Returns two points of a path; tokens that do not count stay clean."""
    key_t, key_z = jax.random.split(key)
    objective, x0 = self.objective, batch.tokens
    times = self.method.times(objective.time(key_t, x0.shape), step)
    latents = draw_latents(key_z, x0, objective.vocab_size)
    path = self.method.path(latents, x0, times)
    clean = lambda z: jnp.where(batch.loss_mask, z, x0)
    return path.replace(z_t=clean(path.z_t), z_s=clean(path.z_s))

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: Path,
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the summed divergence of tokens that count; the bound is 0."""
    params = process.constants
    terms = self.method.terms(
      self.objective,
      process.replace(constants={}),
      denoise,
      lambda inputs: self.denoiser.apply(params, inputs, None)[0],
      drawn,
      batch,
    )
    counts = batch.loss_mask.astype(jnp.float32)
    return Loss(
      total=jnp.sum(counts * terms),
      weight=jnp.sum(counts),
      bound=jnp.zeros_like(terms),
      metrics={"delta": self.method.delta(step)},
    )
