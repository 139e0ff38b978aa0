r"""How long a step takes at least, and what it waits for.

    compute = (F_products / e + F_kernels / e_k) / peak
    memory  = bytes moved / (rate of the memory x e_m)
    network = sum over mesh axes of n_a, each collective at the rate of its wires

    busy = max(compute, memory)
    step >= max(busy, sum_a o_a n_a) + sum_a (1 - o_a) n_a

F counts everything that runs, recomputation too; peaks are published ones
(`parallel.hardware`). These are assumptions, not measurements: the efficiency e
of matrix products (by chip, in the same table), e_k = 0.6 of attention kernels,
e_m of memory, likewise, and the share o_a of an axis's collectives that hides behind
other work: 0.9 where weights are gathered ahead of their use and gradients
reduced behind it (data, fsdp), 0.5 for the keys and values of context, 0 for
tensor and expert, which wait for what they send.

    mfu = F_model / (devices x peak x step)

F_model is 3 x the forward's products, without recomputation.
"""

from collections.abc import Mapping
import dataclasses
import types

import jax
import numpy as np

from dllm_jax.parallel.topology import Machine
from dllm_jax.planning.hlo import Collective

KERNEL_EFFICIENCY = 0.6
OVERLAP: Mapping[str, float] = types.MappingProxyType({
  "data": 0.9,
  "fsdp": 0.9,
  "context": 0.5,
  "tensor": 0.0,
  "expert": 0.0,
})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Times of one step, in seconds.

  Attributes:
    compute: of matrix products and kernels.
    memory: of traffic to and from memory.
    network: of collectives, by mesh axis ("data+fsdp" where one spans both).
  """

  compute: float
  memory: float
  network: Mapping[str, float]

  @property
  def exposed(self) -> float:
    """Network time that nothing hides."""
    return self.step - max(self.compute, self.memory)

  @property
  def step(self) -> float:
    """The bound on a step."""
    hidden = sum(overlap(a) * n for a, n in self.network.items())
    waiting = sum((1 - overlap(a)) * n for a, n in self.network.items())
    return max(self.compute, self.memory, hidden) + waiting

  @property
  def binds(self) -> str:
    """What the step waits for most."""
    times = {
      "compute": self.compute,
      "memory": self.memory,
      "network": sum(self.network.values()),
    }
    return max(times, key=times.__getitem__)


def overlap(axes: str) -> float:
  """Returns the share of some axes' collectives that is taken to be hidden."""
  return min(OVERLAP[axis] for axis in axes.split("+"))


def compute_seconds(machine: Machine, products: float, kernels: float) -> float:
  """Returns the time of a device's products and of its kernels.

  Args:
    machine: whose peak.
    products: FLOPs of matrix products.
    kernels: FLOPs inside attention kernels.
  """
  chip = machine.chip
  efficient = products / chip.matmul_efficiency + kernels / KERNEL_EFFICIENCY
  return efficient / chip.flops


def memory_seconds(machine: Machine, moved: float) -> float:
  """Returns the time of a device's memory traffic, in bytes."""
  chip = machine.chip
  return moved / (chip.memory_rate * chip.memory_efficiency)


def network(
  machine: Machine, mesh: jax.sharding.Mesh, collectives: tuple[Collective, ...]
) -> tuple[dict[str, float], dict[str, float]]:
  """Returns each axis's bytes sent by a device, and its seconds."""
  devices = mesh.devices.reshape(-1)
  sent, seconds = {}, {}
  for one in collectives:
    axes = axes_of(mesh, one.group)
    if not axes:
      continue
    group = [devices[i] for i in one.group]
    time = one.times * machine.seconds(one.kind, one.size, group)
    sent[axes] = sent.get(axes, 0.0) + one.sent
    seconds[axes] = seconds.get(axes, 0.0) + time
  return sent, seconds


def axes_of(mesh: jax.sharding.Mesh, group: tuple[int, ...]) -> str:
  """Returns the mesh axes along which a group of places extends."""
  places = np.unravel_index(np.asarray(group), mesh.devices.shape)
  varies = [np.any(along != along[0]) for along in places]
  return "+".join(
    name for name, yes in zip(mesh.axis_names, varies, strict=True) if yes
  )
