#!/usr/bin/env bash
# The program of a grouped product grows with the number of groups: tokamax 0.0.12,
# its Mosaic kernel for Hopper, jax 0.10.2, compiled for an H200 ahead of time.
#
# Expected: `tokamax.ragged_dot` of 128 experts is as large a program as of 8. The
# sizes of groups are an array, the kernel is one, and its grid does the rest.
# Seen: which group each block belongs to is found by operations outside the kernel
# that are written out group by group, 36 lines of StableHLO for each. XLA fuses
# these for long: one product of 128 groups took it 25 and 30 s beside other work,
# and 2 s by tokamax's Triton kernel, whose program does not grow. Where the
# layers of a mixture of 128 experts are written out, three products each, that is
# most of the compilation. A loop over layers compiles them once;
# `implementation="triton"` not at all.
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
import time

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


def program(kind, groups):
  """Returns lines of StableHLO and seconds of compilation."""
  array = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=place
  )
  lowered = jax.jit(
    lambda *args: tokamax.ragged_dot(*args, implementation=kind)
  ).lower(
    array((2048, 512)), array((groups, 512, 256)), array((groups,), jnp.int32)
  )
  start = time.perf_counter()
  lowered.compile()
  return lowered.as_text().count("\n"), time.perf_counter() - start


program("triton", 4)
lines, seconds = {}, {}
for kind in ("mosaic_gpu", "triton"):
  for groups in (8, 128):
    found = program(kind, groups)
    lines[kind, groups], seconds[kind, groups] = found
    print(f"{kind}, {groups} groups: {found[0]} lines, {found[1]:.1f} s")
assert lines["triton", 128] == lines["triton", 8]
assert lines["mosaic_gpu", 128] - lines["mosaic_gpu", 8] == 120 * 36
assert seconds["mosaic_gpu", 128] > 3 * seconds["triton", 128]
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/program.py" 2>/dev/null ||
  { echo "this has changed"; exit 1; }
