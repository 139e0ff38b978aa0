"""How close a choice was that two samplings of one request made differently."""

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.types import Batch, Process
from dllm_jax.core.vocabulary import reduce


def margins(spec, net, requests, first, second) -> list[float]:
  """Returns the deciding margin of each row at its first difference.

  For greedy samplers by confidence, without a cache. Where both revealed a slot,
  the margin is that of the two tokens' probabilities; where they revealed
  different slots, that of their confidences. Rows that agree are left out.

  Args:
    spec: the sampler.
    net: the network and its parameters.
    requests: what was asked for.
    first: a traced generation of them.
    second: another one, perhaps on a longer canvas.
  """
  found, length = [], spec.length
  for row in range(requests.tokens.shape[0]):
    one, other = (
      np.asarray(g.trace.frames.tokens)[:, row, :length]
      for g in (first, second)
    )
    steps = np.flatnonzero((one != other).any(axis=1))
    if len(steps):
      at = steps[0]
      before = one[at - 1] if at else np.asarray(first.trace.initial)[row]
      p = _probabilities(spec, net, requests, row, before)
      found.append(_margin(p, one[at], other[at], spec.objective.mask_id))
  return found


def _probabilities(spec, net, requests, row, tokens):
  """Returns the network's probabilities on one canvas, `[T, V]`."""
  denoiser, params = net
  valid = jnp.asarray(requests.valid[row : row + 1])
  batch = Batch(
    tokens=jnp.asarray(tokens)[None],
    loss_mask=valid,
    segment_ids=valid.astype(jnp.int32),
    positions=jnp.arange(spec.length)[None],
  )

  @jax.jit
  def call(batch):
    t = jnp.ones((1, 1))
    inputs = spec.objective.inputs(Process(), batch.tokens, t, batch)
    out, _ = denoiser.apply(params, inputs, None)
    return reduce(lambda logits: jax.nn.softmax(logits), out)[0]

  return np.asarray(call(batch))


def _margin(p, one, other, mask_id) -> float:
  slots = np.flatnonzero(one != other)
  both = slots[(one[slots] != mask_id) & (other[slots] != mask_id)]
  margin = np.abs(p[both, one[both]] - p[both, other[both]]).max(initial=0.0)
  sure = np.delete(p, mask_id, axis=1).max(axis=1)
  mine = slots[other[slots] == mask_id]
  theirs = slots[one[slots] == mask_id]
  # Each chose its best; the least sure of one beat the surest of the other.
  if len(mine) and len(theirs):
    gap = abs(sure[mine].min() - sure[theirs].max())
    margin = max(margin, gap)
  return float(margin)
