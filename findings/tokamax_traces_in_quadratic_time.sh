#!/usr/bin/env bash
# To trace N calls of tokamax takes time like N squared: tokamax 0.0.12, jax 0.10.2.
#
# Expected: under `jax.jit`, each call of `tokamax.ragged_dot` costs Python the same
# few milliseconds, as those of `jax.lax` do.
# Seen: each call asks its arguments for their devices. A traced array has none and
# raises jax's ConcretizationTypeError, which tokamax catches; but to word that
# error, jax walks through all equations of the program so far. A network of 90
# products whose layers are written out so takes minutes to trace, longer than XLA
# compiles it. A call in a `jax.jit` of its own is traced by itself, walks through
# nothing, and is found again by its shapes.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  tokamax==0.0.12 jax==0.10.2 jaxlib==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import time

from absl import flags
import jax
import jax.numpy as jnp
import tokamax

flags.FLAGS.mark_as_parsed()


def seconds(product, layers):
  """Returns how long it takes to trace layers of 31 operations each."""

  def network(x, kernels, sizes):
    for kernel in kernels:
      for _ in range(30):
        x = jnp.tanh(x)
      x = product(x, kernel, sizes)
    return x

  kernels = [jnp.ones((2, 8, 8))] * layers
  start = time.perf_counter()
  jax.jit(network).trace(jnp.ones((8, 8)), kernels, jnp.array([4, 4]))
  return time.perf_counter() - start


plain = lambda *args: tokamax.ragged_dot(*args, implementation="xla")
alone = jax.jit(plain)
found = {}
for name, product in (("as it is", plain), ("in a jit of its own", alone)):
  seconds(product, 1)
  found[name] = [seconds(product, layers) for layers in (20, 80)]
  print(name + ": {:.2f} s of 20 layers, {:.2f} s of 80".format(*found[name]))
few, many = found["as it is"]
assert many > 6 * few, "four times the layers took about four times as long"
assert many > 8 * found["in a jit of its own"][1]
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null ||
  { echo "this has changed"; exit 1; }
