"""A plan: the real program, compiled for a machine that is not here, and read.

The train step (or the sampler) is the one that `dllm train` runs, lowered from
abstract arrays with their shardings; nothing is computed. XLA says what memory it
takes, the optimised program what it multiplies, moves and sends (`parallel.hlo`),
`roofline` how long that takes at least.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dllm_jax.core.paths import Path
from dllm_jax.core.vocabulary import chunks
from dllm_jax.data import Tokenizer
from dllm_jax.data.batches import blank
from dllm_jax.models.quantised import is_quantised
from dllm_jax.parallel import batch_sharding, compilation
from dllm_jax.parallel.mesh import check_batches
from dllm_jax.parallel.topology import Machine
from dllm_jax.planning import hlo, roofline, sampler, update
from dllm_jax.planning.facts import itemsize, Reference, state_bytes
from dllm_jax.run.run import Run
from dllm_jax.run.timing import program_bytes

# Products of an attention kernel, by what its name holds; the first match counts.
_PRODUCTS = {
  "dkv": 4,
  "dq": 3,
  "Backward": 5,
  "bwd": 5,
  "fmha": 2,
  "forward": 2,
  "fwd": 2,
  "kept": 2,
  "ragged": 1,
  "splash": 2,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a program costs on a machine; bytes and FLOPs are of one device.

  Attributes:
    topology: the machine.
    devices: how many it has.
    program: "train", "sample" or "reinforce".
    settings: mesh and other fields of the configuration that decide the cost.
    fits: whether the memory is enough.
    bytes_per_device: memory that the program takes.
    bytes_by_kind: the same in parts.
    memory_bytes: what a device offers to a program.
    start_bytes: memory that it takes, before the first step, to read weights and
      hold them in fewer bits; 0 where they are held as they are read.
    flops_per_device: all that run, recomputation and kernels too; None where
      the compiler gave up for want of memory, and so on.
    model_flops_per_device: without recomputation.
    moved_bytes: from and to memory.
    collective_bytes: sent by mesh axis.
    seconds: compute, memory, and network by axis.
    step_seconds_bound: the least time of a step; of a batch for the sampler.
    mfu_bound: the most model FLOPs a second over the peak.
    tokens_per_second_bound: over all devices.
    exposed_network: share of the step in which nothing hides the network.
    binds: compute, memory or network.
    call: of the sampler, bytes that one call of the network moves, and what it
      has to move at least; None otherwise.
    advice: what would make it fit.
    assumptions: efficiencies and overlap that were taken.
  """

  topology: str
  devices: int
  program: str
  settings: Mapping[str, Any]
  fits: bool
  bytes_per_device: int
  bytes_by_kind: Mapping[str, int]
  memory_bytes: int
  start_bytes: int = 0
  flops_per_device: float | None = None
  model_flops_per_device: float | None = None
  moved_bytes: float | None = None
  collective_bytes: Mapping[str, float] | None = None
  seconds: Mapping[str, Any] | None = None
  step_seconds_bound: float | None = None
  mfu_bound: float | None = None
  tokens_per_second_bound: float | None = None
  exposed_network: float | None = None
  binds: str = "memory size"
  call: Mapping[str, float] | None = None
  advice: str = ""
  assumptions: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def plan(
  resolved: ConfigDict,
  machine: Machine,
  tokenizer: Tokenizer,
  *,
  program: Literal["train", "sample", "reinforce"] = "train",
  rows: int = 1,
  reference: Reference | None = None,
  methods: Mapping[str, Any] | None = None,
) -> Plan:
  """Returns the plan of a configuration on a machine.

  Args:
    resolved: the configuration.
    machine: where it is to run.
    tokenizer: the vocabulary.
    program: the train step, the sampler, or the update of reinforcement learning,
      of which only the memory is told.
    rows: rows that are sampled together, a device.
    reference: counts of this configuration, if they are at hand.
    methods: the sections of reinforcement learning, `files.methods`.

  Raises:
    ValueError: mesh, batch and network do not fit each other.
  """
  run = Run(Path(), resolved, tokenizer, devices=machine.devices)
  if program == "sample":
    rows *= run.mesh.size // run.mesh.shape["tensor"]
    built = sampler.build(run)
    with _default(run.mesh.devices.flat[0]):
      lowered, kinds = sampler.lowered(run, built, rows)
    rounds = sampler.rounds(built)
  elif program == "reinforce":
    _check(run)
    (lowered, kinds), rounds = update.lowered(run, methods or {}), ()
  else:
    rows = run.config.training.batch_size
    _check(run)
    lowered, rounds, kinds = _step(run)
  text, total = _compiled(lowered)
  reference = reference or Reference(resolved, tokenizer)
  if program == "train":
    kinds["activations"] = _activations(run, reference)
  usable = int(machine.chip.memory * machine.chip.usable)
  found = Plan(
    topology=machine.name,
    devices=len(machine.devices),
    program=program,
    settings=settings(run),
    fits=total <= usable,
    bytes_per_device=int(total),
    bytes_by_kind=_kinds(kinds, total),
    memory_bytes=usable,
    start_bytes=_start(run) if program == "train" else 0,
    assumptions={
      "peak_flops": machine.chip.flops,
      "matmul_efficiency": machine.chip.matmul_efficiency,
      "kernel_efficiency": roofline.KERNEL_EFFICIENCY,
      "memory_efficiency": machine.chip.memory_efficiency,
      "overlap": dict(roofline.OVERLAP),
    },
  )
  if text is None or program == "reinforce":
    return found
  if program == "sample":
    call = sampler.call(text, run, built, rows)
    found = dataclasses.replace(found, call=call)
  work = hlo.read(text, devices=len(machine.devices), rounds=rounds)
  return _timed(found, run, machine, work, reference, rows)


