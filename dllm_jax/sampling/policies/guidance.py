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

Kind = Literal["prompt", "class", "empty"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
  """How far to go from the unconditional prediction.

  Attributes:
    scale: w; 0 for no guidance and no second branch.
    kind: what the unconditional branch does without: the "prompt" (and all
      other fixed tokens, masked there; LLaDA), the "class" label, or what an
      "empty" prompt does not say (MMaDA).
    null_label: the label of rows without a class, for "class".
    prompt: what stands at the start of rows without a prompt, for "empty".
    hidden: the token of it that is not seen.
  """

  scale: float
  kind: Kind = "prompt"
  null_label: int | None = None
  prompt: tuple[int, ...] = ()
  hidden: int | None = None

  def __post_init__(self):
    if not 0.0 <= self.scale < float("inf"):
      raise ValueError(
        f"the guidance scale must be 0 (none) or more, not {self.scale}"
      )
    if self.kind not in ("prompt", "class", "empty"):
      raise ValueError(
        f"guidance must be without the prompt or the class, or with an empty"
        f" prompt, not {self.kind!r}"
      )
    if self.kind == "empty" and not self.prompt:
      raise ValueError("guidance by an empty prompt needs its tokens")
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
    if self.kind == "empty":
      # The sampler works on whole canvases here: slot i is column i.
      empty = jnp.asarray(self.prompt, z.dtype)
      without = z.at[:, : len(self.prompt)].set(empty)
      return jnp.concatenate([z, without])
    without = jnp.where(fixed, objective.mask_id, z)
    return jnp.concatenate([z, without])

  def segments(self, segment_ids: Int[Array, "B Q"]) -> Int[Array, "2B Q"]:
    """Returns both branches' segments: what an empty prompt hides is hidden."""
    without = segment_ids
    if self.kind == "empty":
      seen = jnp.asarray([t != self.hidden for t in self.prompt], jnp.int32)
      without = without.at[:, : len(self.prompt)].set(seen)
    return jnp.concatenate([segment_ids, without])

  def cond(self, cond: Int[Array, "B"] | None) -> Int[Array, "2B"] | None:
    """Returns both branches' labels."""
    if cond is None:
      return None
    null = (
      jnp.full_like(cond, self.null_label) if self.kind == "class" else cond
    )
    return jnp.concatenate([cond, null])

  def guide(self) -> Guide:
    """Returns `(logits of both branches, z, t) -> logits`."""

    def join(logits: tuple[Float[Array, "B c V"], ...], z, t):
      with_it, without = logits
      return without + (self.scale + 1.0) * (with_it - without)

    return join
