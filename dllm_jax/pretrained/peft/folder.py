"""A folder of PEFT's: `adapter_config.json` and `adapter_model.safetensors`.

Matrices are called as in the family's published layout, one pair a layer,
`base_model.model.MODULE.lora_A.weight` [r, in] and `lora_B.weight` [out, r]:
transposes of ours. DoRA's `lora_magnitude_vector` [out] is the magnitude m, of which
we train m - |W|.
"""

from collections.abc import Iterator, Mapping
import math
import os
import re
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.files import new_folder
from dllm_jax.models.adapters import column_norms, DoRA, LoRA, matrices
from dllm_jax.models.quantised import dense
from dllm_jax.pretrained import files
from dllm_jax.pretrained.table import flatten, Place, places_of, Table, unflatten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHT = ".weight"
_PARTS = {
  "lora_A.weight": "lora_a",
  "lora_B.weight": "lora_b",
  "lora_magnitude_vector": "lora_magnitude",
}
# What PEFT may say of adapters and a network here may not, with its plain value.
_PLAIN = {
  "peft_type": ("LORA",),
  "bias": ("none", None),
  "fan_in_fan_out": (False, None),
  "modules_to_save": (None, []),
  "rank_pattern": ({}, None),
  "alpha_pattern": ({}, None),
  "target_parameters": (None, []),
  "trainable_token_indices": (None, {}),
  "lora_bias": (False, None),
}


def write(
  path: str | os.PathLike,
  params: PyTree,
  *,
  adapter: LoRA,
  table: Table,
  network: Any,
  prefix: str = "",
) -> list[str]:
  """Writes adapters as a folder that PEFT loads; returns the names of tensors.

  Args:
    path: a new folder.
    params: the network's parameters with adapters.
    adapter: what they are.
    table: the names of the family.
    network: the network's config, without adapters.
    prefix: what published names begin with.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: the family has adapted matrices in one tensor with others.
  """
  places, kernels = places_of(table, network), matrices(params)
  owners = [owner for owner in kernels if adapter.on(owner)]
  tensors, modules = {}, {}
  for owner in owners:
    place = _alone(places[f"{owner}/kernel"], table, network)
    own = _published(params, owner, kernels[owner], adapter)
    for module, index in _modules(place, prefix):
      modules[module] = place.name.theirs
      for theirs, array in own.items():
        array = np.ascontiguousarray(array[index].T)
        tensors[f"{_PREFIX}{module}.{theirs}"] = array
  config = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "lora_dropout": 0.0,
    "use_rslora": adapter.scaling == "root",
    "use_dora": isinstance(adapter, DoRA),
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": _targets(modules, places, prefix),
  }
  from safetensors.numpy import save  # pylint: disable=g-import-not-at-top

  with new_folder(path) as folder:
    data = save(dict(sorted(tensors.items())), {"format": "pt"})
    (folder / WEIGHTS).write_bytes(data)
    files.write_json(folder / CONFIG, config)
  return sorted(tensors)


def read(
  path: str | os.PathLike,
  params: PyTree,
  *,
  table: Table,
  network: Any,
  prefix: str = "",
) -> tuple[LoRA, PyTree]:
  """Returns the adapters of a folder of PEFT's, and parameters with them.

  Args:
    path: the folder.
    params: the network's parameters, without adapters.
    table: the names of the family.
    network: the network's config.
    prefix: what published names begin with.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: they are no adapters for this network, or such as only PEFT has.
  """
  folder = paths.place(path)
  for name in (CONFIG, WEIGHTS):
    if not (folder / name).is_file():
      raise FileNotFoundError(
        f"{folder / name} is missing; a folder of PEFT's holds {CONFIG} and"
        f" {WEIGHTS} (have it saved with safe_serialization=True)"
      )
  config = files.read_json(folder / CONFIG)
  adapter = _adapter(folder, config)
  tensors = files.read_file(folder / WEIGHTS)
  left, flat, owners = set(tensors), {}, []
  places, kernels = places_of(table, network), matrices(params)
  names = list(_PARTS)[: 3 if isinstance(adapter, DoRA) else 2]
  for owner, kernel in kernels.items():
    place = places[f"{owner}/kernel"]
    keys = {
      theirs: [f"{_PREFIX}{m}.{theirs}" for m, _ in _modules(place, prefix)]
      for theirs in names
    }
    every = [key for part in keys.values() for key in part]
    if not left & set(every):
      continue
    _alone(place, table, network)
    missing = [key for key in every if key not in tensors]
    if missing:
      raise ValueError(
        f"{folder}: {missing[0]} is missing: {owner} has adapters in all layers,"
        " or in none"
      )
    left -= set(every)
    owners.append(owner)
    for theirs, part in keys.items():
      stack = np.stack([np.asarray(tensors[key]).T for key in part])
      flat[f"{owner}/{_PARTS[theirs]}"] = stack.astype(np.float32)
    _check(folder, flat, owner, place, adapter)
    if isinstance(adapter, DoRA):
      flat[f"{owner}/lora_magnitude"] -= _norms(kernel, place)
  if left or not owners:
    raise ValueError(
      f"{folder}: {sorted(left)[0] if left else 'nothing'} is an adapter that"
      f" has no place in this {table.family} network; legal are those of"
      f" {', '.join(kernels)}"
    )
  targets = ".*" if len(owners) == len(kernels) else "|".join(owners)
  return type(adapter)(
    rank=adapter.rank,
    alpha=adapter.alpha,
    scaling=adapter.scaling,
    targets=targets,
  ), unflatten(flatten(params) | {k: jnp.asarray(v) for k, v in flat.items()})


