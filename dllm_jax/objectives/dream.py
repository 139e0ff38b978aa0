r"""Dream: masked diffusion that starts from an autoregressive model.

The output at slot i predicts the token of slot i + 1 (arXiv:2508.15487), as in
the autoregressive network whose weights training begins with. Tokens are
weighed by how much context they have (CART): a masked token counts

    w_i = sum_{j not masked} (p / 2) (1 - p)^(|i - j| - 1)

in place of 1 / t. With `anneal_steps`, attention goes from causal to full: a
future slot is seen with probability r(step), the same slots for all rows
(DiffuLLaMA, arXiv:2410.17891).
"""

import dataclasses
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dllm_jax.core import check
from dllm_jax.core.types import Loss, ModelInputs
from dllm_jax.objectives.base import check_choice
from dllm_jax.objectives.llada import Cut, LLaDA
from dllm_jax.objectives.texts import begins_segment, Normalisation

TokenWeights = Literal["cart", "time"]


@struct.dataclass
class Annealed(Cut):
  """The randomness of a loss.

  Attributes:
    attention: key data of the annealed mask, the same in every row.
  """

  attention: UInt32[Array, "B words"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dream(LLaDA):
  """Diffusion from autoregressive weights (Ye et al. 2025).

  Attributes:
    token_weights: "cart" weighs by context, "time" as `weighting` says.
    cart_decay: p of CART: the share of the nearest token; 0.8 in Dream's code.
    normalisation: the loss is an average over masked tokens.
    anneal_steps: steps until attention is full; 0 for full from the start.
    random_length: as in LLaDA; Dream cuts nothing.
    shift: 1, as published.
    expand_id, delete_id: DreamOn's tokens that are two masks or none, or None.
    sampling_epsilon: the published grid ends here, its last step reveals all.

  Examples:
    >>> import jax.numpy as jnp
    >>> dream = Dream(vocab_size=5, mask_id=4)
    >>> dream.shift  # slot i predicts the token of slot i + 1
    1
    >>> known, segments = jnp.array([[True, False]]), jnp.ones((1, 2), int)
    >>> w = context_weights(known, dream.cart_decay, segments)
    >>> round(float(w[0, 1]), 3)  # its neighbour is known: p / 2
    0.4
  """

  token_weights: TokenWeights = "cart"
  cart_decay: float = 0.8
  normalisation: Normalisation = "masked"
  anneal_steps: int = 0
  random_length: float = 0.0
  sampling_epsilon: float = 1e-3
  expand_id: int | None = None
  delete_id: int | None = None

  shift: Literal[0, 1] = 1

  def __post_init__(self):
    super().__post_init__()
    check_choice("token_weights", self.token_weights, TokenWeights)
    check.within("cart_decay", self.cart_decay, "(0, 1)")
    check.at_least(self, 0, "anneal_steps")
    for name in ("expand_id", "delete_id"):
      token = getattr(self, name)
      if not (token is None or 0 <= token < self.vocab_size):
        raise ValueError(
          f"{name} {token} must lie in [0, {self.vocab_size}), the vocabulary,"
          " or be None"
        )

  def draw(self, process, key, batch, *, step) -> Annealed:
    """Returns times, corrupted rows and the key of the attention mask."""
    key_rest, key_mask = jax.random.split(key)
    cut = super().draw(process, key_rest, batch, step=step)
    words = jax.random.key_data(key_mask)
    rows = batch.tokens.shape[0]
    return Annealed(
      t=cut.t,
      z=cut.z,
      length=cut.length,
      attention=jnp.broadcast_to(words, (rows, *words.shape)),
    )

  def annealed_mask(
    self, attention: UInt32[Array, "B words"], length: int, step: Array
  ) -> Bool[Array, "L L"]:
    """Returns who may attend to whom: the past, and some of the future."""
    key = jax.random.wrap_key_data(attention[0])
    rate = (step.astype(jnp.float32) + 1.0) / self.anneal_steps
    seen = jax.random.uniform(key, (length, length)) < rate
    return seen | jnp.tri(length, dtype=bool)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of shifted predictions, attention annealed."""
    length = batch.tokens.shape[1]

    def annealed(inputs: ModelInputs):
      if self.anneal_steps:
        mask = self.annealed_mask(drawn.attention, length, step)
        inputs = inputs.replace(extra_mask=mask)
      return denoise(inputs)

    return super().loss(process, annealed, drawn, batch, step=step)

  def emphasis(self, process, z, t, batch) -> Float[Array, "B #L"]:
    """Returns context weights, or the factor that `weighting` names."""
    if self.token_weights == "time":
      return super().emphasis(process, z, t, batch)
    known = z != self.mask_id
    return context_weights(known, self.cart_decay, batch.segment_ids)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns even times from 1 to `sampling_epsilon`; the last one is 0."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    times = jnp.linspace(1.0, self.sampling_epsilon, steps + 1)
    return times.at[-1].set(0.0)


def context_weights(
  known: Bool[Array, "B L"], decay: float, segment_ids: Int[Array, "B L"]
) -> Float[Array, "B L"]:
  """Returns sum_{j known, j != i} (p / 2) (1 - p)^(|i - j| - 1), p = decay.

  The sum is over i's own segment, which is all that it attends to. By a linear
  recurrence from each side, so that no L x L matrix is built.
  """
  here = jnp.where(known, 0.5 * decay, 0.0)

  def join(left, right):
    return left[0] * right[0], left[1] * right[0] + right[1]

  def before(x, segments):
    """Returns the sum over earlier slots."""
    goes_on = ~begins_segment(segments)
    factors = jnp.where(goes_on, 1.0 - decay, 0.0)
    _, total = jax.lax.associative_scan(join, (factors, x), axis=1)
    return jnp.where(goes_on, jnp.roll(total, 1, axis=1), 0.0)

  after = before(here[:, ::-1], segment_ids[:, ::-1])[:, ::-1]
  return before(here, segment_ids) + after
