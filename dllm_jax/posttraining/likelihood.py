r"""The log-likelihood of a text by masked diffusion, as a mean of samples.

A sample hides some tokens of an answer y and asks for them all:

    log p(y | x) >= B(y) = E [ sum_{i hidden} w_i log p(y_i | x, z, t) ]

What is hidden is drawn first (`draw_masks`) and then read (`log_terms`), so that
two networks can be asked of the same, and what they say is differentiable.

- "counts": of n tokens, l are hidden, l even over 1..n, and weigh n / l
  (arXiv:2502.09992, eq. 6), in each block of block diffusion.
- "times": each is hidden with the probability of a time t, and weighs
  -alpha'(t) / (1 - alpha(t)), 1 / t where that probability is t.

Counts and times are spread evenly over the samples of a text.
"""

import functools
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dllm_jax.core.types import Batch, Denoise, Objective, Process
from dllm_jax.core.vocabulary import forbid, reduce
from dllm_jax.evaluation.likelihood import estimators
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.texts import unshifted
from dllm_jax.training.bound import even

Estimator = Literal["counts", "times"]


@struct.dataclass
class Masks:
  """What the samples of some texts hide.

  Attributes:
    z: the texts with masks.
    weight: the factor of each hidden token; 0 elsewhere.
    t: the time, for networks that are told it.
  """

  z: Int[Array, "*texts n L"]
  weight: Float[Array, "*texts n L"]
  t: Float[Array, "*texts n #L"]


def check_objective(objective: Objective) -> None:
  """Checks that texts have such a likelihood.

  Raises:
    ValueError: the objective is no masking in continuous time.
  """
  if not objective.exchangeable:
    raise ValueError(
      f"{type(objective).__name__} as configured is no masked diffusion in"
      " continuous time, by which log p of an answer is estimated; legal: mdlm,"
      " llada, dream, md4 and bd3lm with objective.steps None"
    )


def draw_masks(
  objective: Objective,
  process: Process,
  keys: Key[Array, "B"],
  batch: Batch,
  *,
  n_t: int,
  n_yt: int = 1,
  estimator: Estimator = "counts",
) -> Masks:
  """Returns `n_t n_yt` samples of each row: leaves `[B, n, L]`.

  Args:
    objective: how rows are corrupted.
    process: its arrays.
    keys: a row's samples depend on its key and on the row alone.
    batch: texts, one a row; `loss_mask` is what may be hidden.
    n_t: counts, or times, of each text.
    n_yt: draws of what is hidden for each of those.
    estimator: "counts" or "times".
  """
  process = objective.unbiased(process)
  if estimator == "times":
    draw = functools.partial(_at_times, objective, process, n_t, n_yt)
    return jax.vmap(draw)(keys, batch)
  rows, samples = keys.shape[0], n_t * n_yt
  copies = jax.tree.map(lambda x: jnp.tile(x, (samples, 1)), batch)
  z, weight, rate = estimators.mask_counts(objective, keys, copies, masks=n_yt)
  rate = rate if objective.block_length else rate[:, :1]
  masks = Masks(
    z=z,
    weight=jnp.where(_hidden(objective, z, copies), weight, 0.0),
    t=objective.when(rate),
  )
  apart = lambda x: x.reshape(samples, rows, -1).swapaxes(0, 1)
  return jax.tree.map(apart, masks)


def log_terms(
  objective: Objective,
  process: Process,
  denoise: Denoise,
  masks: Masks,
  batch: Batch,
  *,
  guidance: float = 0.0,
) -> Float[Array, "B n L"]:
  """Returns w_i log p(y_i | z, t) of each position, nats; 0 where not asked for.

  Their sum over positions is a sample of B(y). Differentiable.

  Args:
    objective: how the network was trained.
    process: its arrays.
    denoise: the network with its parameters.
    masks: what is hidden, leaves `[B, n, L]`.
    batch: the texts, `[B, L]`.
    guidance: (1 + guidance) times the logits, less guidance times those of the
      same masks with the whole prompt masked.
  """
  shape = masks.z.shape
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), masks)
  rows = jax.tree.map(lambda x: jnp.repeat(x, shape[1], axis=0), batch)
  process = objective.unbiased(process)

  def ask(z):
    out = objective.outputs(process, denoise, Drawn(t=flat.t, z=z), rows)
    out = unshifted(out, rows.segment_ids) if objective.shift else out
    subs = objective.parameterisation == "subs"
    return forbid(out, objective.mask_id) if subs else out

  out = ask(flat.z)
  if guidance:
    out = out, ask(jnp.where(rows.loss_mask, flat.z, objective.mask_id))

  def read(logits, x0, counts):
    if guidance:
      logits, apart = logits
      logits = jnp.where(
        jnp.isinf(apart), logits, apart + (guidance + 1) * (logits - apart)
      )
    picked = jnp.take_along_axis(logits, x0[..., None], axis=-1)[..., 0]
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(counts, picked - lse, 0.0)

  log_p = reduce(read, out, rows.tokens, flat.weight != 0, live=2)
  return (flat.weight * log_p).reshape(shape)


def _hidden(
  objective: Objective, z: Int[Array, "B L"], batch: Batch
) -> Bool[Array, "B L"]:
  return (z == objective.mask_id) & batch.loss_mask


def _at_times(
  objective: Objective,
  process: Process,
  n_t: int,
  n_yt: int,
  key: Key[Array, ""],
  row: Batch,
) -> Masks:
  """Returns the samples of one text at times that are spread evenly."""
  key_t, key_z = jax.random.split(key)
  copies = lambda n: jax.tree.map(lambda x: jnp.tile(x, (n, 1)), row)
  step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
  drawn = even(objective).draw(process, key_t, copies(n_t), step=step)
  t, rows = jnp.repeat(drawn.t, n_yt, axis=0), copies(n_t * n_yt)
  z = objective.corrupt(process, key_z, rows.tokens, t)
  z = jnp.where(rows.loss_mask, z, rows.tokens)
  hidden = _hidden(objective, z, rows)
  return Masks(z=z, weight=jnp.where(hidden, objective.weight(t), 0.0), t=t)
