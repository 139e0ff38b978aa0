"""Adapters of a network as a folder that PEFT loads onto the published one."""

from collections.abc import Mapping
import os
import re
from typing import Any

from jaxtyping import PyTree
import numpy as np
import safetensors.numpy

from dllm_jax.core.files import new_folder
from dllm_jax.models import DoRA, LoRA
from dllm_jax.pretrained import files
from dllm_jax.pretrained.peft import layout
from dllm_jax.pretrained.peft.layout import Part
from dllm_jax.pretrained.table import expected, LAYER, places_of, Table


def save_adapter(
  folder: str | os.PathLike,
  table: Table,
  params: PyTree,
  network: Any,
  *,
  prefix: str = "",
  base: str | None = None,
  dtype: str = "float32",
) -> dict[str, int]:
  """Writes the adapters among parameters; returns each module's rank.

  A published matrix that holds several of ours has one adapter: their A one
  below the other and their B along a diagonal, which is the same change.

  Args:
    folder: a new folder.
    table: the family's names.
    params: the network's parameters; of those that are no adapters, DoRA's
      magnitudes need the matrices.
    network: the network's config, with its adapter.
    prefix: what the published names begin with.
    base: what the configuration calls the published model.
    dtype: "float32" or "bfloat16".

  Raises:
    FileExistsError: there is something at `folder`.
    ValueError: there are no adapters.
  """
  adapter: LoRA = network.adapter
  if not adapter.rank:
    raise ValueError(
      "the run has no adapters; set config.model.adapter.rank when you train"
      " it, or write all of its parameters with --to_hf"
    )
  tensors, ranks = {}, {}
  for module, parts in layout.modules(table, network).items():
    if any("lora_a" in layout.of(params, part.owner) for part in parts):
      own = _module(parts, params, adapter)
      ranks[prefix + module] = len(own[layout.A])
      for name, array in own.items():
        key = layout.PREFIX + prefix + module + name
        tensors[key] = np.ascontiguousarray(array.astype(np.dtype(dtype)))
  fields = _fields(adapter, ranks)
  fields["base_model_name_or_path"] = base
  fields["target_modules"] = _targets(table, network, ranks, prefix)
  with new_folder(folder) as new:
    data = safetensors.numpy.save(tensors, {"format": "pt"})
    (new / layout.WEIGHTS).write_bytes(data)
    files.write_json(new / layout.CONFIG, fields)
  return ranks


def _module(
  parts: list[Part], params: PyTree, adapter: LoRA
) -> dict[str, np.ndarray]:
  """Returns the tensors of a published module, by what its name adds."""
  outs = sum(part.place.rows for part in parts)
  ours = [
    (part, layout.of(params, part.owner))
    for part in parts
    if "lora_a" in layout.of(params, part.owner)
  ]
  layer = lambda part, own, name: np.asarray(own[name][part.index], np.float32)
  b = np.zeros((outs, adapter.rank * len(ours)), np.float32)
  for i, (part, own) in enumerate(ours):
    columns = slice(i * adapter.rank, (i + 1) * adapter.rank)
    b[part.rows, columns] = layer(part, own, "lora_b").T
  a = [layer(part, own, "lora_a").T for part, own in ours]
  tensors = {layout.A: np.concatenate(a), layout.B: b}
  if isinstance(adapter, DoRA):
    # PEFT's magnitudes are the norms themselves, ours what is added to them.
    magnitude = [
      layout.norms(layout.of(params, part.owner)["kernel"], part)
      for part in parts
    ]
    tensors[layout.MAGNITUDE] = np.concatenate(magnitude)
    for part, own in ours:
      change = layer(part, own, "lora_magnitude")
      tensors[layout.MAGNITUDE][part.rows] += change
  return tensors


def _fields(adapter: LoRA, ranks: Mapping[str, int]) -> dict[str, Any]:
  """Returns what the configuration says of the adapter."""
  wide = {
    re.escape(module): rank
    for module, rank in ranks.items()
    if rank != adapter.rank
  }
  power = 1.0 if adapter.scaling == "rank" else 0.5
  return {
    "peft_type": "LORA",
    "task_type": None,
    "r": adapter.rank,
    "lora_alpha": _number(adapter.alpha),
    "lora_dropout": 0.0,
    "use_rslora": adapter.scaling == "root",
    "use_dora": isinstance(adapter, DoRA),
    "rank_pattern": wide,
    "alpha_pattern": {
      key: _number(adapter.scale * rank**power) for key, rank in wide.items()
    },
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
  }


def _number(value: float) -> float | int:
  return int(value) if value == int(value) else value


def _targets(
  table: Table, network: Any, ranks: Mapping[str, int], prefix: str
) -> list[str] | str:
  """Returns the last names of the modules, or else a regular expression.

  A last name that other modules have, too, does not say which are meant.
  """
  places = places_of(table, layout.bare(network))
  everything = {
    prefix + key.removesuffix(".weight") for key in expected(places)
  }
  last = lambda module: module.rpartition(".")[2]
  names = {last(module) for module in ranks}
  if {m for m in everything if last(m) in names} == set(ranks):
    return sorted(names)
  layers: dict[str, list[str]] = {}
  for parts in layout.modules(table, network).values():
    place = parts[0].place
    module = prefix + place.key(parts[0].index).removesuffix(".weight")
    if module in ranks:
      pattern = re.escape(prefix + place.name.theirs.removesuffix(".weight"))
      number = str(place.layers[parts[0].index[0]])
      layers.setdefault(pattern, []).append(number)
  return "|".join(
    pattern.replace(re.escape(LAYER), f"({'|'.join(numbers)})")
    for pattern, numbers in layers.items()
  )
