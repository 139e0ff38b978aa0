r"""What a step of a trajectory is worth, by a second network (TraceRL, sec. 4.2).

Of the tokens of round t, r*_t and V*_t are the means of reward and value; an
answer's reward is that of the tokens of its last round. Backwards over rounds,

    R*_t = r*_t + g R*_{t+1}
    A*_t = r*_t - V*_t + g V*_{t+1} + g l A*_{t+1}

and for token j of round t, with gamma g and lambda l,

    R_j = r_j + g R*_{t+1},   A_j = r_j - V_j + g V*_{t+1} + g l A*_{t+1}

The value of a token is a linear function of its hidden state in the view that
asks for it; the network is one of its own and begins as the policy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from dllm_jax.core.types import Denoise, Objective, Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.reinforcement.rollouts import Rollouts, texts


def credit(
  steps: Int[np.ndarray, "B L"],
  tokens: Bool[np.ndarray, "B L"],
  values: Float[np.ndarray, "B L"],
  rewards: Float[np.ndarray, "B"] | Float[np.ndarray, "B L"],
  *,
  discount: float,
  trace: float,
) -> tuple[Float[np.ndarray, "B L"], Float[np.ndarray, "B L"]]:
  """Returns the returns and the advantages of tokens; 0 elsewhere.

  Args:
    steps: the last step of each slot's round: those of one step are a round.
    tokens: the slots that count.
    values: V of each, of the old value model.
    rewards: of an answer, or of each of its tokens.
    discount: gamma.
    trace: lambda.
  """
  returns = np.zeros(steps.shape, np.float32)
  gains = np.zeros(steps.shape, np.float32)
  for row in range(len(steps)):
    each = np.unique(steps[row][tokens[row]])[::-1]
    later, worth, ahead = 0.0, 0.0, 0.0  # R*, V*, A* of the round after
    for n, step in enumerate(each):
      at = tokens[row] & (steps[row] == step)
      if rewards.ndim == 2:
        r = rewards[row, at]
      else:
        r = np.full(at.sum(), rewards[row] if n == 0 else 0.0)
      v = values[row, at]
      returns[row, at] = r + discount * later
      gains[row, at] = r - v + discount * (worth + trace * ahead)
      delta = r.mean() - v.mean() + discount * worth
      later = r.mean() + discount * later
      ahead = delta + discount * trace * ahead
      worth = v.mean()
  return returns, gains


def value_terms(
  new: Float[Array, "*n"],
  old: Float[Array, "*n"],
  returns: Float[Array, "*n"],
  clip: float,
) -> Float[Array, "*n"]:
  """Returns 1/2 max((V - R)^2, (V_old + clip(V - V_old, +-clip) - R)^2)."""
  held = old + jnp.clip(new - old, -clip, clip)
  return 0.5 * jnp.maximum((new - returns) ** 2, (held - returns) ** 2)


def grown(model: PyTree, width: int) -> PyTree:
  """Returns the parameters that a value model begins with: the policy's own.

  Args:
    model: of the policy.
    width: of its hidden states.
  """
  return {"value": {"model": model, "head": jnp.zeros((width,), jnp.float32)}}


def values(
  objective: Objective,
  process: Process,
  denoise: Denoise,
  head: Float[Array, "D"],
  views: Masks,
  batch: Rollouts,
) -> Float[Array, "B L"]:
  """Returns the value of each token in the view that asks for it; 0 of others.

  Args:
    objective: how the network was trained.
    process: its arrays.
    denoise: the value model's network.
    head: the linear function of its hidden states.
    views: what is masked and asked for.
    batch: the rows.
  """
  shape = views.z.shape
  flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), views)
  rows = jax.tree.map(
    lambda x: jnp.repeat(x, shape[1], axis=0), texts(batch, "seen")
  )
  drawn = Drawn(t=flat.t, z=flat.z)
  out = objective.outputs(objective.unbiased(process), denoise, drawn, rows)
  found = jnp.einsum("bld,d->bl", out.hidden, head.astype(out.hidden.dtype))
  found = found.astype(jnp.float32).reshape(shape)
  return jnp.sum(jnp.where(views.weight != 0, found, 0.0), axis=1)


def value_loss(
  new: Float[Array, "B L"], views: Masks, batch: Rollouts, clip: float
) -> Float[Array, ""]:
  """Returns the summed loss of values, over the slots of answers."""
  used = jnp.any(batch.loss_mask, axis=1, keepdims=True)
  asked = jnp.any(views.weight != 0, axis=1) & used
  terms = value_terms(new, batch.values, batch.returns, clip)
  slots = jnp.maximum(jnp.sum(batch.region, axis=1), 1)
  return jnp.sum(jnp.sum(jnp.where(asked, terms, 0.0), axis=1) / slots)
