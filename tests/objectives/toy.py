"""An enumerable world: a tabular denoiser over few tokens and short rows.

A row of L tokens out of K has K^L states, so every expectation of an objective
is a finite sum: bounds, reverse chains and likelihoods are computed exactly
here and compared with what the objective draws.
"""

import dataclasses
import functools
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
  powers = tokens ** np.arange(rows.shape[-1])[::-1]
  return (rows * powers).sum(axis=-1)


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


class Attention:
  """A network whose output at a slot depends on the slots that it may see.

  Each visible slot adds a random vector of its token and distance, so that
  masks and two streams matter; both streams share the vectors.
  """

  def __init__(self, *, length, tokens, seed=0):
    rng = np.random.default_rng(seed)
    self.length = length
    self.near = jnp.asarray(rng.normal(size=(2 * length, tokens, tokens)))
    self._compiled = jax.jit(self._run)

  def __call__(self, inputs: ModelInputs) -> ModelOutputs:
    """Returns logits under the inputs' mask."""
    return self._compiled(inputs)

  def _run(self, inputs: ModelInputs) -> ModelOutputs:
    slots = jnp.arange(inputs.latent.shape[1])
    seen = inputs.mask.allowed(slots[:, None], slots[None, :])
    if inputs.extra_mask is not None:
      seen = seen & inputs.extra_mask
    at = inputs.positions
    distance = at[:, None, :] - at[:, :, None] + self.length
    added = self.near[distance, inputs.latent[:, None, :]]  # [B, q, k, V]
    total = jnp.sum(jnp.where(seen[None, :, :, None], added, 0.0), axis=2)
    return ModelOutputs(hidden=2.0 * jnp.tanh(total))


