"""What is known of one published family, and who only calls itself by its name.

Several diffusion models name the autoregressive model, or the diffusion model,
that they began with; their code does something else.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple
import warnings

from dllm_jax.core.paths import Path
from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.files import read_json
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
    settings: its fields that the config says.
    fixed: its fields that no config says: the family always has them so.
    renamed: names that the config has for fields of `settings`.
    finetuning: fields of the objective in its published fine-tuning, which a
      run begins with.
    sampler: the preset that samples as published.
    sampling: fields of a sampler by the names that its `generation_config.json`
      has for them.
    ids: the published special tokens.
    counts_padding: whether hidden slots take positions, as in LLaDA; else
      positions count visible ones, from 0, and hidden ones have 1 (Dream).
    chosen: tells the family from those of the same names.
    masked: whether one of its tokens is a mask.
    matches: recognises configs without a `model_type`.
    output: `(objective, logits, tokens, t)` to what the original returns, where
      that is not its logits.
    adopts: whether a mask is added to start diffusion from its weights.
    widths: what the shapes of its tensors say of fields that its config may
      leave out.
    codes: of a family with image tokens, how many codes there are and how many
      tokens a picture has; None for one of text.
    harmless: fields of its configs that nothing here depends on.
  """

  name: str
  table: Table
  model_types: tuple[str, ...]
  architectures: tuple[str, ...] = ()
  network: Callable[[Fields], Any]
  objective: type
  settings: Callable[[Fields], dict[str, Any]] = lambda fields: {}
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  finetuning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampler: str
  sampling: Mapping[str, str] = dataclasses.field(default_factory=dict)
  ids: Ids = Ids(None)
  counts_padding: bool = True
  chosen: Callable[[Fields], bool] = lambda fields: True
  masked: bool = True
  matches: Callable[[Fields], bool] = lambda fields: False
  output: Callable[..., Any] | None = None
  adopts: bool = False
  widths: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda tensors: {}
  codes: Callable[[Fields], tuple[int, int]] | None = None
  harmless: tuple[str, ...] = ()

  @property
  def shift(self) -> int:
    """How many slots on its outputs predict."""
    return self.fixed.get("shift", self.objective.shift)

  def said(self, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of the objective under their names in the config."""
    return {self.renamed.get(key, key): one for key, one in values.items()}


def blocks(default: int, name: str = "block_size") -> Callable[[Fields], dict]:
  """Returns what reads the length of blocks from a config."""
  return lambda f: {"block_size": f.integer(name, default=default)}


def told(fields: Fields) -> str | None:
  """Returns what a config says, in our words, that it diffuses by."""
  return fields.get(DIFFUSION)


DIFFUSION = "diffusion_objective"
"""What a config.json of ours says where those of its layout do not."""


def sampler_fields(family: Family, folder: Path) -> dict[str, Any]:
  """Returns fields of the sampler that a folder's `generation_config.json` says.

  One that is null there is the preset's.
  """
  path = folder / "generation_config.json"
  if not family.sampling or not path.is_file():
    return {}
  said = read_json(path)
  # The rule of the draws has a section of its own.
  said |= said.get("sampler_config") or {}
  return {
    ours: said[theirs]
    for theirs, ours in family.sampling.items()
    if said.get(theirs) is not None
  }


_OTHERS = {
  "SDLMQwen2ForCausalLM": "SDLM, which predicts windows of masks",
  "EfficientDLM": "Efficient-DLM, which denoises blocks",
}
"""Models that are known to call themselves by another's `model_type`."""


def classes(fields: Fields) -> list[str]:
  """Returns the names under `architectures`."""
  value = fields.get("architectures", default=[])
  return [str(one) for one in (value if isinstance(value, list) else [value])]


def code(fields: Fields) -> list[str]:
  """Returns where networks of a folder's own are, as `file.Class`."""
  value = fields.get("auto_map", default={})
  value = value.items() if isinstance(value, Mapping) else ()
  flat = [
    str(one)
    for key, named in value
    if str(key).startswith("AutoModel")
    for one in (named if isinstance(named, list) else [named])
  ]
  return sorted({name.rpartition("--")[2] for name in flat})


def check_own(family: Family, fields: Fields) -> None:
  """Checks that a config is its family's, and not only called so.

  Raises:
    ValueError: it names another network, in its architectures or in code.
  """
  kind, path = fields.get("model_type"), fields.path
  own_code = code(fields)
  own = set(family.architectures)
  # A bare network, without its head, may stand beside the whole.
  for end in ("ForCausalLM", "ModelLM"):
    own |= {name.replace(end, "Model") for name in family.architectures}
  last = {name.rpartition(".")[2] for name in own_code} | set(classes(fields))
  foreign = sorted(last - own)
  if family.architectures and foreign:
    why = next((_OTHERS[one] for one in foreign if one in _OTHERS), None)
    raise ValueError(
      f"{path} has model_type {kind!r}, but its code is {', '.join(foreign)}:"
      f" {why or f'another model than {family.name}'}, which is not supported;"
      f" {family.name}'s is {', '.join(family.architectures)}"
    )
  if kind is not None and str(kind).lower() not in family.model_types:
    raise ValueError(
      f"{path} has model_type {kind!r}, but architectures"
      f" {', '.join(classes(fields))}; mend one of them"
    )
  if family.adopts and own_code:
    raise ValueError(
      f"{path} has model_type {kind!r}, but code of its own,"
      f" {', '.join(own_code)}: another model than {family.name}, which is not"
      " supported; if it is the same, remove auto_map"
    )
  if family.name == "idlm" and told(fields) is None:
    size = fields.integer("block_size")
    warnings.warn(
      f"{path} may be SDAR's (block-causal, unshifted) or I-DLM's (causal,"
      f" shifted), which have the same fields; block_size {size} is I-DLM's, as"
      " which it is read. Say so by --as=idlm, or --as=sdar if it is not",
      stacklevel=4,
    )
