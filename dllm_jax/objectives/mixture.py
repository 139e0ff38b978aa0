r"""Corruption that keeps, masks or replaces a token, in closed form.

One family covers most published processes over tokens: with N real tokens,

    q(z_t | x0) = keep_t one(x0) + uniform_t u + mask_t one(m),   u = 1/N each,

and its jumps between two times have the same form. MDLM has no `uniform`, UDLM
no `mask`; D3PM's uniform and absorbing matrices, SEDD's two graphs and GIDD are
mixtures of both. No V x V matrix is ever built. Here are the arithmetic of
`Parts`; no loss of any one system.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Noise
from dllm_jax.objectives.base import TokenSpace

_NEVER = -1e30  # a log-probability that is 0 after exp, and finite


class Parts(NamedTuple):
  """The three probabilities of a token's fate, which sum to 1.

  Attributes:
    keep: it is copied.
    uniform: it is replaced by a uniform real token, itself included.
    mask: it is masked.
  """

  keep: Float[Array, "*n"]
  uniform: Float[Array, "*n"]
  mask: Float[Array, "*n"]


def real_tokens(vocab_size: int, mask_id: int | None) -> int:
  """Returns the number of tokens that are no mask (N)."""
  return vocab_size - (mask_id is not None)


def vocabulary_without_mask(space: TokenSpace, owner: str) -> int:
  """Returns the vocabulary of a process that has no mask token.

  Raises:
    ValueError: the mask is not the last id, so that it cannot be left out.
  """
  if space.mask_id is not None and space.mask_id != space.vocab_size - 1:
    raise ValueError(
      f"{owner} has no mask token, but mask id {space.mask_id} lies inside the "
      f"vocabulary of {space.vocab_size}: give the mask the last id"
    )
  return real_tokens(space.vocab_size, space.mask_id)


def safe_log(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns log x, -inf at 0, with a finite gradient there."""
  return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def finite_log(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
  """Returns log x, 0 at 0: for products with x."""
  return jnp.log(jnp.where(x > 0, x, 1.0))


def one_hot_log(x: Int[Array, "*n"], vocab_size: int) -> Float[Array, "*n V"]:
  """Returns log one(x): 0 at x, -inf elsewhere."""
  return jnp.where(jnp.arange(vocab_size) == x[..., None], 0.0, -jnp.inf)


def corrupt_by(
  key: Key[Array, ""],
  x0: Int[Array, "B L"],
  parts: Parts,
  vocab_size: int,
  mask_id: int | None,
) -> Int[Array, "B L"]:
  """Returns a draw of q(z | x0)."""
  key_fate, key_token = jax.random.split(key)
  u = jax.random.uniform(key_fate, x0.shape)
  n = real_tokens(vocab_size, mask_id)
  token = jax.random.randint(key_token, x0.shape, 0, n, jnp.int32)
  noise = token
  if mask_id is not None:
    token += token >= mask_id
    noise = jnp.where(u < parts.mask + parts.uniform, token, x0)
    return jnp.where(u < parts.mask, mask_id, noise)
  return jnp.where(u < parts.uniform, noise, x0)


def draw_prior(
  noise: Noise,
  shape: tuple[int, int],
  mask_share: float | Float[Array, ""],
  vocab_size: int,
  mask_id: int | None,
) -> Int[Array, "B T"]:
  """Returns masks with the given probability, else uniform real tokens."""
  u = noise.uniform(Tag.PRIOR, 2)
  n = real_tokens(vocab_size, mask_id)
  token = jnp.minimum((u[..., 0] * n).astype(jnp.int32), n - 1)
  if mask_id is not None:
    token += token >= mask_id
    token = jnp.where(u[..., 1] < mask_share, mask_id, token)
  return jnp.broadcast_to(token, shape)


def normalised(
  log_p: Float[Array, "*n V"], z: Int[Array, "*n"]
) -> Float[Array, "*n V"]:
  """Returns log-probabilities; where z cannot be, what copies it.

  A prompt's token that is still clean at time 1 is such a z: no step may make its
  row not a number.
  """
  possible = jnp.max(log_p, axis=-1, keepdims=True) > -jnp.inf
  safe = jnp.where(possible, log_p, one_hot_log(z, log_p.shape[-1]))
  return jax.nn.log_softmax(safe)


def noise_at(
  parts: Parts, z: Int[Array, "*n"], vocab_size: int, mask_id: int | None
) -> Float[Array, "*n"]:
  """Returns the probability that noise, not keeping, makes the token z."""
  each = parts.uniform / real_tokens(vocab_size, mask_id)
  return each if mask_id is None else jnp.where(z == mask_id, parts.mask, each)


def log_marginal(
  parts: Parts, log_p: Float[Array, "*n V"], mask_id: int | None
) -> Float[Array, "*n V"]:
  """Returns log q(z_t | x0 ~ p) of every token."""
  vocab_size = log_p.shape[-1]
  keep, uniform, mask = (safe_log(x)[..., None] for x in parts)
  # Logs of scalars, then a choice: a log of a whole array would be kept.
  noise = uniform - math.log(real_tokens(vocab_size, mask_id))
  if mask_id is not None:
    noise = jnp.where(jnp.arange(vocab_size) == mask_id, mask, noise)
  return jnp.logaddexp(keep + log_p, noise)


def log_tokens(
  parts: Parts, log_p: Float[Array, "*n V"], mask_id: int | None
) -> tuple[Float[Array, "*n V"], Float[Array, "*n"]]:
  """Returns log q(z_t | x0 ~ p) of real tokens, and its sum over them.

  The mask's entry is no probability. The sum is 0 without uniform noise.
  """
  n = real_tokens(log_p.shape[-1], mask_id)
  keep, uniform = (safe_log(x)[..., None] for x in parts[:2])
  # -inf beside -inf has no gradient: the mask's entry where nothing is uniform.
  kept = jnp.maximum(keep + log_p, _NEVER)
  log_q = jnp.logaddexp(kept, uniform - math.log(n))
  total = jnp.sum(log_q, axis=-1)
  if mask_id is not None:  # log p of the mask is -inf: its entry is the noise
    total -= uniform[..., 0] - math.log(n)
  return log_q, jnp.where(parts.uniform > 0, total, 0.0)


def between(s: Parts, t: Parts, *, absorbing: bool) -> Parts:
  r"""Returns the parts of q(z_t | z_s), s earlier than t.

  keep_{t|s} = keep_t / keep_s. With `absorbing` a masked token stays masked and
  mask_{t|s} = (mask_t - mask_s) / (1 - mask_s); without, each token and the mask
  alike are replaced, and noise_{t|s} = noise_t - keep_{t|s} noise_s.
  """
  keep = t.keep / s.keep
  if absorbing:
    alive = jnp.where(s.mask < 1, 1.0 - s.mask, 1.0)
    mask = (t.mask - s.mask) / alive
  else:
    mask = t.mask - keep * s.mask
  mask = jnp.clip(mask, 0.0, 1.0)  # Rounding may leave -1e-8.
  return Parts(keep, jnp.clip(1.0 - keep - mask, 0.0, 1.0), mask)


def likelihood(
  jump: Parts,
  z: Int[Array, "*n"],
  vocab_size: int,
  mask_id: int | None,
  *,
  absorbing: bool,
) -> Float[Array, "*n V"]:
  """Returns q(z_t = z | z_s = y) for every y."""
  ids = jnp.arange(vocab_size)
  noise = noise_at(jump, z, vocab_size, mask_id)
  here = ids == z[..., None]
  f = jnp.where(here, (jump.keep + noise)[..., None], noise[..., None])
  if absorbing and mask_id is not None:
    stays = (z == mask_id).astype(f.dtype)[..., None]
    f = jnp.where(ids == mask_id, stays, f)
  return f


def step_divergence(
  s: Parts,
  jump: Parts,
  x0: Int[Array, "*n"],
  z: Int[Array, "*n"],
  log_p: Float[Array, "*n V"],
  mask_id: int | None,
) -> Float[Array, "*n"]:
  r"""Returns KL(q(z_s | z_t, x0) || p(z_s | z_t)) of one step, in nats.

  With f_y = q(z_t | z_s = y), a_y = q(z_s = y | x0), b_y that for x0 ~ p, and
  q_y = f_y a_y / sum f a,

      KL = sum_y q_y (log a_y - log b_y) + log(sum f b / sum f a).

  A step changes little: KL is of order 1 / T, its two terms are of order 1. Where
  z is a real token, f is one number but at z, and with g_y = log(a_y / b_y) -
  log(a_z / b_z) and e = (sum of f elsewhere) / (f at z),

      KL = sum_{y != z} q_y g_y + log1p(e / b_z) - log1p(e / a_z),

  each of order 1 / T. Where z is the mask, sum f a = sum f b. The only sum over
  the vocabulary is that of log b, which is all that a chunk keeps.

  Args:
    s: fates at the earlier time.
    jump: fates from there to the later time; a masked token stays masked.
    x0: clean tokens.
    z: z_t; one that cannot be (a prompt's clean token at time 1) costs nothing.
    log_p: log p(x0 | z_t); the mask has probability 0.
    mask_id: the mask token, or None.
  """
  vocab_size = log_p.shape[-1]
  n = real_tokens(vocab_size, mask_id)
  masked = jnp.zeros(z.shape, bool) if mask_id is None else z == mask_id
  noise = noise_at(jump, z, vocab_size, mask_id)
  each, real = s.uniform / n, s.keep + s.uniform
  log_b, log_sum = log_tokens(s, log_p, mask_id)
  take = lambda at: jnp.take_along_axis(log_b, at[..., None], axis=-1)[..., 0]
  at_x0, at_z = take(x0), take(jnp.where(masked, x0, z))
  a_z = jnp.where(z == x0, s.keep, 0.0) + each
  central = ~masked & (jump.keep * a_z > 0)

  zero = lambda x: jnp.where(central, x, 0.0)
  shift = zero(finite_log(a_z) - at_z)
  base = noise * each  # f a of a token that is neither x0 nor z
  spread = base * (n * (finite_log(each) - shift) - log_sum)
  spread -= zero(base * (finite_log(each) - at_z - shift))
  x0_apart = ~(central & (z == x0))
  of_x0 = noise * (s.keep + each) * (finite_log(s.keep + each) - at_x0 - shift)
  of_x0 -= base * (finite_log(each) - at_x0 - shift)
  spread += jnp.where(x0_apart, of_x0, 0.0)

  ratio = safe_log(noise * real) - finite_log(jump.keep)
  extra = jax.nn.softplus(ratio - at_z)
  extra -= jax.nn.softplus(ratio - finite_log(a_z))
  # Under q no step left z alone (n = 1, z != x0), under p one may have.
  moved = ~masked & (a_z <= 0) & (jump.keep * noise > 0)
  apart = jax.nn.softplus(at_z - jnp.where(moved, ratio, 0.0))
  extra = zero(extra) + jnp.where(moved, apart, 0.0)
  total = noise * real + jnp.where(masked, s.mask, jump.keep * a_z)
  possible = total > 0
  divergence = spread / jnp.where(possible, total, 1.0) + extra
  return jnp.where(possible, divergence, 0.0)


def parts_divergence(
  q: Parts, p: Parts, vocab_size: int, mask_id: int | None
) -> Float[Array, "*n"]:
  """Returns KL(q(z | x0) || p) for a p that keeps nothing, in nats."""
  n = real_tokens(vocab_size, mask_id)
  other, copied = q.uniform / n, q.keep + q.uniform / n
  each = p.uniform / n
  term = lambda a, b: jnp.where(a > 0, a * (safe_log(a) - safe_log(b)), 0.0)
  return term(q.mask, p.mask) + term(copied, each) + (n - 1) * term(other, each)


def noise_alone(end: Parts) -> Parts:
  """Returns noise alone, in the proportions that it has in `end`."""
  noise = end.uniform + end.mask
  return Parts(jnp.zeros_like(noise), end.uniform / noise, end.mask / noise)
