#!/usr/bin/env bash
# XLA on GPUs, jaxlib 0.10.2 with the CUDA 13 plugin of that version, compiled for an
# H200 (ahead of time: no GPU is needed).
#
# Expected: `lax.scan` over stacked weights [layers, D, F], the usual way to write a
# transformer, reads each weight once for a few rows of inputs: a product reads its
# matrix where it lies in the stack, as on TPUs.
# Seen: each round of the loop first copies its layer's matrices out of the stack (a
# fusion of kind `dynamic_slice`, as large as the matrix) and multiplies the copy: the
# weights are read twice and written once, so that a decoding step, which waits for
# memory, takes three times as long as it has to. The same layers with an array for
# each and a Python loop are not copied at all.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2 jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 141000000000 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
device = topologies.get_topology_desc(
  platform="cuda", target_config=TARGET, topology="1x1x1"
).devices[0]
place = jax.sharding.SingleDeviceSharding(device)
array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
LAYERS, WIDTH, HIDDEN, ROWS = 8, 2048, 6144, 32


def layer(x, up, down):
  return x + jax.nn.silu(x @ up) @ down


def scanned(x, ups, downs):
  return jax.lax.scan(lambda x, w: (layer(x, *w), None), x, (ups, downs))[0]


def by_hand(x, ups, downs):
  for up, down in zip(ups, downs):
    x = layer(x, up, down)
  return x


def copied(fn, *args):
  """Returns what share of the weights the program writes to memory again."""
  text = jax.jit(fn).lower(*args).compile().as_text()
  made = re.findall(r"= bf16\[1,(\d+),(\d+)\]\S* fusion\(", text)
  loop = text.count(" while(")
  whole = [a for a in made if int(a[0]) * int(a[1]) == WIDTH * HIDDEN]
  return len(whole), loop


x = array(ROWS, WIDTH)
up, down = (WIDTH, HIDDEN), (HIDDEN, WIDTH)
loop = copied(scanned, x, array(LAYERS, *up), array(LAYERS, *down))
hand = copied(by_hand, x, [array(*up)] * LAYERS, [array(*down)] * LAYERS)
print(f"jaxlib {jax.lib.__version__}: matrices copied in each round of the scan: "
      f"{loop[0]} of 2; of layers written out: {hand[0]} of {2 * LAYERS}")
assert loop == (2, 1) and hand == (0, 0), (loop, hand)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null ||
  { echo "this has changed"; exit 1; }