def batch(rows, *, loss_mask=None) -> Batch:
  """Returns a batch of one segment a row, all supervised by default."""
  # Laid out by numpy: outside a program, jax compiles each operation on its own.
  xp = jnp if isinstance(rows, jax.core.Tracer) else np
  rows = xp.asarray(rows, np.int32)
  if loss_mask is None:
    loss_mask = np.ones(rows.shape, bool)
  positions = np.broadcast_to(
    np.arange(rows.shape[1], dtype=np.int32), rows.shape
  )
  return Batch(
    tokens=jnp.asarray(rows),
    loss_mask=jnp.asarray(loss_mask),
    segment_ids=jnp.asarray(np.ones(rows.shape, np.int32)),
    positions=jnp.asarray(positions),
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


def bound(
  terms: dict, length: int, schedule, low: float = 0.0, times=None
) -> float:
  r"""Returns the enumerated bound in nats per token.

  (1 / L) E_{t ~ U(low, 1)} w(t) sum_M (1 - a)^|M| a^(L - |M|) terms[M], by
  Gauss-Legendre quadrature (64 nodes; exact for the linear schedule), or over
  the given `times`, equally likely.
  """
  if times is None:
    nodes, mass = np.polynomial.legendre.leggauss(64)
    t = low + (1 - low) * (nodes + 1) / 2
  else:
    t, mass = times, 2.0 / np.size(times)
  curves = jax.jit(lambda t: (schedule.alpha(t), schedule.weight(t)))
  alpha, weight = (np.asarray(x, np.float64) for x in curves(jnp.asarray(t)))
  total = 0.0
  for masked, term in terms.items():
    n = len(masked)
    probability = (1 - alpha) ** n * alpha ** (length - n)
    total += term * np.sum(mass / 2 * weight * probability)
  return total / length


def any_order(
  table: Table, mask_id: int, length: int, orders=None
) -> np.ndarray:
  """Returns p(x) of revealing one position at a time, the order at random.

  The law of the ancestral sampler as its steps become many; an entry for each
  row of `states(mask_id, length)` (the mask is the last id). `orders` are the
  equally likely ones, all of them by default.
  """
  p = np.exp(log_p_x0(table, mask_id))
  rows = states(mask_id, length)
  total = np.zeros(len(rows))
  orders = list(orders or itertools.permutations(range(length)))
  for order in orders:
    z, likelihood = np.full_like(rows, mask_id), np.ones(len(rows))
    for i in order:
      state = np.asarray(index(z, table.tokens))
      likelihood *= p[state, i, rows[:, i]]
      z[:, i] = rows[:, i]
    total += likelihood / len(orders)
  return total


def chain(
  objective, process, table: Table, length: int, times, *, law=None, free=None
) -> np.ndarray:
  """Returns the exact law of z after the reverse steps of `times`.

  From `objective.posterior` alone: each step is a K^L x K^L matrix, since
  positions are drawn on their own given z. Starts from `law`, by default all
  masks, or the uniform law where there are none. Only `free` slots change.
  """
  rows = states(table.tokens, length)
  free = np.ones(length, bool) if free is None else np.asarray(free)
  step = _step(objective, table, length)
  if law is None and objective.mask_id is None:
    law = np.full(len(rows), 1.0 / len(rows))
  elif law is None:
    law = np.asarray(np.all(rows == objective.mask_id, axis=1), np.float64)
  for t, s in itertools.pairwise(np.asarray(times)):
    law = law @ np.asarray(step(process, free, t, s), np.float64)
  return law


@functools.lru_cache(maxsize=8)
def _step(objective, table: Table, length: int):
  """Returns `(process, free, t, s) -> matrix` of a step, compiled once."""
  z = jnp.asarray(states(table.tokens, length))

  @jax.jit
  def matrix(process, free, t, s):
    t, s = (jnp.full((len(z), 1), x) for x in (t, s))
    log_p = objective.posterior(process, table.logits, z, t, s)
    p = jnp.exp(log_p)[:, jnp.arange(length), z]  # [from, to, position]
    p = jnp.where(free, p, z[:, None] == z)
    return jnp.prod(p, axis=-1)

  return matrix


def drawn(
  objective, process, table, length, times, *, rows, seed=0, window=None
):
  """Returns the frequency of each state after drawing the reverse steps.

  `window` names the slots of the network's outputs that predict each slot.
  """
  times = np.asarray(times)
  if window is not None:
    window = np.broadcast_to(window, (rows, length))

  @jax.jit
  def run():
    z = objective.prior(keyed(seed, rows, length, len(times)), (rows, length))

    def body(z, now):
      step, t, s = now
      t, s = (jnp.full((rows, 1), x) for x in (t, s))
      out = table(objective.inputs(process, z, t, batch(z)))
      noise = keyed(seed, rows, length, step)
      z = objective.reverse(process, noise, out, z, t, s, window=window)
      return z, None

    steps = (np.arange(len(times) - 1), times[:-1], times[1:])
    z, _ = jax.lax.scan(body, z, steps)
    return jnp.bincount(index(z, table.tokens), length=len(table.logits))

  return np.asarray(run()) / rows


def variation(p, q) -> float:
  """Returns the total variation between two laws."""
  return 0.5 * float(np.abs(np.asarray(p) - np.asarray(q)).sum())


def draw(objective, process, key, data):
  """Returns the randomness of a loss, compiled as one program."""
  step = jnp.zeros((), jnp.int32)
  run = jax.jit(lambda *args: objective.draw(*args, step=step))
  return run(process, key, data)


def loss(objective, process, network, taken, data):
  """Returns the loss of what was drawn, compiled as one program."""
  step = jnp.zeros((), jnp.int32)

  def run(process, taken, data):
    return objective.loss(process, network, taken, data, step=step)

  return jax.jit(run)(process, taken, data)


def monte_carlo(objective, process, denoise, x0, *, rows, keys, key=0):
  """Returns (mean, standard error) of the training loss and of the bound.

  Nats per token; each key draws one global batch of `rows` copies of x0, so
  that low-discrepancy times are tested as they are used.
  """
  data = batch(np.tile(x0, (rows, 1)))

  @jax.jit
  @jax.vmap
  def one(key):
    step = jnp.zeros((), jnp.int32)
    taken = objective.draw(process, key, data, step=step)
    loss = objective.loss(process, denoise, taken, data, step=step)
    return loss.total / loss.weight, jnp.mean(loss.bound)

  found = np.asarray(one(jax.random.split(jax.random.key(key), keys)))
  return found.mean(axis=1), found.std(axis=1, ddof=1) / np.sqrt(keys)
