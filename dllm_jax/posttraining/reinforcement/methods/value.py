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

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np


def credit(
  rounds: Int[np.ndarray, "B L"],
  tokens: Bool[np.ndarray, "B L"],
  values: Float[np.ndarray, "B L"],
  rewards: Float[np.ndarray, "B"] | Float[np.ndarray, "B L"],
  *,
  discount: float,
  trace: float,
) -> tuple[Float[np.ndarray, "B L"], Float[np.ndarray, "B L"]]:
  """Returns the returns and the advantages of tokens; 0 elsewhere.

  Args:
    rounds: the round of each slot.
    tokens: the slots that count.
    values: V of each, of the old value model.
    rewards: of an answer, or of each of its tokens.
    discount: gamma.
    trace: lambda.
  """
  returns = np.zeros(rounds.shape, np.float32)
  gains = np.zeros(rounds.shape, np.float32)
  for row in range(len(rounds)):
    steps = np.unique(rounds[row][tokens[row]])[::-1]
    later, worth, ahead = 0.0, 0.0, 0.0  # R*, V*, A* of the round after
    for n, step in enumerate(steps):
      at = tokens[row] & (rounds[row] == step)
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
