r"""Diffusion-LM: Gaussian diffusion of word embeddings (arXiv:2205.14217).

Each token has a learned vector; x_start ~ N(emb(w), (1 - a_1) I) is diffused in T
steps, q(z_n | x_start) = N(sqrt(a_n) x_start, (1 - a_n) I), and the network
predicts x_start (or the noise). The loss of a token is, with means over features,

    |x_start - x_hat|^2  (|emb(w) - x_hat|^2 at n = 1)
    - log p(w | x_start) + |sqrt(a_T) x_start|^2,

the second term teaching the rounding and the third keeping embeddings small.
Latents are vectors: a step is Gaussian, with no `posterior` over tokens, and
`reverse` draws it. Time t is n / T; the published code's step is n - 1.
"""

import dataclasses
from typing import Any, Literal, Self

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.noise import Tag
from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import (
  Batch,
  Loss,
  ModelOutputs,
  Noise,
  Process,
)
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.objectives import rounding
from dllm_jax.objectives.base import check_choice, Discrete, TokenSpace
from dllm_jax.objectives.gaussian_steps import (
  divergence,
  implicit,
  Law,
  law,
  normal,
  prior_divergence,
  Spread,
  tables,
)
from dllm_jax.objectives.mixture import vocabulary_without_mask
from dllm_jax.objectives.texts import evenly

Parameterisation = Literal["x0", "epsilon"]
Predictor = Literal["ancestral", "ddim"]
Variance = Literal["large", "small"]
Readout = Literal["head", "distance"]

_SCALE = 1000.0
"""The network is told 1000 (n - 1) / T, whatever T is."""


