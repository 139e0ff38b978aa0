"""Trying meshes, remat policies and microbatches; the best are compiled.

There are thousands of candidates, so that they are first ranked by a model of
their cost: FLOPs from traces (`facts`), bytes of the state from the sharding
rules, of activations from the shapes kept for the backward pass, and collectives
as the mesh calls for them. Only the first few are compiled.

A device with r rows of length T in each of m microbatches sends

    fsdp     m (g + 1) P b / t    weights gathered g times, gradients scattered
    data     4 P / (f t)          gradients, float32, all-reduced once
    tensor   m N k r T D b        k = 4 all-reduces a layer, 6 if recomputed
    context  m N g 2 r T G K b    keys and values gathered
    expert   m N 2 k r e T D b    positions gathered, sums scattered

for P parameters, N layers, b bytes a number, g = 2 or, if recomputed, 3.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
import math

from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.core.axes import AXES
from dllm_jax.data import Tokenizer
from dllm_jax.models.layers import REMAT
from dllm_jax.parallel import make_mesh
from dllm_jax.parallel.topology import Machine
from dllm_jax.planning import roofline
from dllm_jax.planning.facts import Facts, Reference, state_bytes
from dllm_jax.planning.plan import Plan, plan

_MOST_TENSOR, _MOST_CONTEXT, _MOST_MICROBATCHES = 16, 16, 64
_SLACK = 1.1  # of the memory model: what is left out of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """One way to run, with what the model says of it.

  Attributes:
    mesh: sizes of the axes.
    remat: what layers keep.
    microbatches: parts of a batch.
    memory: estimated bytes of a device.
    seconds: estimated step.
  """

  mesh: Mapping[str, int]
  remat: str
  microbatches: int
  memory: float
  seconds: float

  def describe(self) -> str:
    """Returns the flags that ask for it."""
    axes = [f"--config.mesh.{a}={n}" for a, n in self.mesh.items()]
    return " ".join([
      *axes,
      f"--config.model.remat={self.remat}",
      f"--config.training.microbatches={self.microbatches}",
    ])

  def apply(self, resolved: ConfigDict) -> ConfigDict:
    """Returns a configuration that runs this way."""
    resolved = ConfigDict(resolved.to_dict())
    resolved.mesh.update(self.mesh)
    resolved.model.remat = self.remat
    resolved.training.microbatches = self.microbatches
    return resolved


def search(
  resolved: ConfigDict,
  machine: Machine,
  tokenizer: Tokenizer,
  *,
  compiled: int = 3,
  report: Callable[[str], None] = print,
  reference: Reference | None = None,
) -> tuple[ConfigDict, Plan]:
  """Returns the fastest way that fits, and its plan.

  If nothing fits, what needs the least memory.

  Args:
    resolved: a configuration; mesh, remat and microbatches are replaced.
    machine: where it is to run.
    tokenizer: the vocabulary.
    compiled: candidates to compile, at most.
    report: takes a line for each of them.
    reference: counts of this configuration, if they are at hand.
  """
  reference = reference or Reference(resolved, tokenizer)
  ranked = rank(resolved, machine, reference)
  best = None
  for candidate in ranked[:compiled]:
    given = candidate.apply(resolved)
    try:
      found = plan(given, machine, tokenizer, reference=reference)
    except ValueError as error:  # a kernel that does not divide
      report(f"{candidate.describe()}: {error}")
      continue
    step = found.step_seconds_bound
    report(
      f"{candidate.describe()}: {found.bytes_per_device / 2**30:.1f} GiB"
      f" (model {candidate.memory / 2**30:.1f})"
      + (f", {step:.3f} s (model {candidate.seconds:.3f})" if step else "")
      + ("" if found.fits else ", does not fit")
    )
    if best is None or _order(found) < _order(best[1]):
      best = given, found
  if best is None:
    raise ValueError(
      f"no mesh over {len(machine.devices)} devices divides this network and"
      " its batch; change training.batch_size"
    )
  return best


def _order(found: Plan) -> tuple[bool, float]:
  cost = found.step_seconds_bound if found.fits else found.bytes_per_device
  return not found.fits, cost


def rank(
  resolved: ConfigDict, machine: Machine, reference: Reference
) -> list[Candidate]:
  """Returns candidates: those that fit by their time, then by their memory."""
  model = _Model(resolved, machine, reference)
  usable = machine.chip.memory * machine.chip.usable
  return sorted(
    model.candidates(),
    key=lambda c: (
      c.memory > usable,
      c.seconds if c.memory <= usable else c.memory,
    ),
  )


def advice(resolved: ConfigDict, machine: Machine, reference: Reference) -> str:
  """Returns what would make a plan fit, by the model."""
  ranked = rank(resolved, machine, reference)
  usable = machine.chip.memory * machine.chip.usable
  if ranked and ranked[0].memory <= usable:
    return (
      f"{ranked[0].describe()} is estimated at"
      f" {ranked[0].memory / 2**30:.1f} GiB of {usable / 2**30:.1f}"
    )
  least = min((c.memory for c in ranked), default=math.inf)
  return (
    f"no mesh, remat policy or microbatches fit on {machine.name} (at least"
    f" {least / 2**30:.1f} GiB a device are estimated, {usable / 2**30:.1f} are"
    " there): take more devices, or a smaller batch or network"
  )


class _Model:
  """The cost of candidates."""

  def __init__(self, resolved, machine: Machine, reference: Reference):
    self.machine, self.reference = machine, reference
    self.facts: Facts = reference.facts
    self.network = reference.network
    self.batch = configs.parse(resolved).training.batch_size
    self.length = max(c.segment_ids.shape[1] for c in reference.calls)
    self.bytes = 2 if self.network.dtype == "bfloat16" else 4

  def candidates(self) -> Iterator[Candidate]:
    """Yields every legal candidate with its cost."""
    for mesh in self._meshes():
      try:
        state = state_bytes(self.facts.state, mesh, self.facts.trains)
        seconds = functools.partial(self._collective, self._devices(mesh))
      except ValueError:
        continue
      rows = mesh["data"] * mesh["fsdp"] * mesh["expert"]
      for remat, parts in itertools.product(REMAT, _powers(_MOST_MICROBATCHES)):
        if self.batch % (rows * parts):
          continue
        local = self.batch // rows // parts
        yield Candidate(
          mesh=mesh,
          remat=remat,
          microbatches=parts,
          memory=self._memory(mesh, state, remat, local),
          seconds=self._seconds(mesh, seconds, remat, parts, local),
        )

  def _meshes(self) -> Iterator[dict[str, int]]:
    devices, network = len(self.machine.devices), self.network
    slices = {getattr(d, "slice_index", 0) or 0 for d in self.machine.devices}
    heads = getattr(network, "kv_heads", network.heads)
    heads = math.gcd(heads, getattr(network, "full_kv_heads", heads))
    tensors = [n for n in _powers(_MOST_TENSOR) if heads % n == 0]
    contexts = list(_powers(_MOST_CONTEXT))
    experts = (
      [
        n
        for n in _divisors(devices)
        if n == 1 or getattr(network, "experts", 0) % n == 0 < network.experts
      ]
      if getattr(network, "experts", 0)
      else [1]
    )
    for t, c, e in itertools.product(tensors, contexts, experts):
      if devices % (t * c * e):
        continue
      rest = devices // (t * c * e)
      for fsdp in _divisors(rest):
        if (rest // fsdp) % len(slices) == 0:
          sizes = (rest // fsdp, fsdp, t, c, e)
          yield dict(zip(AXES, sizes, strict=True))

  def _devices(self, mesh) -> np.ndarray:
    return make_mesh(mesh, self.machine.devices).devices

  def _collective(self, devices, axis: str, kind: str, size: float) -> float:
    place = AXES.index(axis)
    group = np.moveaxis(devices, place, -1).reshape(-1, devices.shape[place])[0]
    return self.machine.seconds(kind, size, list(group))

  def _memory(self, mesh, state, remat: str, rows: int) -> float:
    _, kept = self.reference.remat(remat)
    kept *= rows / mesh["context"] / mesh["tensor"]
    divided = mesh["tensor"] * mesh["expert"]
    head = self.network.padded_vocab * self.network.width / mesh["tensor"]
    layer = (self.facts.parameters - 2 * head) / self.network.layers / divided
    mlp = getattr(self.network, "mlp_dim", 4 * self.network.width)
    inner = 6 * self.network.width + 4 * (mlp or 4 * self.network.width)
    place = rows * self.length / mesh["context"]
    workspace = (
      head * (self.bytes + 4)
      + 3 * layer * self.bytes
      + place * inner * self.bytes / mesh["tensor"]
      + 4 * place * self.network.width * self.bytes
    )
    gradients = 1.5 * state["parameters"]
    return _SLACK * (sum(state.values()) + gradients + kept + workspace)

  def _seconds(self, mesh, seconds, remat: str, parts: int, rows: int) -> float:
    passes, _ = self.reference.remat(remat)
    devices = len(self.machine.devices)
    flops = (passes + 3 * self.facts.vocabulary) * self.batch / devices
    compute = roofline.compute_seconds(self.machine, flops, 0.0)
    times = roofline.Roofline(
      compute=compute,
      memory=0.0,
      network=self._network(mesh, seconds, remat, parts, rows),
    )
    return times.step

  def _network(self, mesh, seconds, remat, parts, rows) -> dict[str, float]:
    n, width = self.network, self.network.width
    again = 0 if remat == "none" else 1
    place = rows * self.length / mesh["context"] * self.bytes
    whole = self.facts.parameters / mesh["tensor"] / mesh["expert"] * self.bytes
    head = 4 * n.padded_vocab * width / mesh["tensor"]
    gathers = 2 + again
    times = {
      "fsdp": parts
      * (
        gathers * seconds("fsdp", "all-gather", whole)
        + seconds("fsdp", "reduce-scatter", self.facts.trained * whole + head)
      ),
      "data": seconds(
        "data",
        "all-reduce",
        parts * head + 2 * self.facts.trained * whole / mesh["fsdp"],
      ),
      "tensor": parts
      * n.layers
      * (4 + 2 * again)
      * seconds("tensor", "all-reduce", place * width),
      "context": parts
      * n.layers
      * gathers
      * seconds(
        "context",
        "all-gather",
        2
        * place
        * mesh["context"]
        * getattr(n, "kv_heads", n.heads)
        * n.head_dim
        / mesh["tensor"],
      ),
      "expert": parts
      * n.layers
      * (2 + again)
      * 2
      * seconds("expert", "all-gather", place * mesh["expert"] * width),
    }
    return {axis: time for axis, time in times.items() if time}


def _powers(most: int) -> Iterator[int]:
  return (2**k for k in range(most.bit_length()))


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
