"""PEFT's folders onto a network of ours."""

from collections.abc import Mapping
import math
import os
import re
from typing import Any

from jaxtyping import PyTree
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.paths import Path
from dllm_jax.models import DoRA, LoRA
from dllm_jax.pretrained import files
from dllm_jax.pretrained.peft import layout
from dllm_jax.pretrained.peft.layout import Part
from dllm_jax.pretrained.table import Table, unflatten

# Fields that say how an adapter was made, or where; the tensors say the rest.
_HARMLESS = {
  "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config",
  "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
  "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
  "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
  "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
  "revision", "runtime_config", "target_modules", "task_type", "use_dora",
  "use_rslora",
}  # fmt: skip
_NEUTRAL = (None, False, "none", [], {})


def load_adapter(
  folder: str | os.PathLike,
  table: Table,
  params: PyTree,
  network: Any,
  *,
  prefix: str = "",
) -> tuple[LoRA, PyTree]:
  """Returns a folder's adapter, and parameters with its own beside the matrices.

  Adapters of lower rank than the largest are filled with zeros, which neither
  change anything nor train; so are layers without one.

  Args:
    folder: what PEFT wrote.
    table: the names of the family that it is for.
    params: the network's parameters, without adapters.
    network: the network's config.
    prefix: what the published names begin with.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: the folder says what no adapter here does, or is for another
      network.
  """
  folder = paths.place(folder)
  path = folder / layout.CONFIG
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing; a folder of PEFT holds {layout.CONFIG} and"
      f" {layout.WEIGHTS}"
    )
  fields = files.read_json(path)
  _check_fields(path, fields)
  found = _tensors(folder, prefix)
  known = layout.modules(table, network)
  for module in found:
    if module not in known:
      legal = sorted({name.rpartition(".")[2] for name in known})
      raise ValueError(
        f"{folder}: there is no place for an adapter of {module}; adapters are"
        f" on {', '.join(legal)} of the layers of {table.family}"
      )
  adapter, scales = _adapter(path, fields, found, known)
  own: dict[str, np.ndarray] = {}
  for module, tensors in found.items():
    _check_shapes(folder, module, tensors, known[module], adapter)
    for part in known[module]:
      share = scales[module] / adapter.scale
      _fill(own, part, tensors, share, adapter, params)
  if isinstance(adapter, DoRA):
    _check_layers(folder, own, found, known)
  return adapter, _beside(params, unflatten(own))


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
  """Checks that a configuration is of an adapter that there is here.

  Raises:
    ValueError: it is not.
  """
  if fields.get("peft_type") != "LORA":
    raise ValueError(
      f"{path}: peft_type {fields.get('peft_type')!r} is no adapter here; legal:"
      " LORA (also with use_dora, use_rslora)"
    )
  for name, value in fields.items():
    if name not in _HARMLESS and value not in _NEUTRAL:
      raise ValueError(
        f"{path}: {name} {value!r} changes what no adapter here does; have it"
        " merged into the weights and import those"
      )
  for name in ("r", "lora_alpha"):
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise ValueError(f"{path}: {name} must be a number, not {value!r}")
  how = fields.get("init_lora_weights", True)
  if isinstance(how, str) and re.match("pissa|olora|corda|loftq|lora_ga", how):
    raise ValueError(
      f"{path}: init_lora_weights {how!r} has changed the weights that the"
      " adapter is for; have it saved as a plain one (PEFT's"
      " path_initial_model_for_weight_conversion)"
    )


def _tensors(folder: Path, prefix: str) -> dict[str, dict[str, np.ndarray]]:
  """Returns the tensors of each published module, by what its name adds."""
  path = folder / layout.WEIGHTS
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing; have the adapter saved as safetensors (a pickle is"
      " never read)"
    )
  found: dict[str, dict[str, np.ndarray]] = {}
  for key, tensor in files.read_file(path).items():
    match = re.fullmatch(
      rf"{re.escape(layout.PREFIX)}(.+)"
      rf"({'|'.join(map(re.escape, (layout.A, layout.B, layout.MAGNITUDE)))})",
      key.removesuffix(".weight") if "magnitude" in key else key,
    )
    if match is None:
      raise ValueError(
        f"{path}: tensor {key} is no part of an adapter here, which are"
        f" MODULE{layout.A}, {layout.B}, {layout.MAGNITUDE}"
      )
    module = match[1].removeprefix(prefix)
    found.setdefault(module, {})[match[2]] = np.asarray(tensor, np.float32)
  if not found:
    raise ValueError(f"{path} holds no tensors; save the adapter again")
  return found


