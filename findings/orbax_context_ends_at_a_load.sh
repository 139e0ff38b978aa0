#!/usr/bin/env bash
# In orbax-checkpoint's v1 API a load by a Checkpointer ends the context around it.
#
# Options of Orbax are set by a block, `with ocp.Context() as ...`: those for
# loading part of a tree, for instance, or for which processes wait for each
# other. `ocp.load_pytree` may be called in it as often as one likes. The first
# `training.Checkpointer.load_checkpointables` leaves the block's context behind:
# the next load in the same block has the default options. A training loop that
# reads first its data's position and then its state in one block reads the state
# with other options than were written there; with partial loading it raises. Give each
# load a context of its own.
#
# Seen with orbax-checkpoint 0.12.8, jax 0.10.2, Python 3.11: load_pytree twice
# `a`, `a`; the Checkpointer `a`, then an error.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv env
env/bin/pip install --quiet orbax-checkpoint==0.12.8 jax==0.10.2 2>/dev/null

cat >loads.py <<'PY'
import sys

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

tree = {"a": jnp.ones(3), "b": jnp.ones(3)}
wanted = {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}


def partial():
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  return context


def twice(load):
  found = []
  with partial():
    for _ in range(2):
      try:
        found.append(",".join(load()))
      except Exception:  # of several classes
        found.append("refused")
  return found


ocp.save_pytree(f"{sys.argv[1]}/tree", tree)
steps = ocp.training.Checkpointer(f"{sys.argv[1]}/steps")
steps.save_checkpointables(0, {"state": tree})
print("load_pytree", *twice(lambda: ocp.load_pytree(f"{sys.argv[1]}/tree", wanted)))
print(
  "Checkpointer",
  *twice(lambda: steps.load_checkpointables(0, {"state": wanted})["state"]),
)
PY
JAX_PLATFORMS=cpu env/bin/python loads.py "$folder" 2>/dev/null | tee seen.txt
diff seen.txt - <<'END'
load_pytree a a
Checkpointer a refused
END
echo "as described"
