r"""A likelihood bound for networks that restore uniform noise and see no time.

Such a network errs at t -> 0 as it does elsewhere, and the integrand I(t) of uniform
diffusion (`udlm`, arXiv:2412.10193, eq. 18) then grows as 1 / t: the integral from 0
is infinite, and what is left of it from some e on is no bound. So the reverse process
ends at a time S > 0, by a draw of all tokens at once from p(x0 | z_S), as samplers
end it; the variational bound of that is

    -log p(x0) <= E[-log p(x0 | z_S)] + int_S^T I(t) dt + KL(q(z_T | x0) || uniform)

with T = 1 - e. It holds for each S, and so on average over S ~ U(e, c). With P(S < t)
and the density w(t) of S that is, by one call of the network at t ~ U(e, T),

    (1 - 2e) E_t[ P(S < t) I(t) - w(t) log p(x0 | z_t) ] + KL,

whose terms are bounded where those of I alone are not.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.types import Process
from dllm_jax.objectives.mixture import noise_alone, parts_divergence
from dllm_jax.objectives.udlm import UDLM

LATEST = 0.1
"""c, the last time at which a reverse process ends, or 2 e where that is later."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyEnd:
  """The bound over a uniform process, of times in [epsilon, 1 - epsilon).

  Attributes:
    uniform: the process; it has I(t).
    epsilon: e, above 0.
  """

  uniform: UDLM
  epsilon: float

  def token_bound(
    self,
    process: Process,
    given: Float[Array, "B c V"],
    alone: Float[Array, "B c V"],
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c"]:
    """Returns the bound's term at a uniform time, nats per token.

    Args:
      process: arrays of the process.
      given: logits of x0_i given all of z.
      alone: logits of x0_i given the other slots of z: they are the same claim.
      x0: clean tokens.
      z: corrupted ones.
      t: times in [epsilon, 1 - epsilon).
    """
    first, u = self.epsilon, self.uniform
    reach = max(LATEST, 2 * first) - first
    before = jnp.clip((t - first) / reach, 0.0, 1.0)
    density = jnp.where(t < first + reach, 1.0 / reach, 0.0)
    log_p = jax.nn.log_softmax(given)
    log_p = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    rate = u.token_loss(process, alone, x0, z, t)
    end = u.parts(jnp.asarray(1.0 - first))
    prior = parts_divergence(end, noise_alone(end), u.vocab_size, None)
    return (1.0 - 2.0 * first) * (before * rate - density * log_p) + prior
