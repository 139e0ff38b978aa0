"""Machines that are not here: their devices, for compilation, and their wires.

A machine is named as its vendor names it: `v5p:4x4x8` is a slice of 128 TPU
chips, `h200:8x8` are 8 servers of 8 GPUs. Devices come from jax's ahead-of-time
topologies, which need the compiler of that platform and no accelerator.
"""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from dllm_jax.parallel.hardware import Chip, CHIPS

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_MOST_CHIPS = {"v5p": 6144, "tpu7x": 9216}
_SERVER = (1, 2, 4, 8)
_MOST_SERVERS = 4096

# What the compiler asks of an NVIDIA device: multiprocessors, shared memory each,
# second-level cache, clock, compute capability. From the vendor's tuning guides.
_NVIDIA = {
  "a100": (108, 167_936, 40 * 2**20, 1.41, 8),
  "h100": (132, 233_472, 50 * 2**20, 1.98, 9),
  "h200": (132, 233_472, 50 * 2**20, 1.98, 9),
  "b200": (148, 233_472, 126 * 2**20, 1.965, 10),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {rate}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{kind}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """Devices and what connects them.

  Attributes:
    name: as it was asked for, "v5p:4x4x8" or "2 x v5p:4x4x8".
    chip: peaks of one device.
    devices: jax's devices, all of them.
    grid: chips along each side of a slice's torus; empty where a switch connects
      the devices of a server.
    wrapped: whether each side of the torus is closed to a ring.
  """

  name: str
  chip: Chip
  devices: tuple[Any, ...]
  grid: tuple[int, ...] = ()
  wrapped: tuple[bool, ...] = ()

  def seconds(
    self, kind: str, size: float, group: Sequence[jax.Device]
  ) -> float:
    r"""Returns the time of one collective at the full rate of its wires.

    Of n devices, each sends (n - 1) / n of `size` bytes, twice in an all-reduce:

        seconds = c max(S (k - 1) / (k R_in), S (m - 1) / (m k R_out))

    for m slices or servers with k devices of the group in each, c = 2 for an
    all-reduce and 1 otherwise. R_out is a device's share of the network. R_in is
    the rate to a server's switch, or the sum over the sides of the torus along
    which the group extends of a link's rate, twice that where the group closes
    the ring.

    Args:
      kind: the operation, as XLA names it.
      size: bytes of the whole array of the group for all-gather and
        reduce-scatter, of one device for the others.
      group: the devices that take part.
    """
    if kind == "collective-permute":
      far = self._islands(group) > 1
      return size / (self.chip.network_rate if far else self.chip.link_rate)
    if len(group) < 2:
      return 0.0
    islands = self._islands(group)
    inside = len(group) // islands
    seconds = (1 - 1 / inside) * size / self._rate(group)
    if islands > 1:
      rate = inside * self.chip.network_rate
      seconds = max(seconds, (1 - 1 / islands) * size / rate)
    return (2 if kind == "all-reduce" else 1) * seconds

  def _islands(self, group) -> int:
    return len({self.island(device) for device in group})

  def island(self, device: jax.Device) -> int:
    """Returns the slice or the server that a device belongs to."""
    if self.grid:
      return getattr(device, "slice_index", None) or 0
    return device.process_index

  def _rate(self, group) -> float:
    """Returns a device's rate inside its slice or server."""
    if not self.grid:
      return self.chip.link_rate
    first = self.island(group[0])
    here = [d.coords for d in group if self.island(d) == first]
    spans = [len(set(along)) for along in zip(*here, strict=True)]
    links = sum(
      (2 if wrapped and span == side else 1)
      for span, side, wrapped in zip(
        spans, self.grid, self.wrapped, strict=False
      )
      if span > 1
    )
    # Two devices of one chip: six times a link.
    return self.chip.link_rate * (links or 6)


def machine(topology: str, *, slices: int = 1) -> Machine:
  """Returns the machine of a name such as "v5p:4x4x8" or "h200:8x8".

  Args:
    topology: `CHIP:SHAPE`; the shape of a TPU slice, or servers x GPUs in each.
    slices: TPU slices of that shape, connected by the data-centre network.

  Raises:
    ValueError: there is no such machine; the message lists those that exist.
    ModuleNotFoundError: the compiler for it is not installed.
  """
  name, _, shape = topology.partition(":")
  sides = _sides(shape)
  if name not in CHIPS or not _exists(name, shape, sides) or slices < 1:
    raise ValueError(
      f"there is no topology {topology!r}"
      + (f" with {slices} slices" if slices != 1 else "")
      + f"; there are {known()}"
    )
  if name in _NVIDIA:
    if slices != 1:
      raise ValueError(
        f"slices {slices} are of TPUs; for {name} give SERVERSxGPUS, such as"
        f" {name}:{sides[0] * slices}x{sides[1]}"
      )
    return _nvidia(topology, name, sides)
  return _tpu(topology, name, sides, slices)


def known() -> str:
  """Returns the legal topologies in words."""
  flat, deep = ", ".join(_FLAT), ", ".join(_DEEP)
  most = " or ".join(f"{n} chips ({k})" for k, n in _MOST_CHIPS.items())
  return (
    f"v5e and v6e:{{{flat}}}; v5p and tpu7x:{{{deep}}} or larger AxBxC in"
    f" multiples of 4, A <= B <= C, up to {most}; {', '.join(_NVIDIA)}:"
    f"SERVERSxGPUS with {', '.join(map(str, _SERVER))} GPUs in a server, such"
    " as h200:8x8"
  )


def _sides(shape: str) -> tuple[int, ...]:
  parts = shape.split("x")
  legal = all(part.isascii() and part.isdigit() for part in parts)
  return tuple(map(int, parts)) if legal else ()


def _exists(name: str, shape: str, sides: tuple[int, ...]) -> bool:
  if name in _NVIDIA:
    return (
      len(sides) == 2 and sides[1] in _SERVER and 1 <= sides[0] <= _MOST_SERVERS
    )
  if name not in _MOST_CHIPS:
    return shape in _FLAT
  large = (
    len(sides) == 3
    and all(side and side % 4 == 0 for side in sides)
    and list(sides) == sorted(sides)
    and math.prod(sides) <= _MOST_CHIPS[name]
  )
  return shape in _DEEP or large


def _tpu(topology: str, name: str, sides, slices: int) -> Machine:
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(_missing(topology, "libtpu"))
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # No metadata server here.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # No chip to guard.
  options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
  if math.prod(sides) == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  devices = topologies.get_topology_desc(topology, "tpu", **options).devices
  if len(sides) == 3:  # Blocks of 4 x 4 x 4 are joined to rings by switches.
    wrapped = (all(side % 4 == 0 for side in sides),) * 3
  else:
    wrapped = tuple(side == 16 for side in sides)
  return Machine(
    name=topology if slices == 1 else f"{slices} x {topology}",
    chip=CHIPS[name].device,
    devices=tuple(devices),
    grid=sides,
    wrapped=wrapped,
  )


def _nvidia(topology: str, name: str, sides) -> Machine:
  try:
    found = importlib.util.find_spec("jax_plugins.xla_cuda13")
  except ModuleNotFoundError:
    found = None
  if found is None:
    raise ModuleNotFoundError(_missing(topology, "jax-cuda13-plugin"))
  cores, shared, cache, clock, capability = _NVIDIA[name]
  chip = CHIPS[name]
  target = _TARGET.format(
    cores=cores,
    shared=shared,
    optin=shared - 1024,
    cache=cache,
    clock=clock,
    capability=capability,
    memory=chip.memory,
    rate=int(chip.memory_rate),
    kind=chip.kind,
  )
  servers, gpus = sides
  devices = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology=f"1x{servers}x{gpus}"
  ).devices
  return Machine(name=topology, chip=chip, devices=tuple(devices))


def _missing(topology: str, wheel: str) -> str:
  return (
    f"plans for {topology} need the wheel {wheel}, which is not installed:"
    " pip install 'dllm_jax[plan]'"
  )
