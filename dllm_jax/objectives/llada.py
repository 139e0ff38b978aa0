r"""LLaDA: masked diffusion at scale (arXiv:2502.09992).

The mask probability is the time itself, t = (1 - eps) u + eps, drawn on its own
for each row, and a masked token weighs 1 / t. One batch in a hundred of
pre-training is cut to a random length. Fine-tuning keeps the prompt
(`loss_mask` False), pads answers by end-of-text tokens that count, and divides
each answer's loss by its length (`normalisation="sequence"`).
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from dllm_jax.core.schedule import Linear, Schedule, SCHEDULES
from dllm_jax.core.time import TimeRule
from dllm_jax.core.types import Loss, Process
from dllm_jax.objectives.base import Discrete, Drawn
from dllm_jax.objectives.mdlm import MDLM, Parameterisation


@struct.dataclass
class Cut(Drawn):
  """The randomness of a loss.

  Attributes:
    length: how many tokens of the row are used; the same for a whole batch.
  """

  length: Int[Array, "B"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLaDA(MDLM):
  """Large language diffusion with masking (Nie et al. 2025).

  Attributes:
    schedule: alpha(t) = 1 - t.
    time_rule: "independent" is the published one.
    random_length: the probability that a batch is cut to a length from 1 to L;
      0.01 in pre-training, 0 in fine-tuning.

  Examples:
    >>> llada = LLaDA(vocab_size=5, mask_id=4)
    >>> float(llada.masked(0.5)), float(llada.weight(0.5))
    (0.5, 2.0)
    >>> tuned = LLaDA(vocab_size=5, mask_id=4, normalisation="sequence")
  """

  schedule: Schedule = dataclasses.field(
    default=Linear(), metadata={"choices": SCHEDULES}
  )
  time_rule: TimeRule = "independent"
  parameterisation: Parameterisation = "softmax"
  random_length: float = 0.01

  def __post_init__(self):
    super().__post_init__()
    if not 0.0 <= self.random_length <= 1.0:
      raise ValueError(
        f"random_length is a probability, not {self.random_length}"
      )

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns the probability of a cut, which evaluation sets to 0."""
    return Process(state={"random_length": jnp.float32(self.random_length)})

  def unbiased(self, process: Process) -> Process:
    """Returns the process that cuts nothing."""
    return process.replace(state={"random_length": jnp.float32(0.0)})

  def draw(self, process, key, batch, *, step) -> Cut:
    """Returns times, corrupted rows and the length that is used of them."""
    key_rest, key_coin, key_length = jax.random.split(key, 3)
    drawn = super().draw(process, key_rest, batch, step=step)
    rows, full = batch.tokens.shape
    cut = jax.random.bernoulli(key_coin, process.state["random_length"])
    length = jax.random.randint(key_length, (), 1, full + 1)
    length = jnp.broadcast_to(jnp.where(cut, length, full), (rows,))
    return Cut(t=drawn.t, z=drawn.z, length=length)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of the rows' first tokens, as many as were drawn."""
    if drawn.length is not None:
      used = jnp.arange(batch.tokens.shape[1]) < drawn.length[:, None]
      batch = batch.replace(
        loss_mask=batch.loss_mask & used,
        segment_ids=jnp.where(used, batch.segment_ids, 0),
      )
    return super().loss(process, denoise, drawn, batch, step=step)

  grid = Discrete.grid  # even times from 1 to 0
