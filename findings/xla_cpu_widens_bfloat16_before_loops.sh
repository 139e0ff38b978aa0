#!/usr/bin/env bash
# XLA's CPU compiler makes a float32 copy of all bfloat16 weights that a loop reads,
# before the loop: jax 0.10.2.
#
# Expected: a scan over stacked bfloat16 matrices, within a loop over steps, as a
# sampler has it, needs memory for what it works on; CPUs multiply in float32, so
# that a matrix is widened where it is read. Seen: what widens one layer's matrix is
# turned into what widens the whole stack, does not depend on the loop and is moved
# out of both, so that temporary memory is twice the weights, three times as much in
# all, and every call of the program pays for writing it. A matrix that is sliced is
# then rounded to bfloat16 and widened once more. With that pass off (the compiler's
# option xla_disable_hlo_passes=while-loop-invariant-code-motion) the results are the
# same, and temporary memory is that of a layer. Times are printed.
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

layers, width, rows, steps = 16, 1024, 32, 2
shape = (layers, width, width)
weights = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) / width**0.5
x = jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)


def network(x, weights):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def sampler(x, weights):
  return lax.fori_loop(0, steps, lambda _, x: network(x, weights), x)


def program(options):
  jitted = jax.jit(sampler, compiler_options=options)
  return jitted.lower(x, weights).compile()


ways = {
  "as it is": program({}),
  "pass off": program(
    {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
  ),
}
stack = "f32[" + ",".join(map(str, shape)) + "]"
found, seconds = {}, {name: [] for name in ways}
for name, one in ways.items():
  entry = one.as_text().partition("\nENTRY ")[2]
  temporary = one.memory_analysis().temp_size_in_bytes / weights.nbytes
  found[name] = f" = {stack}" in entry, round(temporary, 2)
results = [np.asarray(one(x, weights), np.float32) for one in ways.values()]
for _ in range(15):
  for name, one in ways.items():
    start = time.perf_counter()
    jax.block_until_ready(one(x, weights))
    seconds[name].append(time.perf_counter() - start)
same = bool((results[0] == results[1]).all())
print(jax.__version__, "float32 stack before the loop, temporary memory over")
print("that of the weights:", found, "same results:", same)
print({k: f"{1e3 * statistics.median(v):.1f} ms" for k, v in seconds.items()})
widened, kept = found["as it is"], found["pass off"]
as_seen = widened[0] and widened[1] >= 2 and not kept[0] and kept[1] < 0.5
sys.exit(0 if as_seen and same else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
