"""The mesh, where arrays lie on it, and several hosts.

`make_mesh(MeshConfig(fsdp=8))` makes a mesh of the five axes, `shardings` places a
tree by `RULES`, `global_batch` makes one array of each process's rows,
`initialise` joins the processes of a job.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "compilation": ["enable_compilation_cache", "step_options"],
    "distributed": ["initialise"],
    "mesh": ["check_batches", "make_mesh", "MeshConfig"],
    "sharding": [
      "batch_sharding",
      "global_batch",
      "row_share",
      "RULES",
      "shardings",
    ],
  },
)
