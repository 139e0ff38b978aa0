"""What is known of one published family, and of its special tokens."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.table import Table


class Ids(NamedTuple):
  """Special tokens.

  Attributes:
    mask: the mask, or None for a family without one.
    end: what ends a text, or None.
    pad: padding, or None.
    begin: what begins a text, or None.
  """

  mask: int | None
  end: int | None = None
  pad: int | None = None
  begin: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What is known of one published family.

  Attributes:
    name: what it is called.
    table: its name table.
    model_types: `model_type`s of its configs.
    architectures: `architectures` of its configs.
    network: the network's config.
    objective: the objective's class.
    settings: its fields.
    sampler: the preset that samples as published.
    ids: the published special tokens.
    counts_padding: whether hidden slots take positions, as in LLaDA; else
      positions count visible ones, from 0, and hidden ones have 1 (Dream).
    matches: recognises configs without a `model_type`.
    output: `(objective, logits, tokens, t)` to what the original returns, where
      that is not its logits.
    adopts: whether a mask is added to start diffusion from its weights.
    harmless: fields of its configs that nothing here depends on.
  """

  name: str
  table: Table
  model_types: tuple[str, ...]
  architectures: tuple[str, ...] = ()
  network: Callable[[Fields], Any]
  objective: type
  settings: Callable[[Fields], dict[str, Any]] = lambda fields: {}
  sampler: str
  ids: Ids = Ids(None)
  counts_padding: bool = True
  matches: Callable[[Fields], bool] = lambda fields: False
  output: Callable[..., Any] | None = None
  adopts: bool = False
  harmless: tuple[str, ...] = ()
