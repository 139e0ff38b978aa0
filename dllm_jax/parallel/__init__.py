"""Mesh, sharding rules and multi-host start-up."""

from dllm_jax.parallel.distributed import initialise
from dllm_jax.parallel.mesh import MeshConfig, make_mesh
from dllm_jax.parallel.sharding import (
    RULES,
    batch_sharding,
    global_batch,
    shardings,
)
