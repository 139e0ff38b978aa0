"""An enumerable world: a tabular denoiser over few tokens and short rows.

A row of L tokens out of K has K^L states, so every expectation of an objective is
a finite sum: bounds, reverse chains and likelihoods are computed exactly here
and compared with what the objective draws.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import Batch, ModelInputs, ModelOutputs


def states(tokens: int, length: int) -> np.ndarray:
  """Returns all rows over `tokens` ids, `[tokens^length, length]`."""
  return np.array(list(itertools.product(range(tokens), repeat=length)))


def index(rows, tokens: int):
  """Returns the number of each row in `states`."""
  powers = tokens ** jnp.arange(rows.shape[-1])[::-1]
  return jnp.sum(rows * powers, axis=-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """A random network: own logits for each state, `[K^L, L, V]`."""

  logits: jax.Array
  tokens: int

  @classmethod
  def random(cls, seed, *, tokens, length, width=None, scale=1.5):
    """Returns a table of normal logits for rows over `tokens` ids."""
    shape = (tokens**length, length, width or tokens)
    logits = scale * jax.random.normal(jax.random.key(seed), shape)
    return cls(logits=logits, tokens=tokens)

  def __call__(self, inputs: ModelInputs) -> ModelOutputs:
    """Returns the logits of each row's state."""
    return ModelOutputs(hidden=self.logits[index(inputs.latent, self.tokens)])


def batch(rows, *, loss_mask=None) -> Batch:
  """Returns a batch of one segment a row, all supervised by default."""
  rows = jnp.asarray(rows, jnp.int32)
  everywhere = jnp.ones(rows.shape, bool)
  return Batch(
      tokens=rows,
      loss_mask=everywhere if loss_mask is None else loss_mask,
      segment_ids=everywhere.astype(jnp.int32),
      positions=jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape),
  )


def keyed(seed, rows: int, length: int, step=0) -> Keyed:
  """Returns noise for the given number of requests."""
  return Keyed.at(
      jax.random.key(seed),
      request=jnp.arange(rows),
      step=jnp.full((rows,), step),
      position=jnp.broadcast_to(jnp.arange(length), (rows, length)),
  )


def log_p_x0(table: Table, mask_id: int) -> np.ndarray:
  """Returns log p(x0 | z) of every state, the mask excluded, in float64."""
  logits = np.array(table.logits, np.float64)
  logits[..., mask_id] = -np.inf
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def masked_terms(table: Table, x0, mask_id: int) -> dict:
  """Returns, for each set of masked positions, sum_i -log p(x0_i | z)."""
  log_p, terms = log_p_x0(table, mask_id), {}
  for keep in itertools.product((True, False), repeat=len(x0)):
    z = np.where(keep, x0, mask_id)
    state = int(index(z, table.tokens))
    masked = [i for i, kept in enumerate(keep) if not kept]
    terms[tuple(masked)] = -sum(log_p[state, i, x0[i]] for i in masked)
  return terms


def bound(terms: dict, length: int, schedule, low: float = 0.0) -> float:
  r"""Returns the enumerated bound in nats per token.

  (1 / L) E_{t ~ U(low, 1)} w(t) sum_M (1 - a)^|M| a^(L - |M|) terms[M], by
  Gauss-Legendre quadrature (64 nodes; exact for the linear schedule).
  """
  nodes, mass = np.polynomial.legendre.leggauss(64)
  t = jnp.asarray(low + (1 - low) * (nodes + 1) / 2)
  alpha = np.asarray(schedule.alpha(t), np.float64)
  weight = np.asarray(schedule.weight(t), np.float64)
  total = 0.0
  for masked, term in terms.items():
    n = len(masked)
    probability = (1 - alpha) ** n * alpha ** (length - n)
    total += term * np.sum(mass / 2 * weight * probability)
  return total / length


def any_order(table: Table, mask_id: int, length: int) -> np.ndarray:
  """Returns p(x) of revealing one position at a time, the order at random.

  The law of the ancestral sampler as its steps become many; an entry for each
  row of `states(mask_id, length)` (the mask is the last id).
  """
  p = np.exp(log_p_x0(table, mask_id))
  rows = states(mask_id, length)
  total = np.zeros(len(rows))
  orders = list(itertools.permutations(range(length)))
  for order in orders:
    z, likelihood = np.full_like(rows, mask_id), np.ones(len(rows))
    for i in order:
      state = np.asarray(index(z, table.tokens))
      likelihood *= p[state, i, rows[:, i]]
      z[:, i] = rows[:, i]
    total += likelihood / len(orders)
  return total


def chain(objective, process, table: Table, length: int, times) -> np.ndarray:
  """Returns the exact law of z after the reverse steps of `times`.

  From `objective.posterior` alone: each step is a K^L x K^L matrix, since
  positions are drawn on their own given z. Starts from `objective.prior` if it is
  one state (masks), else from the uniform law.
  """
  rows = states(table.tokens, length)
  law = np.full(len(rows), 1.0 / len(rows))
  if objective.mask_id is not None:
    law = np.asarray(np.all(rows == objective.mask_id, axis=1), np.float64)
  z = jnp.asarray(rows)

  @jax.jit
  def matrix(t, s):
    whole = lambda x: jnp.full((len(rows), 1), x)
    log_p = objective.posterior(
        process, table.logits, z, whole(t), whole(s)
    )
    p = jnp.exp(log_p)[:, jnp.arange(length), z]  # [from, to, position]
    return jnp.prod(p, axis=-1)

  for t, s in itertools.pairwise(jnp.asarray(times)):
    law = law @ np.asarray(matrix(t, s), np.float64)
  return law


def drawn(objective, process, table, length, times, *, rows, seed=0):
  """Returns the frequency of each state after drawing the reverse steps."""
  whole = lambda x: jnp.full((rows, 1), x)
  times = jnp.asarray(times)

  @jax.jit
  def run():
    z = objective.prior(keyed(seed, rows, length, len(times)), (rows, length))

    def body(z, now):
      step, t, s = now
      inputs = objective.inputs(process, z, whole(t), batch(z))
      noise = keyed(seed, rows, length, step)
      out = table(inputs)
      return objective.reverse(process, noise, out, z, whole(t), whole(s)), None

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    z, _ = jax.lax.scan(body, z, steps)
    return jnp.bincount(index(z, table.tokens), length=len(table.logits))

  return np.asarray(run()) / rows


def variation(p, q) -> float:
  """Returns the total variation between two laws."""
  return 0.5 * float(np.abs(np.asarray(p) - np.asarray(q)).sum())


def monte_carlo(objective, process, denoise, x0, *, rows, keys, key=0):
  """Returns (mean, standard error) of the training loss and of the bound.

  Nats per token; each key draws one global batch of `rows` copies of x0, so that
  low-discrepancy times are tested as they are used.
  """
  data = batch(jnp.tile(jnp.asarray(x0), (rows, 1)))

  @jax.jit
  @jax.vmap
  def one(key):
    step = jnp.zeros((), jnp.int32)
    taken = objective.draw(process, key, data, step=step)
    loss = objective.loss(process, denoise, taken, data, step=step)
    return loss.total / loss.weight, jnp.mean(loss.bound)

  found = np.asarray(one(jax.random.split(jax.random.key(key), keys)))
  return found.mean(axis=1), found.std(axis=1, ddof=1) / np.sqrt(keys)