def _adapter(folder, config: Mapping[str, Any]) -> LoRA:
  """Returns what a config describes.

  Raises:
    ValueError: something that there is not here.
  """
  for field, plain in _PLAIN.items():
    if config.get(field, plain[-1]) not in plain:
      raise ValueError(
        f"{folder / CONFIG} has {field} {config[field]!r}, for which there is"
        " nothing here: merge these adapters with PEFT (merge_and_unload), and"
        " import the merged weights"
      )
  kind = DoRA if config.get("use_dora") else LoRA
  return kind(
    rank=int(config["r"]),
    alpha=float(config["lora_alpha"]),
    scaling="root" if config.get("use_rslora") else "rank",
  )


def _check(folder, flat, owner: str, place: Place, adapter: LoRA) -> None:
  """Checks the shapes of one stack of adapters.

  Raises:
    ValueError: they are others than the network's.
  """
  stack = place.shape[: place.name.stacked]
  fan_in, fan_out = math.prod(place.ins), math.prod(place.outs)
  right = {
    "lora_a": (*stack, fan_in, adapter.rank),
    "lora_b": (*stack, adapter.rank, fan_out),
    "lora_magnitude": (*stack, fan_out),
  }
  for name, shape in right.items():
    found = flat.get(f"{owner}/{name}")
    if found is not None and found.shape != shape:
      raise ValueError(
        f"{folder}: {name} of {owner} is {found.shape}, and this network of rank"
        f" {adapter.rank} has {shape}; were they trained on these weights?"
      )


def _alone(place: Place, table: Table, network: Any) -> Place:
  """Returns the place of a matrix that has a published tensor of its own.

  Raises:
    ValueError: it shares one.
  """
  if len(place.name.paths) > 1:
    ours = ", ".join(path.removesuffix("/kernel") for path in place.name.paths)
    raise ValueError(
      f"{table.family} has {ours} in one tensor, {place.name.theirs}, for which"
      " PEFT has one pair and not three: choose adapter.targets without them, or"
      " merge the adapters and export with --to_hf"
    )
  return place


def _modules(place: Place, prefix: str) -> Iterator[tuple[str, tuple]]:
  """Yields (published module, index in the stack) of a matrix."""
  for key, index in place.keys():
    yield prefix + key.removesuffix(_WEIGHT), index


def _norms(kernel: Any, place: Place) -> np.ndarray:
  """Returns the norms of a stack's columns, `[N, out]`."""
  flat = dense(kernel).reshape(
    *place.shape[: place.name.stacked], math.prod(place.ins), -1
  )
  return np.asarray(column_norms(flat))


def _published(
  params: PyTree, owner: str, kernel: Any, adapter: LoRA
) -> dict[str, np.ndarray]:
  """Returns a stack of adapters in float32, by PEFT's names of its parts."""
  node = params
  for part in owner.split("/"):
    node = node[part]
  own = {
    theirs: np.asarray(node[ours]).astype(np.float32)
    for theirs, ours in _PARTS.items()
    if ours in node
  }
  if isinstance(adapter, DoRA):
    shape = own["lora_A.weight"].shape[-2], own["lora_B.weight"].shape[-1]
    flat = dense(kernel).reshape(-1, *shape)
    own["lora_magnitude_vector"] += np.asarray(column_norms(flat))
  return own


def _targets(
  modules: Mapping[str, str], places: Mapping[str, Place], prefix: str
) -> list[str] | str:
  """Returns the last names of modules, or a pattern where others share them."""
  others = {
    module
    for place in places.values()
    for module, _ in _modules(place, prefix)
    if module not in modules
  }
  last = lambda name: name.rsplit(".", 1)[-1]
  ends = sorted({last(module) for module in modules})
  if not set(ends) & {last(module) for module in others}:
    return ends
  stems = sorted({
    re.escape(prefix + name.removesuffix(_WEIGHT)).replace(r"\{i\}", r"\d+")
    for name in modules.values()
  })
  return f"({'|'.join(stems)})"