def _adapter(
  path: Path, fields: Mapping[str, Any], found, known
) -> tuple[LoRA, dict[str, float]]:
  """Returns the adapter of the largest rank, and the scale of each module."""
  root = bool(fields.get("use_rslora"))
  alpha, patterns = fields.get("lora_alpha", 8), fields.get("alpha_pattern")
  power = 0.5 if root else 1.0
  scales, ranks = {}, {}
  for module, tensors in found.items():
    if layout.A not in tensors or layout.B not in tensors:
      raise ValueError(
        f"{path.parent}: module {module} lacks lora_A or lora_B; save the"
        " adapter again"
      )
    ranks[module] = tensors[layout.A].shape[0]
    own = next(
      (
        value
        for key, value in (patterns or {}).items()
        if re.match(rf"(.*\.)?({key})$", module)
      ),
      alpha,
    )
    scales[module] = own / ranks[module] ** power
  rank = max(ranks.values())
  # The scale of those without patterns; where all have one, of the first.
  plain = fields.get("r") in ranks.values()
  scale = alpha / fields["r"] ** power if plain else next(iter(scales.values()))
  owners = {part.owner for module in found for part in known[module]}
  every = {part.owner for parts in known.values() for part in parts}
  make = DoRA if fields.get("use_dora") else LoRA
  return make(
    rank=rank,
    alpha=scale * rank**power,
    targets=".*" if owners == every else "|".join(sorted(owners)),
    scaling="root" if root else "rank",
  ), scales


def _check_shapes(folder, module, tensors, parts, adapter: LoRA) -> None:
  """Checks the shapes of a module's tensors.

  Raises:
    ValueError: one has another, or DoRA's magnitudes are missing.
  """
  ins = math.prod(parts[0].place.ins)
  outs = sum(part.place.rows for part in parts)
  rank = tensors[layout.A].shape[0]
  wanted = {layout.A: (rank, ins), layout.B: (outs, rank)}
  if isinstance(adapter, DoRA):
    wanted[layout.MAGNITUDE] = (outs,)
  shapes = {name: array.shape for name, array in tensors.items()}
  if shapes != wanted:
    raise ValueError(
      f"{folder}: the adapter of {module} has the shapes {shapes}, but the"
      f" network gives {wanted}; check that it is for these weights"
    )


def _check_layers(folder, own, found, known) -> None:
  """Checks that DoRA is on all layers of a matrix: its norms are, here.

  Raises:
    ValueError: it is not.
  """
  for module, parts in known.items():
    if module not in found and any(f"{p.owner}/lora_a" in own for p in parts):
      raise ValueError(
        f"{folder}: DoRA is on other layers, but not on {module}; have it"
        " merged into the weights and import those"
      )


def _fill(own, part: Part, tensors, share: float, adapter: LoRA, params):
  """Puts a module's tensors into the layer of one of its matrices."""
  place, rank = part.place, tensors[layout.A].shape[0]
  stack = place.shape[: place.name.stacked]

  def layer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    whole = own.setdefault(
      f"{part.owner}/{name}", np.zeros((*stack, *shape), np.float32)
    )
    return whole[part.index]

  a = layer("lora_a", (math.prod(place.ins), adapter.rank))
  a[:, :rank] = tensors[layout.A].T
  b = layer("lora_b", (adapter.rank, place.rows))
  b[:rank] = tensors[layout.B][part.rows].T * np.float32(share)
  if isinstance(adapter, DoRA):
    kernel = layout.of(params, part.owner)["kernel"]
    change = tensors[layout.MAGNITUDE][part.rows] - layout.norms(kernel, part)
    layer("lora_magnitude", (place.rows,))[:] = change


def _beside(params: PyTree, own: PyTree) -> PyTree:
  """Returns both trees in one."""
  if not isinstance(own, dict):
    return own
  return params | {
    name: _beside(params.get(name, {}), value) for name, value in own.items()
  }