def settings(run: Run) -> dict[str, Any]:
  """Returns what of a configuration decides its cost on a machine."""
  model = run.config.model
  return {
    "mesh": dict(run.mesh.shape),
    "remat": model["remat"],
    "attention": model["attention"],
    "microbatches": run.config.training.microbatches,
    "batch_size": run.config.training.batch_size,
    "length": run.config.data.length,
  }


def _check(run: Run) -> None:
  training = run.config.training
  part = training.batch_size // training.microbatches
  name = "training.batch_size / training.microbatches"
  check_batches(run.mesh, {name: part}, run.config.data.length)


def _step(run: Run):
  """Returns the lowered train step, rounds of its loops, bytes by kind."""
  training, length = run.config.training, run.config.data.length
  where = batch_sharding(run.mesh)
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    blank(training.batch_size, length),
  )
  local = training.batch_size // training.microbatches * length
  for axis in ("data", "fsdp", "expert", "context"):
    local //= run.mesh.shape[axis]
  with jax.set_mesh(run.mesh), _default(run.mesh.devices.flat[0]):
    lowered = run.program.step.lower(run.program.abstract, batch)
    rounds = chunks(local, run.network.padded_vocab)  # Of the mesh's platform.
  program = run.program
  kinds = state_bytes(program.abstract, run.mesh.shape, program.trains)
  kinds["gradients"] = kinds["parameters"]
  return lowered, (rounds,), kinds


def _default(device: jax.Device):
  """Returns a scope in which kernels' libraries for GPUs take it for theirs."""
  if device.platform != "gpu":
    return contextlib.nullcontext()
  return jax.default_device(device)


def _start(run: Run) -> int:
  """Returns bytes that a device has while it makes weights of fewer bits."""
  params = run.program.abstract.params["model"]
  own = jnp.dtype(run.network.param_dtype).itemsize
  total = 0.0
  for leaf in jax.tree.leaves(params, is_leaf=is_quantised):
    if not is_quantised(leaf):
      continue
    part = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    total += part(leaf.qvalue) * (own + itemsize(leaf.qvalue.dtype))
    total += part(leaf.scale) * itemsize(leaf.scale.dtype)
  return int(total)


def _compiled(lowered) -> tuple[str | None, float]:
  """Returns the optimised program, or None, and the bytes that it takes."""
  try:
    with compilation.not_kept():
      compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", str(error))
    if used is None:
      raise
    power = "KMGT".index(used[2]) + 1
    return None, float(used[1]) * 1024**power
  return compiled.as_text(), program_bytes(compiled)


def _kinds(kinds: Mapping[str, float], total: float) -> dict[str, int]:
  """Returns bytes by kind; what is in no other is temporary."""
  found, rest = {}, int(total)
  for name, size in kinds.items():
    found[name] = min(int(size), rest)
    rest -= found[name]
  return found | {"temporaries": rest}


def _activations(run: Run, reference: Reference) -> float:
  """Returns bytes that a device keeps for the backward pass, by their shapes."""
  training = run.config.training
  _, kept = reference.remat(run.config.model["remat"])
  rows = training.batch_size / training.microbatches
  return kept * rows / run.mesh.size


def _timed(found, run, machine, work, reference, rows) -> Plan:
  """Returns a plan with the times of its work."""
  facts, devices = reference.facts, len(machine.devices)
  sent, network = roofline.network(machine, run.mesh, work.collectives)
  parts = run.config.training.microbatches if found.program == "train" else 1
  kernels = _kernels(run, work, facts, rows // parts)
  times = roofline.Roofline(
    compute=roofline.compute_seconds(machine, work.flops, kernels),
    memory=roofline.memory_seconds(machine, work.moved),
    network=network,
  )
  executed = work.flops + kernels
  tokens = rows * run.config.data.length
  train = found.program == "train"
  # Backward, gradients of what is frozen are not formed.
  model = (2 + facts.trained) * facts.forward * rows / devices
  model = model if train else executed
  return dataclasses.replace(
    found,
    flops_per_device=executed,
    model_flops_per_device=model,
    moved_bytes=work.moved,
    collective_bytes=sent,
    seconds={
      "compute": times.compute,
      "memory": times.memory,
      "network": network,
    },
    step_seconds_bound=times.step,
    mfu_bound=model / machine.chip.flops / times.step,
    tokens_per_second_bound=tokens / times.step,
    exposed_network=times.exposed / times.step,
    binds=times.binds,
  )


def _kernels(run: Run, work: hlo.Work, facts, rows: int) -> float:
  """Returns the FLOPs of attention kernels on a device.

  Each product of a kernel is one of attention's, at all places by cuDNN and in
  the tiles that are not empty by splash and flash, of a cache at all its slots; a
  backward kernel forms the scores again. Those of experts' products are one each.
  """
  own = facts.tiles["splash"] * facts.attention / run.network.layers
  own *= rows / run.mesh.size
  total = 0.0
  for kernel in work.kernels:
    count = next((n for key, n in _PRODUCTS.items() if key in kernel.name), 0)
    product = own if kernel.product is None else kernel.product
    if kernel.name.startswith("flash") and "kept" not in kernel.name:
      product *= facts.tiles["flash"]
    total += count * kernel.times * product
  return total
