"""dParallel: certainty-forcing distillation (arXiv:2509.26488).

    L = CE(M) + CE(M') + beta (H(M) + H(M'))

with half of a block hidden, as `certainty` draws it: beta 2, and H at
temperature 0.5 over predictions that are right.
"""

import dataclasses

import jax

from dllm_jax.core import check
from dllm_jax.posttraining.distillation import certainty


@dataclasses.dataclass(frozen=True, kw_only=True)
class DParallel(certainty.CertaintyForcing):
  """Certainty-forcing distillation (Chen et al. 2025).

  Attributes:
    block_size: slots of a block, counted from each prompt's end.
    mask_ratio: the share of a block that is hidden.
  """

  block_size: int = 32
  mask_ratio: float = 0.5

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 1, "block_size", prefix="dparallel.")
    check.within("dparallel.mask_ratio", self.mask_ratio, "[0, 1]")

  def draw(self, objective, process, key, batch, progress) -> certainty.Masks:
    """Returns what is hidden: half of a random block of all that counts."""
    key_block, key_hidden = jax.random.split(key)
    rows = batch.tokens.shape[0]
    number = certainty.blocks_of(certainty.counted(batch), self.block_size)
    block = jax.random.randint(key_block, (rows,), 0, number)
    where = certainty.region(batch, block, self.block_size, last=number - 1)
    u = jax.random.uniform(key_hidden, batch.tokens.shape)
    hidden = u < certainty.certain(self.mask_ratio)
    return certainty.hide(batch, where, hidden, objective.mask_id)

  def factors(self) -> tuple[tuple[float, float], ...]:
    """Returns the factors of both terms, alike for M and M'."""
    return ((1.0, self.entropy_weight),) * 2

  def width(self, length: int) -> int:
    """Returns the most tokens of a row that are hidden in its block."""
    return min(self.block_size, length)
