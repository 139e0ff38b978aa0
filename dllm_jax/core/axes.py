"""Names of the mesh axes, the one thing that numerics know of a mesh."""

import math

import jax

DATA, FSDP, TENSOR, CONTEXT, EXPERT = (
    "data",
    "fsdp",
    "tensor",
    "context",
    "expert",
)
AXES = (DATA, FSDP, TENSOR, CONTEXT, EXPERT)
BATCH_AXES = (DATA, FSDP, EXPERT)
"""The axes that divide the rows of a batch."""


def axis_size(*names: str) -> int:
  """Returns the product of the named axes of the current mesh; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names if name in mesh.shape)
