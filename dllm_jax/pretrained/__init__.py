"""Published weights in and out."""

from dllm_jax.pretrained.convert import (
    Converted,
    Name,
    Table,
    to_ours,
    to_theirs,
)
from dllm_jax.pretrained.names import DIT

__all__ = [
    "Converted",
    "DIT",
    "Name",
    "Table",
    "to_ours",
    "to_theirs",
]
