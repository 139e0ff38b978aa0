"""Networks behind `Denoiser(init, apply)`; the only room that knows Flax."""

from dllm_jax.models.attention.dispatch import attention
from dllm_jax.models.cache import empty_cache
from dllm_jax.models.dit import dit, DiTConfig
from dllm_jax.models.merge import merge_adapters
from dllm_jax.models.transformer import transformer, TransformerConfig

__all__ = [
  "attention",
  "dit",
  "DiTConfig",
  "empty_cache",
  "merge_adapters",
  "transformer",
  "TransformerConfig",
]
