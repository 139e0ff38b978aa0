"""d3LLM: pseudo-trajectory distillation (arXiv:2601.07568).

    L = ( CE(M) + CE(M') + beta H(M) ) / 4

M is what the teacher had not revealed yet, of a block, when it had revealed a
share of it: the student learns to reveal at once what took the teacher many
calls. The share that is hidden grows while training, and so do blocks.
"""

from collections.abc import Sequence
import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining.distillation import certainty

Order = Literal["trajectory", "random"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class D3LLM(certainty.CertaintyForcing):
  """Pseudo-trajectory distillation (Qian et al. 2026).

  Attributes:
    block_sizes: slots of a block, gone through from the first to the last by
      interpolation, `passes` times.
    passes: how often; the original's epochs.
    min_mask_ratio: the least share of a block that is hidden, at first.
    max_mask_ratio: the greatest, to which the least one rises.
    order: what is hidden: what the teacher revealed last, or a random part.
    complement: whether M' is learned from too.
  """

  block_sizes: Sequence[int] = (16, 16, 24, 24, 32, 32)
  passes: int = 6
  min_mask_ratio: float = 0.0
  max_mask_ratio: float = 0.8
  order: Order = "trajectory"
  complement: bool = True

  def __post_init__(self):
    super().__post_init__()
    # A configuration's list is no constant; a tuple is.
    object.__setattr__(self, "block_sizes", tuple(self.block_sizes))
    if not self.block_sizes or min(self.block_sizes) < 1:
      raise ValueError(
        "d3llm.block_sizes must be sizes of at least 1, not "
        f"{list(self.block_sizes)}"
      )
    check.at_least(self, 1, "passes", prefix="d3llm.")
    check.within("d3llm.max_mask_ratio", self.max_mask_ratio, "[0, 1]")
    most = self.max_mask_ratio
    check.within("d3llm.min_mask_ratio", self.min_mask_ratio, f"[0, {most}]")
    check_choice("d3llm.order", self.order, Order)

  def block_size(self, progress: Float[Array, ""]) -> Int[Array, ""]:
    """Returns the size of blocks at a share of the training."""
    sizes = jnp.asarray(self.block_sizes, jnp.float32)
    at = jnp.where(progress < 1, progress * self.passes % 1.0, 1.0)
    place = jnp.linspace(0.0, 1.0, len(self.block_sizes))
    return jnp.interp(at, place, sizes).astype(jnp.int32)

  def least_ratio(self, progress: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the least share that is hidden at a share of the training."""
    span = self.max_mask_ratio - self.min_mask_ratio
    return self.min_mask_ratio + progress * span

  def unrevealed(
    self,
    batch: certainty.Answers,
    block: Int[Array, "B"],
    size: Int[Array, ""],
    where: certainty.Region,
    ratio: Float[Array, "B"],
  ) -> Bool[Array, "B L"]:
    """Returns what the teacher had not revealed at a moment of its trajectory.

    The moment at which as many slots stood as lie before the block, and the
    share 1 - ratio of the block itself.
    """
    inside = jnp.sum(where.inside, axis=1)
    stood = block * size + ((1.0 - ratio) * inside).astype(jnp.int32)
    return batch.before >= stood[:, None]

  def draw(self, objective, process, key, batch, progress) -> certainty.Masks:
    """Returns what is hidden of a random block of the answer itself."""
    key_block, key_ratio, key_hidden = jax.random.split(key, 3)
    rows, size = batch.tokens.shape[0], self.block_size(progress)
    number = certainty.blocks_of(batch.length, size)
    block = jax.random.randint(key_block, (rows,), 0, number)
    where = certainty.region(batch, block, size, last=number - 1)
    ratio = jax.random.uniform(
      key_ratio,
      (rows,),
      minval=self.least_ratio(progress),
      maxval=self.max_mask_ratio,
    )
    if self.order == "random":
      u = jax.random.uniform(key_hidden, batch.tokens.shape)
      hidden = u < certainty.certain(ratio)[:, None]
    else:
      hidden = self.unrevealed(batch, block, size, where, ratio)
    return certainty.hide(
      batch, where, hidden, objective.mask_id, complement=self.complement
    )

  def factors(self) -> tuple[tuple[float, float], ...]:
    """Returns the factors of both terms: no entropy of M'."""
    both = (0.25, self.entropy_weight / 4), (0.25, 0.0)
    return both if self.complement else both[:1]
