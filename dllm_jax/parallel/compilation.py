"""How programs are compiled, and that they are kept on disk."""

from collections.abc import Mapping
import os
import pathlib
import types

import jax

# Products whose weights come from other chips are not cut into one part for each
# chip: every part would read and write the whole sum.
_STEP_OPTIONS: Mapping[str, Mapping[str, str]] = types.MappingProxyType({
  "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
})


def step_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
  """Returns XLA's options for a train step, by the platform of its devices."""
  return dict(_STEP_OPTIONS.get(mesh.devices.flat[0].platform, {}))


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
