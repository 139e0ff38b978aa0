#!/usr/bin/env bash
# `tokamax.ragged_dot` raises for matrices whose width is no multiple of 64: tokamax
# 0.0.12, jax 0.10.2, for an H200 (lowered ahead of time: no GPU is needed).
#
# Expected: with its usual `implementation=None` it "is guaranteed to work on all
# platforms", by its docstring: where a kernel does not fit, the next one is taken.
# Seen: on Hopper the first, Mosaic's, has tiles of 64 columns in bfloat16. For 96 or
# 88 columns it raises ValueError, and only NotImplementedError makes it go on. So
# experts of 704 units, which work on one GPU, stop working where 4 or 8 GPUs share
# each of them (tensor parallel, 176 or 88 units). `implementation="triton"` works.
#
# Exits 0 while this is so, 1 once it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  tokamax==0.0.12 jax==0.10.2 jaxlib==0.10.2 \
  jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2

cat >"$folder/program.py" <<'PYTHON'
import logging

from absl import flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import tokamax

flags.FLAGS.mark_as_parsed()
logging.getLogger("absl").setLevel(logging.ERROR)
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
jax.config.update("jax_default_device", device)
place = jax.sharding.SingleDeviceSharding(device)


def outcome(width, **given):
  """Returns what comes of lowering a product with matrices of some columns."""
  array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=place
  )
  try:
    jax.jit(lambda *args: tokamax.ragged_dot(*args, **given)).lower(
      array((2048, 512)), array((8, 512, width)), array((8,), jnp.int32)
    )
  except Exception as error:
    return type(error).__name__
  return "lowered"


found = {width: outcome(width) for width in (128, 96, 88)}
by_triton = {width: outcome(width, implementation="triton") for width in found}
print(f"as it is: {found}; by Triton: {by_triton}")
assert found == {128: "lowered", 96: "ValueError", 88: "ValueError"}
assert set(by_triton.values()) == {"lowered"}
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null ||
  { echo "this has changed"; exit 1; }
