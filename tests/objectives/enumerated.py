"""Bounds and reverse chains by dense matrices, apart from the objectives' code.

A process over K states (the mask among them) is its law q(z_t | x0) and its rates,
both plain K x K arrays in float64; rows of L tokens have K^L states.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from tests.objectives import toy


def mixture(keep: float, noise: np.ndarray) -> np.ndarray:
  """Returns q(z_t | x0), rows by x0: keep I + 1 noise^T."""
  return keep * np.eye(len(noise)) + noise


def rates(law, t: float, step: float = 1e-6) -> np.ndarray:
  """Returns the rates of jumping from row to column at time t.

  d law / dt = law @ rates, and noise resets every state alike: the rate into z is
  d noise_z / dt - (keep' / keep) noise_z.
  """
  after, before = law(t + step), law(t - step)
  return np.linalg.solve(law(t), (after - before) / (2 * step))


def softmax(logits) -> np.ndarray:
  """Returns probabilities in float64, -inf being impossible."""
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits - logits.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


def _plogp(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return np.where(a > 0, a * np.log(np.where(a > 0, b, 1.0)), 0.0)


def jump_integrand(law, t: float, ratio: np.ndarray, x0, rows) -> np.ndarray:
  r"""Returns the integrand of the continuous bound, `[states, L]`, nats.

  sum_{y != z} R(y, z) [ s_y - r_y log s_y + r_y (log r_y - 1) ] with r the true
  ratios q(y | x0) / q(z | x0) (arXiv:2310.16834, eq. 5).

  Args:
    law: t -> q(z_t | x0).
    t: the time.
    ratio: s of every state and position, `[states, L, K]`.
    x0: the clean row.
    rows: z of every state, `[states, L]`.
  """
  q, rate = law(t)[x0], rates(law, t)  # [L, K], [K, K]
  at_z = np.take_along_axis(q[None], rows[..., None], axis=-1)
  # States that cannot be reached count nothing.
  true = np.where(at_z > 0, q / np.where(at_z > 0, at_z, 1.0), 1.0)
  into = np.maximum(rate.T[rows], 0.0)  # [states, L, K]: from y into z
  into *= np.arange(q.shape[-1]) != rows[..., None]
  safe = np.where(into > 0, ratio, 1.0)
  term = safe - _plogp(true, safe) + _plogp(true, true) - true
  return np.sum(into * np.where(into > 0, term, 0.0), axis=-1)


def continuous_bound(law, ratio, x0, rows, *, low: float, high: float) -> float:
  """Returns the mean over t ~ U(low, high) of the bound, nats per token.

  Gauss-Legendre in u, t = sin^2(pi u / 2): square roots at both ends are smooth.
  """
  ends = 2 / np.pi * np.arcsin(np.sqrt([low, high]))
  nodes, mass = np.polynomial.legendre.leggauss(80)
  half = (ends[1] - ends[0]) / 2
  total = 0.0
  for u, w in zip(ends[0] + half * (nodes + 1), half * mass, strict=True):
    t = np.sin(np.pi * u / 2) ** 2
    term = jump_integrand(law, t, ratio(t), x0, rows).sum(axis=1)
    chance = np.prod(law(t)[x0, rows], axis=1)
    slope = np.pi / 2 * np.sin(np.pi * u)
    total += w * slope * np.sum(chance * term)
  return total / (high - low) / len(x0)


def ratios(law, p: np.ndarray, rows: np.ndarray):
  """Returns t -> s of a network that predicts x0 ~ p, `[states, L, K]`."""

  def at(t):
    q = p @ law(t)
    at_z = np.take_along_axis(q, rows[..., None], axis=-1)
    return q / np.where(at_z > 0, at_z, 1.0)

  return at


def step_bound(matrices, p: np.ndarray, x0, rows, prior) -> float:
  """Returns the bound of T steps with its prior term, nats per token.

  Args:
    matrices: Q_1 ... Q_T.
    p: p(x0 | z) of every state and position, `[states, L, K]`.
    x0: the clean row.
    rows: z of every state, `[states, L]`.
    prior: the law of z_T in the model, `[K]`.
  """
  before, total = np.eye(len(prior)), 0.0
  for one in matrices:
    after = before @ one
    f = one.T[rows]  # [states, L, K]: from y into z
    normal = lambda x: (
      x / np.where(x.sum(-1, keepdims=True) > 0, x.sum(-1, keepdims=True), 1.0)
    )
    q, guess = normal(f * before[x0]), normal(f * (p @ before))
    divergence = np.sum(_plogp(q, q) - _plogp(q, guess), axis=(1, 2))
    chance = np.prod(after[x0, rows], axis=1)
    total += np.sum(chance * np.where(chance > 0, divergence, 0.0))
    before = after
  end = before[x0]
  return (total + np.sum(_plogp(end, end) - _plogp(end, prior))) / len(x0)


def true_denoiser(law, data, rows):
  """Returns t -> p(x0_i = v | z at the other positions), `[states, L, K]`.

  The optimum of every loss here: x0 ~ p then has the exact ratios of p_t.

  Args:
    law: t -> q(z_t | x0).
    data: p(x0) of every row of K tokens, `[K^L]`.
    rows: all rows, `[K^L, L]`.
  """
  size, length = rows.max() + 1, rows.shape[1]
  member = np.eye(size)[rows]  # [x0, L, v]

  def at(t):
    each = law(t)[rows[:, None], rows[None]]  # [x0, z, L]
    found = np.full((len(rows), length, size), 1 / size)
    for i in range(length):
      others = np.prod(np.delete(each, i, axis=-1), axis=-1)
      joint = np.einsum("x,xz,xv->zv", data, others, member[:, i])
      total = joint.sum(-1, keepdims=True)
      seen = total[:, 0] > 0
      found[seen, i] = joint[seen] / total[seen]
    return found

  return at


def chain(objective, process, logits, rows, times, start):
  """Returns the law of z after the reverse steps of `times`.

  Args:
    objective: gives `posterior`.
    process: its arrays.
    logits: t -> network outputs of every state, `[states, L, V]`.
    rows: z of every state.
    times: the grid.
    start: the law of one token at time 1, `[K]`.
  """
  law = np.prod(start[rows], axis=1)
  step = _step(objective)
  for t, s in itertools.pairwise(np.asarray(times)):
    p = step(process, jnp.asarray(logits(t)), rows, t, s)
    law = law @ np.asarray(p, np.float64)
  return law


@functools.lru_cache(maxsize=8)
def _step(objective):
  """Returns `(process, logits, rows, t, s) -> matrix` of a step, compiled once."""

  @jax.jit
  def matrix(process, logits, z, t, s):
    whole = lambda x: jnp.full((len(z), 1), x)
    log_p = objective.posterior(process, logits, z, whole(t), whole(s))
    return jnp.prod(jnp.exp(log_p)[:, jnp.arange(z.shape[1]), z], axis=-1)

  return matrix


def table(seed: int, *, size: int, length: int, mask_id: int | None):
  """Returns a random network of states, and its p(x0 | z) without a mask."""
  network = toy.Table.random(seed, tokens=size, length=length)
  logits = np.array(network.logits, np.float64)
  if mask_id is not None:
    logits[..., mask_id] = -np.inf
  return network, softmax(logits)
