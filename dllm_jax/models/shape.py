"""What the configs of all networks check and derive alike."""

from dllm_jax.core.types import KVCache
from dllm_jax.models import layers
from dllm_jax.models.attention.dispatch import check_implementation
from dllm_jax.models.cache import empty_cache
from dllm_jax.models.quantised import check_matmul


class Shape:
  """Base of a network's config, whose fields it reads."""

  def check_common(self) -> None:
    """Checks the fields that all networks have.

    Raises:
      ValueError: one has an illegal value.
    """
    layers.check_at_least(self, 0, "num_classes")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
    if self.tied and (self.latent_dim or self.output_dim):
      raise ValueError(
        "tied=True needs token inputs and logits: unset latent_dim and"
        " output_dim, or set tied=False"
      )
    layers.check_choice("dtype", self.dtype, layers.DTYPES)
    layers.check_choice("param_dtype", self.param_dtype, layers.DTYPES)
    layers.check_choice("remat", self.remat, layers.REMAT)
    check_implementation(self.attention, self.context)
    check_matmul(self.matmul)

  @property
  def padded_vocab(self) -> int:
    """The vocabulary with its padding."""
    return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

  def cache(self, batch: int, slots: int) -> KVCache:
    """Returns an empty cache for this network."""
    return empty_cache(
      layers=self.layers,
      batch=batch,
      slots=slots,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      dtype=self.dtype,
    )
