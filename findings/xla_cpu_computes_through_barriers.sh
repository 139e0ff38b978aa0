#!/usr/bin/env bash
# XLA's CPU compiler computes again, in each loop that reads it and for each element,
# what stands before `jax.lax.optimization_barrier`: jax 0.10.2.
#
# Expected: a value behind a barrier is computed once, as the mask of packed rows,
# 4 x 256 x 256 comparisons of segment ids, which the scores of 6 heads read. Seen:
# barriers are gone before loops are fused, so that the loop over the exponentials
# of all heads has the comparison inside, and what the ids come from, with the
# barrier as without. Kept as the result of a condition whose predicate is not known
# before it runs, the mask is computed alone. Times are printed: that of the
# condition was least in every run.
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

rows, heads, length = 4, 6, 256
scores = jnp.ones((rows, heads, length, length))
ids = jnp.ones((3, rows, length), jnp.int32)
lengths = jnp.full((rows,), length)


def condition(mask):
  some = (mask.ravel()[0] != 0).astype(jnp.float32)
  return lax.cond(some == some, lambda m: m, jnp.zeros_like, mask)


def program(keep):
  def run(scores, ids, at, lengths):
    own = lax.dynamic_index_in_dim(ids, at, 0, keepdims=False)
    own = jnp.where(jnp.arange(length) < lengths[:, None], own, 0)
    mask = keep(own[:, :, None] == own[:, None, :])
    scores = jnp.where(mask[:, None], scores, -1e30)
    return jnp.exp(scores - lax.slice_in_dim(scores, 0, 1, axis=-1))

  return jax.jit(run).lower(scores, ids, 1, lengths).compile()


ways = {
  "alone": lambda mask: mask,
  "barrier": lax.optimization_barrier,
  "condition": condition,
}
programs = {name: program(keep) for name, keep in ways.items()}


def inside(compiled):
  """Whether a computation has comparisons of ids and exponentials."""
  parts = compiled.as_text().split("\n}\n")
  return any(
    " exponential(" in one and "direction=EQ" in one for one in parts
  )


found = {name: inside(one) for name, one in programs.items()}
seconds = {name: [] for name in programs}
for _ in range(25):
  for name, one in programs.items():
    start = time.perf_counter()
    jax.block_until_ready(one(scores, ids, 1, lengths))
    seconds[name].append(time.perf_counter() - start)
print(jax.__version__, "comparisons in the loop of exponentials:", found)
print({k: f"{1e3 * statistics.median(v):.1f} ms" for k, v in seconds.items()})
as_seen = {"alone": True, "barrier": True, "condition": False}
sys.exit(0 if found == as_seen else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
