"""Plans for people: text and pictures; and the vocabulary that they need."""

from collections.abc import Mapping
import dataclasses

from ml_collections import ConfigDict

from dllm_jax import data
from dllm_jax.config import config as configs
from dllm_jax.data.numbers import Numbers
from dllm_jax.parallel.topology import Machine
from dllm_jax.planning.facts import Reference
from dllm_jax.planning.plan import Plan
from dllm_jax.planning.search import advice
from dllm_jax.plots import stacked_bars

_GIB = 2**30


def vocabulary(resolved: ConfigDict, size: int | None) -> data.Tokenizer:
  """Returns a tokenizer of a size, or else that of the configuration's data.

  Args:
    resolved: the configuration.
    size: tokens, the mask included.

  Raises:
    FileNotFoundError: no size is given and the data is not here.
  """
  if size is not None:
    return Numbers(vocab_size=size, mask_id=size - 1, bos_id=0, eos_id=1)
  try:
    return data.load(configs.parse(resolved).data).tokenizer
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{error}; to plan without the data give --vocab_size=N"
    ) from error


def advised(
  found: Plan,
  resolved: ConfigDict,
  machine: Machine,
  tokenizer: data.Tokenizer,
  *,
  reference: Reference | None = None,
) -> Plan:
  """Returns a plan that does not fit, with what would make it fit.

  Args:
    found: the plan.
    resolved: its configuration.
    machine: its machine.
    tokenizer: its vocabulary.
    reference: counts of this configuration, if they are at hand.
  """
  if found.program == "sample":
    text = "sample fewer --rows, divide by --config.mesh.tensor, or set a cache"
  else:
    reference = reference or Reference(resolved, tokenizer)
    text = advice(resolved, machine, reference)
  return dataclasses.replace(found, advice=text)


def text(found: Plan) -> str:
  """Returns what people read of a plan."""
  gib = lambda size: f"{size / _GIB:.1f} GiB"
  mesh = ", ".join(
    f"{axis} {n}" for axis, n in found.settings["mesh"].items() if n > 1
  )
  lines = [
    f"{found.program} on {found.topology}, {found.devices} devices: "
    f"{mesh or 'one device'}; remat {found.settings['remat']}, "
    f"{found.settings['microbatches']} microbatches, attention "
    f"{found.settings['attention'] or 'xla'}",
    f"memory  {gib(found.bytes_per_device)} of {gib(found.memory_bytes)} a "
    f"device: {'fits' if found.fits else 'DOES NOT FIT'}",
    *(f"  {gib(n):>10}  {k}" for k, n in found.bytes_by_kind.items()),
  ]
  if found.start_bytes:
    lines.append(
      f"before the first step, weights are read and then held in fewer bits:"
      f" {gib(found.start_bytes)} for that alone"
    )
  if found.program == "train":
    lines.append(
      "not known here: what the runtime keeps between programs, batches that wait"
      " on the device, and how much of a batch is padding"
    )
  if found.step_seconds_bound is not None:
    seconds = found.seconds
    lines += [
      f"compute {seconds['compute']:8.3f} s  "
      f"{found.flops_per_device / 1e12:,.0f} TFLOP a device",
      f"memory  {seconds['memory']:8.3f} s  "
      f"{found.moved_bytes / 1e9:,.0f} GB moved",
      *(
        f"network {time:8.3f} s  {found.collective_bytes[axis] / 1e9:,.1f} GB "
        f"along {axis}"
        for axis, time in seconds["network"].items()
      ),
      f"a step takes at least {found.step_seconds_bound:.3f} s (bound by "
      f"{found.binds}; network exposed "
      f"{100 * found.exposed_network:.1f} %): MFU at most "
      f"{found.mfu_bound:.3f}, {found.tokens_per_second_bound:,.0f} tokens/s",
    ]
  if found.call is not None:
    call, gb = found.call, lambda name: f"{found.call[name] / 1e9:,.2f} GB"
    parts = [
      f"{name} {gb(name)}"
      for name in ("weights", "cache", "block")
      if name in call
    ]
    lines.append(
      f"a call of the network moves {gb('moved')}, {call['ratio']:.2f} times"
      f" what it has to ({', '.join(parts)}), and copies the keys or the values"
      f" of the whole cache {call['cache_copies']:g} times"
    )
  if found.advice:
    lines.append(f"to fit: {found.advice}")
  return "\n".join(lines)


def pictures(plans: Mapping[str, Plan]) -> dict[str, str]:
  """Returns SVGs of the memory and of the roofline of some plans."""
  memory = {
    name: {k: n / _GIB for k, n in found.bytes_by_kind.items()}
    for name, found in plans.items()
  }
  limits = {name: found.memory_bytes / _GIB for name, found in plans.items()}
  result = {
    "memory": stacked_bars(memory, x_label="GiB a device", limits=limits)
  }
  times = {}
  for name, found in plans.items():
    if found.seconds is None:
      continue
    seconds, label = found.seconds, f"{name} " if len(plans) > 1 else ""
    share = found.model_flops_per_device / found.flops_per_device
    share = min(share, 1.0)
    times[f"{label}compute"] = {
      "model": share * seconds["compute"],
      "recomputed": (1 - share) * seconds["compute"],
    }
    times[f"{label}memory"] = {"memory traffic": seconds["memory"]}
    times[f"{label}network"] = dict(seconds["network"])
    times[f"{label}step"] = {"bound on a step": found.step_seconds_bound}
  if times:
    result["roofline"] = stacked_bars(times, x_label="seconds")
  return result
