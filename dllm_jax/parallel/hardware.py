"""Published peaks of accelerators: the one table of what machines can do.

Utilisation figures, benchmarks and plans read it. TPU rows are Google Cloud's
specification pages (v5e, v5p, v6e, TPU7x), by chip; NVIDIA rows are the data
sheets of the SXM modules, without sparsity, with one 400 Gb/s network card a GPU
as in DGX and HGX servers (A100: 200 Gb/s). Nothing is claimed for other devices.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """What one accelerator can do at most.

  Attributes:
    kind: how jax's `device_kind` begins.
    flops: dense bfloat16 matrix products, FLOP/s.
    memory: bytes of its memory.
    usable: share of `memory` that a program may use: the rest is the runtime's
      (TPU) or the driver's and NCCL's.
    memory_rate: bytes/s from and to that memory.
    link_rate: bytes/s one way over one link: TPU, to one neighbour; NVIDIA, to
      the switch of its server.
    network_rate: bytes/s one way between slices or servers, its share.
    matmul_efficiency: share of `flops` that large matrix products are taken to
      reach: an assumption of plans, not a published figure.
    memory_efficiency: share of `memory_rate` likewise.
    devices: devices of jax in a chip.
  """

  kind: str
  flops: float
  memory: int
  usable: float
  memory_rate: float
  link_rate: float
  network_rate: float
  matmul_efficiency: float
  memory_efficiency: float = 0.9
  devices: int = 1

  @property
  def device(self) -> "Chip":
    """Its share by device of jax."""
    part = lambda x: x / self.devices
    return dataclasses.replace(
      self,
      flops=part(self.flops),
      memory=self.memory // self.devices,
      memory_rate=part(self.memory_rate),
      link_rate=part(self.link_rate),
      network_rate=part(self.network_rate),
      devices=1,
    )


def _tpu(kind, teraflops, gib, gigabytes, link, network, devices=1):
  return Chip(
    kind=kind,
    flops=teraflops * 1e12,
    memory=gib * _GIB,
    usable=0.98,
    memory_rate=gigabytes * 1e9,
    link_rate=link * 1e9,
    network_rate=network / 8 * 1e9,
    matmul_efficiency=0.85,
    devices=devices,
  )


def _nvidia(kind, teraflops, gib, terabytes, link, network):
  return Chip(
    kind=kind,
    flops=teraflops * 1e12,
    memory=gib * _GIB,
    usable=0.92,
    memory_rate=terabytes * 1e12,
    link_rate=link * 1e9,
    network_rate=network / 8 * 1e9,
    matmul_efficiency=0.75,
  )


# TFLOP/s, GiB, GB/s or TB/s, GB/s a link and direction, Gb/s.
CHIPS = {
  "v5e": _tpu("TPU v5 lite", 197, 16, 819, 50, 25),
  "v5p": _tpu("TPU v5", 459, 95, 2765, 100, 50),
  "v6e": _tpu("TPU v6 lite", 918, 32, 1638, 100, 100),
  "tpu7x": _tpu("TPU7x", 2307, 192, 7380, 100, 100, devices=2),
  "a100": _nvidia("NVIDIA A100", 312, 79, 2.039, 300, 200),
  "h100": _nvidia("NVIDIA H100", 989, 79, 3.35, 450, 400),
  "h200": _nvidia("NVIDIA H200", 989, 140, 4.8, 450, 400),
  "b200": _nvidia("NVIDIA B200", 2250, 179, 8.0, 900, 400),
}
"""Machines that plans are made for, by the name of their chip."""


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak bfloat16 FLOP/s of a device; None if it is not known.

  The longest known name that begins `device_kind` counts: "NVIDIA H100 80GB HBM3"
  is an H100, "TPU v5p" a TPU v5.
  """
  if device_kind.startswith("TPU v4"):  # One device a chip, no plans.
    return 275e12
  known = [c for c in CHIPS.values() if device_kind.startswith(c.kind)]
  if not known:
    return None
  return max(known, key=lambda chip: len(chip.kind)).device.flops
