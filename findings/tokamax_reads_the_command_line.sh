#!/usr/bin/env bash
# A call of tokamax reads the command line of whatever program makes it.
#
# tokamax has options as absl flags. Its kernels may be called from any program;
# the first call parses `sys.argv` by itself unless absl's flags are parsed already,
# and raises UnrecognizedFlagError for each option that the program defines in
# another way (argparse, click, fire). A function that multiplies matrices so fails
# in a trainer with `--config=...` and works in a notebook. Programs without absl
# can call `absl.flags.FLAGS.mark_as_parsed()` once before it.
#
# Seen with tokamax 0.0.12, jax 0.10.2, Python 3.11, on a CPU: without options the
# product; with `--config=x` UnrecognizedFlagError; marked as parsed, the product.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv env
env/bin/pip install --quiet tokamax==0.0.12 jax==0.10.2 2>/dev/null

cat >product.py <<'PY'
import os

from absl import flags
import jax.numpy as jnp
import tokamax

if os.environ.get("MARK"):
  flags.FLAGS.mark_as_parsed()
try:
  y = tokamax.ragged_dot(
    jnp.ones((8, 4)), jnp.ones((2, 4, 4)), jnp.array([4, 4]), implementation="xla"
  )
  print(float(y.sum()))
except flags.Error as error:
  print(type(error).__name__)
PY
export JAX_PLATFORMS=cpu
{
  env/bin/python product.py
  env/bin/python product.py --config=x
  MARK=1 env/bin/python product.py --config=x
} 2>/dev/null | tee seen.txt
diff seen.txt - <<'END'
128.0
UnrecognizedFlagError
128.0
END
echo "as described"
