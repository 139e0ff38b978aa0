"""A working directory and what it can do; published folders in and out."""

from dllm_jax.run.run import Run

__all__ = ["Run"]
