"""Which matrices of ours lie in which module of a published network.

PEFT's A is `[rank, in]` and its B `[out, rank]`, the transposes of ours, a layer
each. Where one published matrix holds several of ours, its adapter does, too.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from dllm_jax.models import LoRA
from dllm_jax.models.adapters import column_norms, matrices
from dllm_jax.models.quantised import dense
from dllm_jax.pretrained.table import Place, places_of, Table, unflatten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the name of a module."""

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_WEIGHT = ".weight"


class Part(NamedTuple):
  """One layer of a matrix of ours, and where it lies.

  Attributes:
    owner: path of the matrix, without "/kernel".
    place: its place in the published tensor.
    index: the layer in the stack.
  """

  owner: str
  place: Place
  index: tuple[int, ...]

  @property
  def rows(self) -> slice:
    """Its rows of the published matrix."""
    return slice(self.place.before, self.place.before + self.place.rows)


def modules(table: Table, network: Any) -> dict[str, list[Part]]:
  """Returns what is in each published module that may have an adapter.

  Args:
    table: the family's names.
    network: the network's config; its own adapter does not matter.
  """
  places = places_of(table, bare(network))
  found: dict[str, list[Part]] = {}
  for owner, place in matrices(unflatten(places)).items():
    for key, index in place.keys():
      part = Part(owner, place, index)
      found.setdefault(key.removesuffix(_WEIGHT), []).append(part)
  for parts in found.values():
    parts.sort(key=lambda part: part.place.before)
  return found


def bare(network: Any) -> Any:
  """Returns a network's config without adapters."""
  return dataclasses.replace(network, adapter=LoRA())


def of(params: Any, path: str) -> Any:
  """Returns what lies at a path of nested dicts."""
  for name in path.split("/"):
    params = params[name]
  return params


def norms(kernel: Any, part: Part) -> np.ndarray:
  """Returns |W| of each output feature of one layer, in float32."""
  layer = dense(jax.tree.map(lambda x: x[part.index], kernel))
  return np.asarray(column_norms(layer.reshape(-1, part.place.rows)))
