#!/usr/bin/env bash
# XLA's CPU compiler multiplies bfloat16 at the speed of float32, or slower, unless
# the sum is asked for in float32: jax 0.10.2.
#
# Expected: `x @ w` of two bfloat16 arrays runs on a processor's bfloat16 units (AMX,
# AVX-512 BF16), as in PyTorch, and asking for a float32 result costs more, as twice
# the bytes are written. Seen, on 2 cores of an Intel Xeon with AMX: both factors are
# converted to float32, copies of a whole matrix at every call, and multiplied so. With
# `preferred_element_type=jnp.float32`, rounded to bfloat16 afterwards, the product is
# one of YNNPACK's, which takes bfloat16 as it is: a third to a fifth of the time. Not
# so if both factors are contracted over their first axes, as the gradient of a matrix
# is, or if there is a single row, as where text is decoded token by token: those are
# float32 either way, with a float32 copy of the matrix. Times are printed.
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

rows, width, columns = 256, 512, 1536
random = lambda seed, *shape: jax.random.normal(
  jax.random.key(seed), shape, jnp.bfloat16
)
x, w = random(0, rows, width), random(1, width, columns)
gradient = random(2, rows, columns)


def product(a, b, axes, **fields):
  dimensions = ((axes[:1], axes[1:]), ((), ()))
  return lax.dot_general(a, b, dimensions, **fields).astype(jnp.bfloat16)


wide = {"preferred_element_type": jnp.float32}
ways = {
  "x @ w": (lambda a, b: product(a, b, (1, 0)), x, w),
  "x @ w, summed to float32": (lambda a, b: product(a, b, (1, 0), **wide), x, w),
  "g @ w.T, summed to float32": (
    lambda a, b: product(a, b, (1, 1), **wide), gradient, w,
  ),
  "x.T @ g, summed to float32": (
    lambda a, b: product(a, b, (0, 0), **wide), x, gradient,
  ),
  "x[:1] @ w, summed to float32": (
    lambda a, b: product(a, b, (1, 0), **wide), x[:1], w,
  ),
  "x[:2] @ w, summed to float32": (
    lambda a, b: product(a, b, (1, 0), **wide), x[:2], w,
  ),
}
programs = {
  name: jax.jit(fn).lower(a, b).compile() for name, (fn, a, b) in ways.items()
}
wide_copy = lambda a: "f32[" + ",".join(map(str, a.shape)) + "]"
native = {
  name: not any(wide_copy(a) in program.as_text() for a in ways[name][1:])
  for name, program in programs.items()
}
seconds = {name: [] for name in ways}
for _ in range(31):
  for name, (_, a, b) in ways.items():
    start = time.perf_counter()
    programs[name](a, b).block_until_ready()
    seconds[name].append(time.perf_counter() - start)
print(jax.__version__)
for name, taken in seconds.items():
  way = "as bfloat16" if native[name] else "as float32"
  print(f"{name}: {way}, {1e3 * statistics.median(taken):.2f} ms")
expected = [False, True, True, False, False, True]
sys.exit(0 if list(native.values()) == expected else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