@struct.dataclass
class Gaussian:
  """The randomness of a loss: no latents, which depend on the embeddings.

  Attributes:
    t: times, n / T.
    start: standard normal noise of x_start.
    noise: standard normal noise of z.
  """

  t: Float[Array, "B 1"]
  start: Float[Array, "B L E"]
  noise: Float[Array, "B L E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionLM(Discrete):
  """Diffusion-LM (Li et al. 2022).

  Attributes:
    features: features of an embedding (E).
    schedule: a_n: "sqrt" is 1 - sqrt(n / T + 1e-4), the published one.
    steps: T.
    parameterisation: the network predicts x_start ("x0") or the noise.
    predictor: the reverse step, "ancestral" or "ddim".
    eta: the noise of a DDIM step, 0 for none.
    clamp: the clamping trick: x_hat becomes its nearest embedding at each step.
    variance: of an ancestral step: beta_n ("large") or that of
      q(z_{n-1} | z_n, x_start) ("small").
    readout: log p(w | x): a linear head tied to the embeddings with a bias, or
      minus the "distance" to each.
    time_rule: how steps are drawn over the global batch.

  Examples:
    >>> lm = DiffusionLM(vocab_size=4, features=2, steps=10)
    >>> [float(t) for t in lm.grid(2)]
    [1.0, 0.5, 0.0]
  """

  features: int = 16
  schedule: Spread = "sqrt"
  steps: int = 2000
  parameterisation: Parameterisation = "x0"
  predictor: Predictor = "ancestral"
  eta: float = 0.0
  clamp: bool = True
  variance: Variance = "large"
  readout: Readout = "head"
  time_rule: TimeRule = "stratified"

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is not None:
      raise ValueError(
        f"Diffusion-LM has no mask: mask_id {self.mask_id} may not lie inside "
        f"its vocabulary of {self.vocab_size}; leave mask_id out"
      )
    if self.features < 1 or self.steps < 2:
      raise ValueError(
        "Diffusion-LM needs features of at least 1 and at least 2 steps (T), "
        f"not {self.features} and {self.steps}"
      )
    check.within("eta", self.eta, "[0, 1]")
    check_choice("schedule", self.schedule, Spread)
    check_choice("parameterisation", self.parameterisation, Parameterisation)
    check_choice("predictor", self.predictor, Predictor)
    check_choice("variance", self.variance, Variance)
    check_choice("readout", self.readout, Readout)
    check_choice("time rule", self.time_rule, TimeRule)

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, its mask left out."""
    return cls(
      vocab_size=vocabulary_without_mask(space, "Diffusion-LM"), **fields
    )

  def network_fields(self) -> dict[str, Any]:
    """Returns that the network maps vectors to vectors, told the time."""
    return {
      "conditioned": True,
      "latent_dim": self.features,
      "output_dim": self.features,
    }

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns embeddings ~ N(0, 1), the bias of the head, and the schedule."""
    shape = (self.vocab_size, self.features)
    return Process(
      params={
        "embedding": jax.random.normal(key, shape),
        "bias": jnp.zeros((self.vocab_size,)),
      },
      constants=tables(self.schedule, self.steps),
    )

  def step(self, t: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Returns the step n of time n / T, 0 for clean."""
    n = jnp.round(t * self.steps).astype(jnp.int32)
    return jnp.clip(n, 0, self.steps)

  def conditioning(self, t: Float[Array, "B #T"]) -> Array:
    """Returns 1000 (n - 1) / T."""
    return (self.step(t) - 1) * (_SCALE / self.steps)

  def start(
    self,
    process: Process,
    tokens: Int[Array, "B L"],
    noise: Float[Array, "B L E"],
  ) -> Float[Array, "B L E"]:
    """Returns x_start = emb(w) + sqrt(1 - a_1) noise."""
    spread = jnp.sqrt(process.constants["lost"][1])
    return self.clean(process, tokens) + spread * noise

  def noisy(
    self, process: Process, drawn: Gaussian, batch: Batch
  ) -> Float[Array, "B L E"]:
    """Returns z_n; unsupervised tokens stay at their embeddings."""
    kept, lost = (x[..., None] for x in self._levels(process, drawn.t))
    start = self.start(process, batch.tokens, drawn.start)
    z = jnp.sqrt(kept) * start + jnp.sqrt(lost) * drawn.noise
    clean = self.clean(process, batch.tokens)
    return jnp.where(batch.loss_mask[..., None], z, clean)

  def _levels(self, process, t):
    """Returns a_n and 1 - a_n of times."""
    n, tables = self.step(t), process.constants
    return tables["kept"][n], tables["lost"][n]

  def draw(self, process, key, batch, *, step) -> Gaussian:
    """Returns one uniform n in 1 ... T a row, and noise."""
    key_t, key_start, key_noise = jax.random.split(key, 3)
    u = draw_times(key_t, (batch.tokens.shape[0], 1), self.time_rule)
    shape = (*batch.tokens.shape, self.features)
    return Gaussian(
      t=(jnp.floor(u * self.steps) + 1.0) / self.steps,
      start=jax.random.normal(key_start, shape),
      noise=jax.random.normal(key_noise, shape),
    )

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns error, rounding and end terms of one network evaluation.

    The bound is that of the model with a Gaussian p(x_start | z_1) of variance
    1 - a_1, in nats per token.
    """
    t, supervised = drawn.t, evenly(batch.loss_mask)
    row = 1.0 if batch.loss_weight is None else batch.loss_weight[:, None]
    weight = supervised * row
    mean = self.clean(process, batch.tokens)
    start = self.start(process, batch.tokens, drawn.start)
    z = self.noisy(process, drawn, batch)
    said = denoise(self.inputs(process, z, t, batch)).hidden
    guess = self.x_start(process, said, z, t)
    target = start if self.parameterisation == "x0" else drawn.noise
    average = lambda x: jnp.mean(jnp.square(x), axis=-1)
    first = self.step(t) == 1
    error = jnp.where(first, average(mean - guess), average(target - said))
    end = process.constants["kept"][-1] * average(start)
    said_back, nats = cross_entropy(
      rounding.head(process.params, start), batch.tokens, weight
    )
    bound = nats + jax.lax.stop_gradient(
      prior_divergence(process.constants, start)
      + self.steps * self.divergence(process, mean, start, guess, t)
    )
    return Loss(
      total=jnp.sum(weight * (error + end)) + said_back,
      weight=jnp.sum(weight),
      bound=supervised * bound,
      metrics={
        "error": jnp.mean(error, where=batch.loss_mask),
        "rounding": jnp.mean(nats, where=batch.loss_mask),
        "end": jnp.mean(end, where=batch.loss_mask),
      },
    )

  def divergence(
    self,
    process: Process,
    mean: Float[Array, "B L E"],
    start: Float[Array, "B L E"],
    guess: Float[Array, "B L E"],
    t: Float[Array, "B 1"],
  ) -> Float[Array, "B L"]:
    """Returns one step's term of the bound, nats per token.

    At n = 1, whose step ends in x_start, log q(x_start | w) - log p(x_start | z_1).
    """
    n = self.step(t)
    one = law(process.constants, n, n - 1)
    spread = process.constants["lost"][1]
    total = lambda x: jnp.sum(jnp.square(x), axis=-1)
    last = (total(start - guess) - total(start - mean)) / (2.0 * spread)
    step = divergence(one, self._variance(one), start - guess)
    return jnp.where(n == 1, last, step)

  def x_start(
    self,
    process: Process,
    said: Float[Array, "B L E"],
    z: Float[Array, "B L E"],
    t: Float[Array, "B #L"],
  ) -> Float[Array, "B L E"]:
    """Returns the x_start that the network's output says, float32."""
    said = said.astype(jnp.float32)
    if self.parameterisation == "x0":
      return said
    kept, lost = (x[..., None] for x in self._levels(process, t))
    return (z - jnp.sqrt(lost) * said) / jnp.sqrt(kept)

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns log p(w | x_hat); the network's vectors stand for logits."""
    guess = self.x_start(process, logits, z, t)
    params = process.params
    if self.readout == "distance":
      return rounding.log_by_distance(params, guess)
    return jax.nn.log_softmax(guess @ params["embedding"].T + params["bias"])

  def clean(self, process, tokens) -> Float[Array, "B T E"]:
    """Returns the embeddings of tokens."""
    return process.params["embedding"][tokens]

  def decode(self, process, z) -> Int[Array, "B T"]:
    """Returns the most probable tokens."""
    if self.readout == "distance":
      return rounding.nearest(process.params, z)
    return rounding.best(rounding.head(process.params, z))

  def prior(self, noise, shape) -> Float[Array, "B T E"]:
    """Returns standard normal vectors."""
    return jnp.broadcast_to(
      normal(noise, Tag.PRIOR, self.features), (*shape, self.features)
    )

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to 0, each a multiple of 1 / T."""
    if not 1 <= steps <= self.steps:
      raise ValueError(
        f"Diffusion-LM samples in 1 to T = {self.steps} steps, not {steps}"
      )
    return jnp.round(jnp.linspace(self.steps, 0, steps + 1)) / self.steps

  def _variance(self, one: Law) -> Float[Array, "*n"]:
    """Returns the variance of p; a step to time 0 has beta, to divide by."""
    if self.variance == "large":
      return one.large
    return jnp.where(one.variance > 0, one.variance, one.large)

  def step_law(
    self,
    process: Process,
    out: ModelOutputs,
    z: Float[Array, "B T E"],
    t: Float[Array, "B #T"],
    s: Float[Array, "B #T"],
    *,
    window: Int[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B #T 1"]]:
    """Returns mean and variance of p(z_s | z_t)."""
    said = out.hidden
    if window is not None:
      index = jnp.maximum(window, 0)[..., None]
      said = jnp.take_along_axis(said, index, axis=1)
    guess = self.x_start(process, said, z, t)
    if self.clamp:
      guess = self.clean(process, rounding.nearest(process.params, guess))
    n, m = self.step(t), self.step(s)
    if self.predictor == "ancestral":
      one = law(process.constants, n, m)
      one = one._replace(variance=self._variance(one))
    else:
      one = implicit(process.constants, n, m, self.eta)
    of_x, of_z, variance, _ = (x[..., None] for x in one)
    return of_x * guess + of_z * z, variance

  def perturb(
    self,
    noise: Noise,
    mean: Float[Array, "B T E"],
    variance: Float[Array, "B #T 1"],
    s: Float[Array, "B #T"],
  ) -> Float[Array, "B T E"]:
    """Returns a draw around a mean; the step to time 0 adds no noise."""
    draw = normal(noise, Tag.TOKEN, self.features)
    spread = jnp.where(s[..., None] > 0, jnp.sqrt(variance), 0.0)
    return mean + spread * draw

  def reverse(
    self, process, noise, out, z, t, s, *, reading=None, window=None
  ) -> Any:
    """Returns z_s. No logits are drawn from, so that a `reading` has no part."""
    mean, variance = self.step_law(process, out, z, t, s, window=window)
    z = self.perturb(noise, mean, variance, s)
    return z if reading is None else (z, {})
