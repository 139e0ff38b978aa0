"""Mesh, sharding rules and multi-host start-up."""

from dllm_jax.parallel.distributed import initialise
from dllm_jax.parallel.mesh import make_mesh, MeshConfig
from dllm_jax.parallel.sharding import (
  batch_sharding,
  global_batch,
  RULES,
  shardings,
)

__all__ = [
  "batch_sharding",
  "global_batch",
  "initialise",
  "make_mesh",
  "MeshConfig",
  "RULES",
  "shardings",
]
