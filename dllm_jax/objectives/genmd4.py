r"""GenMD4: masked diffusion whose schedule is learned for each token.

Token v is kept with alpha_v(t) = 1 - (1 - eps) t^w_v, w_v = softplus(omega_v)
(arXiv:2406.04329, sec. 6); omega is `Process.params`. The bound weighs
vocabulary components, not positions:

    L(z) = (1 / t) sum_{i masked} [ sum_v w_v p_iv - w_x0 (log p_i,x0 + 1) ]

and the draw of z depends on omega, so its gradient needs a score-function term:
leave-one-out over two corruptions at one time (eq. 11). The published code has
no sampler; the one here is derived from the same process.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import Loss, ModelOutputs, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.base import check_choice, corrupt_to, Discrete, subs


@struct.dataclass
class Pair:
  """The randomness of a loss: two corruptions at one time.

  Attributes:
    t: times.
    z: corrupted rows.
    z2: other corruptions of the same rows.
  """

  t: Float[Array, "B 1"]
  z: Int[Array, "B L"]
  z2: Int[Array, "B L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenMD4(Discrete):
  """Generalised masked diffusion (Shi et al. 2024).

  Attributes:
    epsilon: alpha_v(1), the same for all tokens.
    power: w_v at the start; 1 is the linear schedule.
    time_epsilon: training times lie in [time_epsilon, 1); what is masked
      earlier is the reconstruction term.
    time_rule: how training times are drawn over the global batch.
    time_conditioning: whether the network is told 1000 t.

  Examples:
    >>> import jax
    >>> genmd4 = GenMD4(vocab_size=5, mask_id=4, power=2.0)
    >>> process = genmd4.init(jax.random.key(0))
    >>> [round(float(w), 3) for w in genmd4.powers(process)]  # to be learned
    [2.0, 2.0, 2.0, 2.0, 2.0]
  """

  epsilon: float = 1e-4
  power: float = 1.0
  time_epsilon: float = 1e-3
  time_rule: TimeRule = "shared_offset"
  time_conditioning: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("masked diffusion needs a mask_id")
    if not 0.0 < self.epsilon < 1.0 or not 0.0 < self.time_epsilon < 1.0:
      raise ValueError(
        "epsilon and time_epsilon must lie in (0, 1), not "
        f"{self.epsilon} and {self.time_epsilon}"
      )
    if self.power <= 0.0:
      raise ValueError(f"power must be above 0, not {self.power}")
    check_choice("time rule", self.time_rule, TimeRule)

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns omega, the same for all tokens: softplus(omega) = power."""
    omega = jnp.log(jnp.expm1(jnp.float32(self.power)))
    return Process(params={"omega": jnp.full((self.vocab_size,), omega)})

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns 1000 t if the network is told the time."""
    return 1000.0 * t if self.time_conditioning else None

  def powers(self, process: Process) -> Float[Array, "V"]:
    """Returns w of every token."""
    return jax.nn.softplus(process.params["omega"])

  def masked(
    self, w: Float[Array, "*n"], t: Float[Array, "*n"]
  ) -> Float[Array, "*n"]:
    """Returns 1 - alpha(t) for tokens with powers w."""
    return (1.0 - self.epsilon) * t**w

  def draw(self, process, key, batch, *, step) -> Pair:
    """Returns times and two corruptions; unsupervised tokens stay clean."""
    key_t, key_1, key_2 = jax.random.split(key, 3)
    x0 = batch.tokens
    u = draw_times(key_t, (x0.shape[0], 1), self.time_rule)
    t = (1.0 - self.time_epsilon) * u + self.time_epsilon
    rate = self.masked(self.powers(process)[x0], t)
    rate = jnp.where(batch.loss_mask, rate, 0.0)
    return Pair(
      t=t,
      z=corrupt_to(key_1, x0, rate, self.mask_id),
      z2=corrupt_to(key_2, x0, rate, self.mask_id),
    )

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    return self.masked(self.powers(process)[x0], t)

  def terms(
    self,
    process: Process,
    out: ModelOutputs,
    x0: Int[Array, "B L"],
    z: Int[Array, "B L"],
    t: Float[Array, "B 1"],
  ) -> Float[Array, "B L"]:
    """Returns each position's term of L(z), nats; 0 where z is not masked."""
    w = self.powers(process)

    def fn(logits, x0, z, t):
      is_mask = jnp.arange(self.vocab_size) == self.mask_id
      log_p = jax.nn.log_softmax(jnp.where(is_mask, -jnp.inf, logits))
      picked = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
      masked = z == self.mask_id
      picked = jnp.where(masked, picked, 0.0)  # x0 itself may be forbidden
      term = jnp.exp(log_p) @ w - w[x0] * (picked + 1.0)
      return jnp.where(masked, term / t, 0.0)

    return reduce(fn, out, x0, z, t)

  def log_q(
    self,
    process: Process,
    x0: Int[Array, "B L"],
    z: Int[Array, "B L"],
    t: Float[Array, "B 1"],
  ) -> Float[Array, "B L"]:
    """Returns log q(z_t | x0) of each position, nats."""
    w = self.powers(process)[x0]
    log_masked = jnp.log1p(-self.epsilon) + w * jnp.log(t)
    log_kept = jnp.log1p(-self.masked(w, t))
    return jnp.where(z == self.mask_id, log_masked, log_kept)

  def reconstruction(
    self, process: Process, x0: Int[Array, "B L"]
  ) -> Float[Array, "B L"]:
    r"""Returns the reconstruction term at t_1 = time_epsilon, nats.

    -(1 - eps) t_1^w_x0 log [ t_1^w_x0 / sum_v t_1^w_v ]: a token that is masked
    at t_1 is guessed in proportion to how often tokens are.
    """
    w = self.powers(process)
    log_t = jnp.log(self.time_epsilon)
    is_mask = jnp.arange(self.vocab_size) == self.mask_id
    total = jax.nn.logsumexp(jnp.where(is_mask, -jnp.inf, w * log_t))
    mine = w[x0] * log_t
    return -(1.0 - self.epsilon) * jnp.exp(mine) * (mine - total)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the mean of two corruptions, with the leave-one-out gradient."""
    x0, t = batch.tokens, drawn.t
    row = batch.loss_weight
    row = jnp.ones(x0.shape[:1]) if row is None else row
    keep = lambda x: jnp.where(batch.loss_mask, x, 0.0)
    pair = []
    for z in (drawn.z, drawn.z2):
      out = denoise(self.inputs(process, z, t, batch))
      terms = keep(self.terms(process, out, x0, z, t))
      pair.append((terms, keep(self.log_q(process, x0, z, t))))
    (first, q_first), (second, q_second) = pair
    end = keep(self.reconstruction(process, x0))
    sums = lambda x: jnp.sum(x, axis=1)
    signal = jax.lax.stop_gradient(sums(first - second))
    # Its value is no part of the bound: only its gradient counts.
    reinforce = 0.5 * signal * sums(q_first - q_second)
    reinforce -= jax.lax.stop_gradient(reinforce)
    per_row = sums(0.5 * (first + second) + end) + reinforce
    # Deviates: alpha_v(1) = eps is paid for under a prior that guesses evenly;
    # the original drops this term.
    prior = keep(self.epsilon * jnp.log(self.vocab_size - 1.0))
    return Loss(
      total=jnp.sum(row * per_row),
      weight=jnp.sum(row * sums(batch.loss_mask)),
      bound=jax.lax.stop_gradient(0.5 * (first + second) + end + prior),
      metrics={
        "corrupted": jnp.mean(drawn.z != x0, where=batch.loss_mask),
        "mean_power": jnp.mean(self.powers(process)),
      },
    )

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns SUBS log-probabilities."""
    return subs(logits, z, self.mask_id)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    r"""Returns log p(z_s | z_t).

    With v ~ p_i, a mask becomes v with probability
    (alpha_v(s) - alpha_v(t)) / (1 - alpha_v(t)) = 1 - (s / t)^w_v, else it
    stays.
    """
    w = self.powers(process)
    ratio = jnp.where(s > 0.0, s / t, 0.0)[..., None] ** w
    log_x0 = self.log_x0(process, logits, z, t)
    is_mask = jnp.arange(self.vocab_size) == self.mask_id
    # A token's w must not let the mask, which has probability 0, be 0 * inf.
    stay = jnp.sum(jnp.exp(log_x0) * ratio, axis=-1, keepdims=True)
    moved = jnp.log1p(-jnp.where(is_mask, 0.0, ratio)) + log_x0
    revealed = jnp.where(is_mask, jnp.log(stay), moved)
    return jnp.where((z == self.mask_id)[..., None], revealed, log_x0)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to 0, as MD4's cosine spacing."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    times = jnp.cos(jnp.pi / 2.0 * jnp.linspace(0.0, 1.0, steps + 1))
    return times.at[-1].set(0.0)
