"""Mesh, sharding rules and multi-host start-up."""

from dllm_jax.parallel.compilation import (
  enable_compilation_cache,
  step_options,
)
from dllm_jax.parallel.distributed import initialise
from dllm_jax.parallel.mesh import check_batches, make_mesh, MeshConfig
from dllm_jax.parallel.sharding import (
  batch_sharding,
  global_batch,
  row_share,
  RULES,
  shardings,
)

__all__ = [
  "batch_sharding",
  "check_batches",
  "enable_compilation_cache",
  "global_batch",
  "initialise",
  "make_mesh",
  "MeshConfig",
  "row_share",
  "RULES",
  "shardings",
  "step_options",
]
