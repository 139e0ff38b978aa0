#!/usr/bin/env bash
# `jax.experimental.layout.with_layout_constraint` makes an array that devices divide
# whole on each of them: jax 0.10.2, CPU, 8 devices.
#
# Expected: a layout says in which order one device keeps the numbers that it has,
# so that asking for one (here the default, row-major, which the array has anyway)
# sends nothing. Seen: the compiled program has all-gathers of the whole array before
# the constraint, and slices it again after it, as the partitioner knows no rule for
# it. Inside `jax.shard_map` the same constraint sends nothing, and with jax 0.12.0.1
# neither does the first program; Python 3.11 ends at 0.10.2.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import sys

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp

auto = jax.sharding.AxisType.Auto
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(auto, auto))
spec = jax.P("data", "tensor")
array = jax.ShapeDtypeStruct(
  (64, 128), jnp.float32, sharding=jax.NamedSharding(mesh, spec)
)


def constrained(x):
  return with_layout_constraint(2 * x, Layout((0, 1))) + 1


def by_device(x):
  return jax.shard_map(constrained, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def gathers(run):
  where = jax.NamedSharding(mesh, spec)
  text = jax.jit(run, out_shardings=where).lower(array).compile().as_text()
  return sum(" all-gather(" in line for line in text.splitlines())


found = {
  "without": gathers(lambda x: 2 * x + 1),
  "constrained": gathers(constrained),
  "constrained in shard_map": gathers(by_device),
}
print(jax.__version__, found)
as_seen = {"without": 0, "constrained": 2, "constrained in shard_map": 0}
sys.exit(0 if found == as_seen else 1)
PYTHON
XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu \
  "$folder/venv/bin/python" "$folder/program.py"
