r"""Classifier-free guidance: two branches of the network, one set of logits.

The batch is doubled, conditional rows first, so that every cache holds both
branches and nothing else of the program changes. With scale w,

    logits = l_u + (w + 1) (l_c - l_u),

so that 0 is the conditional network alone (arXiv:2502.09992, sec. 2.4;
arXiv:2412.10193 writes gamma = w + 1).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.types import Guide, Objective

Kind = Literal["prompt", "class"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
  """How far to go from the unconditional prediction.

  Attributes:
    scale: w; 0 for no guidance and no second branch.
    kind: what the unconditional branch does without: the "prompt" (and all
      other fixed tokens, masked there; LLaDA), or the "class" label.
    null_label: the label of rows without a class, for "class".
  """

  scale: float
  kind: Kind = "prompt"
  null_label: int | None = None

  def __post_init__(self):
    if not 0.0 <= self.scale < float("inf"):
      raise ValueError(
        f"the guidance scale must be 0 (none) or more, not {self.scale}"
      )
    if self.kind not in ("prompt", "class"):
      raise ValueError(
        f"guidance must be without the prompt or the class, not {self.kind!r}"
      )
    if self.kind == "class" and self.null_label is None:
      raise ValueError(
        "class guidance needs null_label, the label of rows without a class "
        "(the number of classes)"
      )

  def check(self, objective: Objective) -> None:
    """Raises ValueError unless the objective can be guided so."""
    if self.kind == "prompt" and objective.mask_id is None:
      raise ValueError(
        "prompt guidance masks the prompt, but "
        f"{type(objective).__name__} has no mask token: use class guidance"
      )

  def latent(
    self, objective: Objective, z: PyTree, fixed: Bool[Array, "B Q"]
  ) -> PyTree:
    """Returns both branches' latents, rows doubled."""
    if self.kind == "class":
      return jax.tree.map(lambda x: jnp.concatenate([x, x]), z)
    without = jnp.where(fixed, objective.mask_id, z)
    return jnp.concatenate([z, without])

  def cond(self, cond: Int[Array, "B"] | None) -> Int[Array, "2B"] | None:
    """Returns both branches' labels."""
    if cond is None:
      return None
    null = (
      cond if self.kind == "prompt" else jnp.full_like(cond, self.null_label)
    )
    return jnp.concatenate([cond, null])

  def guide(self) -> Guide:
    """Returns `(logits of both branches, z, t) -> logits`."""

    def join(logits: tuple[Float[Array, "B c V"], ...], z, t):
      with_it, without = logits
      return without + (self.scale + 1.0) * (with_it - without)

    return join
