"""Published weights in and out."""

from dllm_jax.pretrained.convert import (
  Converted,
  Source,
  to_ours,
  to_theirs,
)
from dllm_jax.pretrained.families import FAMILIES, Family, Ids
from dllm_jax.pretrained.load import (
  load_pretrained,
  Pretrained,
  save_pretrained,
)
from dllm_jax.pretrained.names import DIT
from dllm_jax.pretrained.table import Name, parameters, Table

__all__ = [
  "Converted",
  "DIT",
  "FAMILIES",
  "Family",
  "Ids",
  "load_pretrained",
  "Name",
  "parameters",
  "Pretrained",
  "save_pretrained",
  "Source",
  "Table",
  "to_ours",
  "to_theirs",
]
