#!/usr/bin/env bash
# `flax.linen.scan(check_constancy_invariants=False)` gives other initial parameters
# for the same key than the default does: flax 0.12.8 with jax 0.10.2.
#
# Expected: the option leaves out a check and its extra trace, which is what it is
# described as ("setting to false can reduce trace time"), so that layers begin with
# the same parameters. Seen: every kernel differs, both of the same law. A run that
# is started again with the option begins elsewhere, and what was recorded of a seed
# no longer holds. Parameters that are loaded are not affected.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 flax==0.12.8

cat >"$folder/program.py" <<'PYTHON'
import sys

import flax
from flax import linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return nn.Dense(4)(x), None


def kernel(check):
  layers = nn.scan(
    Block,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    length=3,
    check_constancy_invariants=check,
  )()
  made = layers.init(jax.random.key(0), jnp.ones((2, 4)), None)
  return made["params"]["Dense_0"]["kernel"]


checked, again, unchecked = map(kernel, (True, True, False))
print("flax", flax.__version__, "jax", jax.__version__)
print("first column, checked:  ", checked[:, 0, 0])
print("first column, unchecked:", unchecked[:, 0, 0])
same, other = bool((checked == again).all()), bool((checked != unchecked).all())
print("twice checked, the same:", same, "| unchecked, all others:", other)
sys.exit(0 if same and other else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py"
