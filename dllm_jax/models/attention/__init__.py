"""Attention: one function, its kernels, and positions over devices."""

from dllm_jax.models.attention.dispatch import attention

__all__ = ["attention"]
