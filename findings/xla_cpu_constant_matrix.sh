#!/usr/bin/env bash
# XLA on CPUs, jaxlib 0.10.2 (0.12.0.1 too): the sum of a product with a matrix
# of one value (ones, zeros) that the program makes itself is wrong, silently.
#
# Expected: jit(lambda h: (h @ ones([64, 100])).sum()) is 100 times the sum of h.
# Seen: another number at each call, from 1e-3 to nan, of any size; right with the
# matrix as an argument, right in jaxlib 0.10.1, and right with
# XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (empty). Product, constant and
# reduction have become one fusion of kind __ynn_fusion. It is met by whoever binds
# fresh parameters with a closure or functools.partial before jax.jit.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

cat >"$folder/program.py" <<'PYTHON'
import jax, jaxlib
import jax.numpy as jnp
import numpy as np

h = np.random.default_rng(0).standard_normal((1024, 64)).astype(np.float32)
right = 100 * h.sum(dtype=np.float64)
bound = jax.jit(lambda h: (h @ jnp.ones((64, 100))).sum())
given = jax.jit(lambda h, w: (h @ w).sum())
found = [float(bound(h)) for _ in range(5)]
argument = float(given(h, np.ones((64, 100), np.float32)))
near = lambda x: abs(x - right) < 1.0
print(f"jaxlib {jaxlib.__version__}: right {right:.2f}, constant {found},"
      f" argument {argument:.2f}")
assert near(argument)
print("RIGHT" if all(map(near, found)) else "WRONG")
PYTHON
run() { JAX_PLATFORMS=cpu "$@" "$folder/venv/bin/python" "$folder/program.py"; }

install jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
wrong=$(run env XLA_FLAGS=)
flagged=$(run env XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=)
install jax==0.10.1 jaxlib==0.10.1
before=$(run env XLA_FLAGS=)
printf '%s\n' "$wrong" "without that fusion:" "$flagged" "$before"
[[ $wrong == *WRONG && $flagged == *RIGHT && $before == *RIGHT ]]
