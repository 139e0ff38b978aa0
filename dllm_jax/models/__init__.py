"""Networks behind `Denoiser(init, apply)`; the only room that knows Flax."""

from dllm_jax.models.attention import attention
from dllm_jax.models.cache import empty_cache
from dllm_jax.models.dit import DiTConfig, dit
from dllm_jax.models.transformer import TransformerConfig, transformer
