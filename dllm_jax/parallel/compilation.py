"""Compiled programs, kept on disk."""

import os
import pathlib

import jax


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a second start takes seconds.

  In `JAX_COMPILATION_CACHE_DIR` where it is set, else in the user's cache
  directory.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = str(pathlib.Path(base) / "dllm_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
