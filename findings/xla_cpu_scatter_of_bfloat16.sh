#!/usr/bin/env bash
# XLA's CPU compiler converts all of a bfloat16 array to float32 and back to write a
# few rows of it: jax 0.10.2.
#
# Expected: in a loop that carries a cache of keys, `cache.at[layer, row, slot].set(new)`
# writes what is new in place, as it does in float32, and in bfloat16 with half the
# bytes. Seen: there is no scatter of bfloat16 on CPUs, so that every write makes a
# float32 copy of the whole cache, scatters into that and converts all of it back: the
# time grows with the cache and not with what is written, 100 times that of float32
# here. The bits of the same numbers, as uint16, are written in place, with the same
# result. `jax.vmap` of `lax.dynamic_update_slice` is such a scatter too. Times are
# printed.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import statistics
import sys
import time

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

layers, rows, slots, width = 12, 8, 416, 512
shape, steps = (layers, rows, slots, width), 24
slot = jnp.arange(rows) * 7
new = jax.random.normal(jax.random.key(0), (rows, width), jnp.bfloat16)


def write(cache, new):
  def step(i, cache):
    return cache.at[i % layers, jnp.arange(rows), slot + i].set(new)

  return lax.fori_loop(0, steps, step, cache)


bits = lambda x: lax.bitcast_convert_type(x, jnp.uint16)
values = {
  "float32": new.astype(jnp.float32),
  "bfloat16": new,
  "bfloat16, as its bits": bits(new),
}
caches = {name: jnp.zeros(shape, x.dtype) for name, x in values.items()}
programs = {
  name: jax.jit(write, donate_argnums=0).lower(caches[name], x).compile()
  for name, x in values.items()
}
# What a loop's body makes; in place, nothing is as large as the cache.
copied = {
  name: " convert(" in program.as_text() for name, program in programs.items()
}
seconds = {name: [] for name in values}
for _ in range(9):
  for name, x in values.items():
    start = time.perf_counter()
    caches[name] = jax.block_until_ready(programs[name](caches[name], x))
    seconds[name].append((time.perf_counter() - start) / steps)
half = np.asarray(caches["bfloat16"]).view(np.uint16)
same = (half == np.asarray(caches["bfloat16, as its bits"])).all()
print(jax.__version__, "same bits:", bool(same))
for name, taken in seconds.items():
  way = "all converted" if copied[name] else "in place"
  print(f"{name}: {way}, {1e3 * statistics.median(taken):.3f} ms a write")
as_seen = list(copied.values()) == [False, True, False]
sys.exit(0 if as_seen and same else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
