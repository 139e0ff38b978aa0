"""Configurations: files, their fields, and the objects made of them."""

from dllm_jax.config.config import (
  check_overrides,
  Config,
  differences,
  load,
  parse,
  resolve,
  stored,
)

__all__ = [
  "check_overrides",
  "Config",
  "differences",
  "load",
  "parse",
  "resolve",
  "stored",
]
