"""What a language makes of one network call: a text of it, slot by slot.

A call's proposal is a whole text of the language, given what stands; whatever of
it a policy reveals can thus be completed. Policies see it as two changes of
their logits: the marginal law of each slot, which scores and log-probabilities
are read from, and the tokens of the class that the text has at the slot, one of
which is drawn.
"""

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FAINT = 200.0
"""Nats: e^-200 is 0 in float32, and differences of logits stay what they are."""


def softened(
  law: Float[Array, "B c V"], read: Float[Array, "B c V"]
) -> Float[Array, "B c V"]:
  """Returns a law with what was cut off it at next to no probability.

  A cut (top-k, a ban) may leave no token that the language admits; the
  language holds, and takes as few of the others as it can.

  Args:
    law: log-probabilities, up to a constant; -inf where they are cut.
    read: the same before the cut.
  """
  rest = jnp.maximum(_topped(read), -FAINT) - FAINT
  rest = jnp.where(jnp.isnan(rest), -2.0 * FAINT, rest)
  law = _topped(law)
  return jnp.maximum(jnp.where(jnp.isnan(law), -jnp.inf, law), rest)


def _topped(x: Float[Array, "B c V"]) -> Float[Array, "B c V"]:
  """Returns logits of which the greatest is 0: all that a comparison needs."""
  return x - jnp.max(x, axis=-1, keepdims=True)


@struct.dataclass
class Proposal:
  """One text of each row's language, and what else there might be.

  Attributes:
    choice: the class of each slot's token; -1 where any token may stand.
    factor: what the probability of each class is multiplied by, nats.
    barred: the class of what must not stand at a slot, an end of text before the
      language; -1 for none.
    classes: the class of each token.
  """

  choice: Int[Array, "B W"]
  factor: Float[Array, "B W C"]
  barred: Int[Array, "B W"]
  classes: Int[Array, "B 1 V"]

  def within(
    self, law: Float[Array, "B c V"], read: Float[Array, "B c V"]
  ) -> Float[Array, "B c V"]:
    """Returns the marginal law of each slot; arguments as of `softened`."""

    def bound(law):
      factor = jax.vmap(lambda f, c: jnp.take(f, c[0], axis=-1))(
        self.factor, self.classes
      )
      factor = jnp.where(factor > -1e29, factor, -jnp.inf)
      barred = self.barred[..., None]
      barred = (barred >= 0) & (barred == self.classes)
      here = (self.choice >= 0)[..., None]
      free = jnp.where(barred, -jnp.inf, law)
      return jnp.where(here, softened(law, read) + factor, free)

    some = jnp.any((self.choice >= 0) | (self.barred >= 0))
    return lax.cond(some, bound, lambda x: x, law)

  def chosen(self, law: Float[Array, "B c V"]) -> Float[Array, "B c V"]:
    """Returns a law with the tokens of each slot's class only."""
    choice = self.choice[..., None]
    return jnp.where((choice < 0) | (choice == self.classes), law, -jnp.inf)
