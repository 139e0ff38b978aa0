"""How programs are compiled, and that they are kept on disk."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import importlib.metadata
import math
import os
import types
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.axes import platform

# Products whose weights come from other chips are not cut into one part for each
# chip: every part would read and write the whole sum.
_STEP_OPTIONS: Mapping[str, Mapping[str, str]] = types.MappingProxyType({
  "tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
})
# A product of few rows is left to what is measured on the device, or to its library:
# XLA's own rule would cut its sum in two, which are written and read in float32 by
# all that follow.
_GPU_CALL_OPTIONS: Mapping[str, int] = types.MappingProxyType({
  "xla_gpu_experimental_force_split_k": 1
})
# XLA slices bfloat16 on CPUs by way of float32: what a loop over layers reads would be
# widened before the loop, of all layers at once, at each call of the program.
_CPU_CALL_OPTIONS: Mapping[str, str] = types.MappingProxyType({
  "xla_disable_hlo_passes": "while-loop-invariant-code-motion"
})
# jaxlib 0.10.2 to 0.12.0.1, at least, return garbage on CPUs for the product with
# a constant matrix of one value (ones, zeros) that is then reduced, where YNNPACK
# computes both in one: it fuses nothing under this option, which is not slower.
# It goes with the last version that needs it.
_CPU_OPTIONS: Mapping[str, str] = types.MappingProxyType({
  "xla_cpu_experimental_ynn_fusion_type": ""
})
# Only YNNPACK multiplies bfloat16 as such, with AMX several times as fast as float32.
# Products that it computes by themselves are right.
_CPU_BFLOAT16_OPTIONS: Mapping[str, str] = types.MappingProxyType({
  "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
})


def jit(
  fn: Callable,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
  options: Mapping[str, int | str] | None = None,
  **fields: Any,
) -> jax.stages.Wrapped:
  """Returns a function as a program, compiled as its platform needs it.

  Every program of this package is made here. It cannot be part of another one:
  XLA takes options of whole programs only.

  Args:
    fn: what to launch.
    mesh: the devices; by default those of the mesh that is set, or jax's own.
    dtype: what its products multiply (`Denoiser.dtype`).
    options: XLA's, besides.
    **fields: of `jax.jit`.
  """
  where = _platform(mesh)
  own = _cpu_options() if where == "cpu" else {}
  if own and dtype == "bfloat16" and _cpu_knows_bfloat16():
    own = _CPU_BFLOAT16_OPTIONS
  return jax.jit(fn, compiler_options={**own, **(options or {})}, **fields)


def step_options(mesh: jax.sharding.Mesh) -> dict[str, str]:
  """Returns XLA's options for a train step, by the platform of its devices."""
  return dict(_STEP_OPTIONS.get(mesh.devices.flat[0].platform, {}))


def call_options(
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, int | str]:
  """Returns XLA's options for programs that call a network on few positions.

  Args:
    mesh: as of `jit`.
  """
  where = _platform(mesh)
  if where in ("cpu", "tpu"):
    return dict(_CPU_CALL_OPTIONS) if where == "cpu" else {}
  # Of a machine that is not here, the version is that of the plans.
  here = jax.default_backend() == "gpu"
  return {} if here and not _gpu_knows() else dict(_GPU_CALL_OPTIONS)


def _platform(mesh: jax.sharding.Mesh | None) -> str:
  return platform() if mesh is None else mesh.devices.flat[0].platform


@functools.cache
def _gpu_knows() -> bool:
  return _compiles(_GPU_CALL_OPTIONS)


def _compiles(options: Mapping[str, Any]) -> bool:
  """Returns whether this version has these options of XLA."""
  try:
    jax.jit(lambda: 0, compiler_options=options).lower().compile()
  except jax.errors.JaxRuntimeError:
    return False
  return True


def wrong_products() -> bool:
  """Whether this process's XLA returns wrong products with matrices of ones.

  In programs that are not made by `jit`; on CPUs.
  """
  rows, width, columns = shape = (1024, 64, 100)
  with _one_cpu():
    program = jax.jit(lambda x: jnp.sum(x @ jnp.ones(shape[1:])))
    ones = jax.device_put(np.ones((rows, width), np.float32))
    found = jax.device_get(program(ones))
  return not np.isclose(found, rows * width * columns, rtol=1e-3)


def _one_cpu():
  """Returns a context that leaves the mesh, whatever it is, for one CPU."""
  cpu = jax.local_devices(backend="cpu")[:1]
  return jax.set_mesh(jax.sharding.Mesh(np.asarray(cpu), ("all",)))


@functools.cache
def _cpu_options() -> Mapping[str, str]:
  """Returns XLA's options for CPUs; warns once if other programs need them."""
  if all(
    f"--{name}=" in os.environ.get("XLA_FLAGS", "") for name in _CPU_OPTIONS
  ):
    return _CPU_OPTIONS  # known, or XLA had ended the process, and in force
  with _one_cpu():
    if not _compiles(_CPU_OPTIONS):
      return {}
  if wrong_products():
    ((name, _),) = _CPU_OPTIONS.items()
    version = importlib.metadata.version("jaxlib")
    warnings.warn(
      f"jaxlib {version} computes wrong products with matrices of ones on CPUs;"
      " dllm_jax's own programs are right, for yours set"
      f" XLA_FLAGS=--{name}= before jax starts",
      stacklevel=1,
    )
  return _CPU_OPTIONS


@functools.cache
def _cpu_knows_bfloat16() -> bool:
  with _one_cpu():
    return _compiles(_CPU_BFLOAT16_OPTIONS)


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a second start takes seconds.

  In `JAX_COMPILATION_CACHE_DIR` where it is set, else in the user's cache
  directory: those that took `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`, else
  0.3 seconds.
  """
  given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  directory = paths.expanded(given or f"{base}/dllm_jax/xla")
  if directory != given:  # else jax has read it
    jax.config.update("jax_compilation_cache_dir", directory)
  if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@contextlib.contextmanager
def not_kept() -> Iterator[None]:
  """Keeps no program on disk, of a machine that is not here: none is read back."""
  name = "jax_persistent_cache_min_compile_time_secs"
  least = getattr(jax.config, name)
  jax.config.update(name, math.inf)
  try:
    yield
  finally:
    jax.config.update(name, least)
