r"""An image tokenizer's training: pictures back from their codes (arXiv:2310.05737).

A row is a picture, a token a pixel: red, green and blue, a byte each. The network
is an autoencoder with a lookup-free code (`models.image_tokenizer`):

    L = mean |x - y| + mean (x - y)^2 + a L_commitment + b L_entropy

Deviates: the published one was trained with a discriminator and features of
another network besides, by a script that was not published. Nothing is diffused:
`diffuses` is False, and no sampler takes it.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core import check
from dllm_jax.core.images import lookup_free
from dllm_jax.core.types import Batch, Loss, ModelInputs
from dllm_jax.objectives.base import Discrete, Drawn, TokenSpace


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAGVIT2(Discrete):
  """Reconstruction through a lookup-free code.

  Attributes:
    commitment: the factor a, of features that are far from their code.
    entropy: the factor b, of bits that are unsure, or always the same.
    beta: the share of the straight-through term in the first (`lookup_free`).
  """

  commitment: float = 0.1
  entropy: float = 0.1
  beta: float = 0.25

  diffuses = False

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 0.0, "commitment", "entropy", "beta")

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over pixels, which have no mask."""
    return cls(vocab_size=space.mask_id, **fields)

  def inputs(self, process, z, t, batch) -> ModelInputs:
    """Returns the pixels of rows, in [-1, 1]."""
    return ModelInputs(
      latent=pixels(z),
      positions=batch.positions,
      segment_ids=batch.segment_ids,
    )

  def draw(self, process, key, batch: Batch, *, step) -> Drawn:
    """Returns the rows as they are: nothing is random."""
    return Drawn(t=jnp.zeros((batch.tokens.shape[0], 1)), z=batch.tokens)

  def loss(self, process, denoise, drawn, batch: Batch, *, step) -> Loss:
    """Returns the loss, a mean over pictures.

    The bound is the squared error of a pixel: nats under normal noise of
    deviation 1/sqrt(2), up to a constant.
    """
    out = denoise(self.inputs(process, drawn.z, drawn.t, batch))
    x = pixels(batch.tokens)
    counted = batch.loss_mask[..., None]
    off = jnp.where(counted, out.hidden.astype(jnp.float32) - x, 0.0)
    rows = jnp.any(batch.loss_mask, axis=1)
    number = jnp.sum(rows, dtype=jnp.float32)
    area = x.shape[1] * x.shape[2]
    total = jnp.sum(jnp.abs(off) + off**2) / area
    z = out.aux["features"].astype(jnp.float32)
    kept, spread = lookup_free.terms(z, beta=self.beta)
    total += number * (self.commitment * kept + self.entropy * spread)
    used = jnp.mean(z > 0, axis=tuple(range(z.ndim - 1)))
    return Loss(
      total=total,
      weight=number,
      bound=jax.lax.stop_gradient(jnp.sum(off**2, axis=-1)),
      metrics={
        "psnr": -10.0 * jnp.log10(jnp.mean(off**2) / 4.0 + 1e-10),
        "bits_in_use": jnp.sum((used > 0.02) & (used < 0.98)),
      },
    )


def pixels(tokens: Int[Array, "B L"]) -> Float[Array, "B L 3"]:
  """Returns values in [-1, 1] of pixels that are numbers."""
  shifts = jnp.asarray([16, 8, 0], tokens.dtype)
  channels = (tokens[..., None] >> shifts) & 255
  return channels.astype(jnp.float32) / 127.5 - 1.0
