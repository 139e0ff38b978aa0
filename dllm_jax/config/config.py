"""Configurations: one flat file an experiment, read here and nowhere else.

A file under `configs/` defines `get_config() -> ConfigDict` and states only what
differs from the defaults, or from another file that it names as its `base`
(`config_file` finds and reads them). The schema is the frozen dataclasses
themselves: their fields are the legal fields, their docstrings say units and
legal values. Reading goes one way: ConfigDict -> dataclasses -> objects;
everything below this module sees dataclasses.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import types
import typing
from typing import Any

from ml_collections import config_dict, ConfigDict

from dllm_jax import models
from dllm_jax.config import files
from dllm_jax.core import check, paths
from dllm_jax.core.types import Denoiser, Objective
from dllm_jax.data import Dataset, Tokenizer
from dllm_jax.objectives import registry
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.objectives.texts import Fill
from dllm_jax.parallel import MeshConfig
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.checkpoint import Checkpoint
from dllm_jax.training.held_out import Evaluation
from dllm_jax.training.metrics import Logging
from dllm_jax.training.optimizer import Optimizer
from dllm_jax.training.step import Training

# By the names of the functions of `models` that build them.
_NETWORKS = dict(
  transformer=models.TransformerConfig,
  dit=models.DiTConfig,
  gemma=models.GemmaConfig,
  image_tokenizer=models.ImageTokenizerConfig,
)

# Filled in from the tokenizer and the objective, never by a config.
_DERIVED = {
  "model": {"vocab_size"},
  "objective": {f.name for f in dataclasses.fields(TokenSpace)},
}

# What a second start of a run may change.
_MAY_CHANGE = (
  "mesh",
  "logging",
  "checkpoint",
  "training.steps",
  "training.hang_seconds",
  "training.heartbeat_seconds",
  "training.profile_steps",
)


_SECTIONS = {
  "data": Dataset,
  "optimizer": Optimizer,
  "training": Training,
  "mesh": MeshConfig,
  "checkpoint": Checkpoint,
  "logging": Logging,
  "evaluation": Evaluation,
  "sampler": SamplerConfig,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A resolved configuration as dataclasses.

  Attributes:
    data: the text and how rows are cut from it.
    objective: name and fields of the objective, by `over(TokenSpace, **fields)`.
    model: name and fields of the network.
    optimizer: the optimiser.
    training: steps, batch, seed, averaging.
    mesh: sizes of the mesh axes.
    checkpoint: cadence and number of checkpoints.
    logging: what is reported.
    evaluation: how held-out text is evaluated.
    sampler: how text is sampled.
  """

  data: Dataset
  objective: Mapping[str, Any]
  model: Mapping[str, Any]
  optimizer: Optimizer
  training: Training
  mesh: MeshConfig
  checkpoint: Checkpoint
  logging: Logging
  evaluation: Evaluation
  sampler: SamplerConfig

  def build(self, tokenizer: Tokenizer) -> tuple[Objective, Denoiser]:
    """Returns the objective and the network over a tokenizer's vocabulary."""
    space = TokenSpace(
      vocab_size=tokenizer.vocab_size,
      mask_id=tokenizer.mask_id,
      bos_id=tokenizer.bos_id,
      eos_id=tokenizer.eos_id,
      length=self.data.length,
      images=getattr(tokenizer, "images", None),
    )
    fields = dict(self.objective)
    cls = registry.objective_class(fields.pop("name"))
    fields = {k: _nested("objective", cls, k, v) for k, v in fields.items()}
    objective = cls.over(space, **fields)
    build = getattr(models, self.model["name"])
    return objective, build(self.network(objective))

  @property
  def fill(self) -> Fill:
    """What conversations have behind them."""
    name = self.objective["name"]
    return registry.objective_class(name).filling(self.objective)

  def network(self, objective: Objective) -> Any:
    """Returns the network's config, with what the objective needs of it.

    Raises:
      ValueError: the network cannot be what the objective needs.
    """
    fields = dict(self.model)
    name = fields.pop("name")
    return _network(name, fields, objective)


def _network(name: str, fields: Mapping[str, Any], objective: Objective) -> Any:
  """Returns a network's config, with what the objective needs of it."""
  cls, needs = _NETWORKS[name], objective.network_fields()
  legal = {f.name for f in dataclasses.fields(cls)}
  network = cls(**{
    **{k: _nested("model", cls, k, v) for k, v in fields.items()},
    "vocab_size": objective.vocab_size,
    **{k: v for k, v in needs.items() if k in legal},
  })
  for field, value in needs.items():
    if getattr(network, field, None) != value:
      raise ValueError(
        f"{type(objective).__name__} needs a network with {field} {value}, "
        f"which config.model ({name}) is not; change its fields, or take "
        f"model.name {_default_network(type(objective))}"
      )
  return network


def load(name: str, names: Mapping[str, str] | None = None) -> ConfigDict:
  """Returns the resolved ConfigDict of a file, every legal field in it.

  `name` may end in ":smoke", a size that runs on a CPU in seconds; in a machine
  that the file was planned for, such as ":v5p:4x4x8"; or in one of its variants.

  Args:
    name: a path or the name of a bundled config.
    names: overrides of `objective.name` and `model.name`, which decide what
      other fields there are.

  Raises:
    FileNotFoundError: there is no such config.
    ValueError: the file has no get_config, or names an unknown field.

  Examples:
    >>> from dllm_jax import config
    >>> resolved = config.load("smoke")
    >>> resolved.objective.name
    'mdlm'
    >>> resolved.training.steps = 500  # and any other field
  """
  name, size = files.split(name)
  machines = files.machines(name) | files.variants(name)
  if size not in (legal := ["", "smoke", *machines]):
    raise ValueError(
      f"unknown size {size!r} of config {name!r}; legal: {', '.join(legal[1:])}"
    )
  given = files.read(files.find(name))
  for section, value in (names or {}).items():
    given = files.merged(given, {section: {"name": value}})
  given = files.merged(given, machines.get(size, {}))
  if size == "smoke":
    given = files.merged(given, _SMOKE)
    for field in ("kv_heads", "head_dim", "mlp_dim"):  # follow from the others
      given["model"].pop(field, None)
  return resolve(given)


_SMOKE = {
  "data": dict(path="shakespeare", tokenizer="char", length=32, format=None),
  "model": {"width": 32, "layers": 2, "heads": 2},
  "training": {"steps": 20, "batch_size": 8, "microbatches": 1},
  "evaluation": {"batches": 4, "passes": 2, "every_steps": 0},
  "checkpoint": {"every_steps": 10},
  "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1},
}


def resolve(given: Mapping[str, Any]) -> ConfigDict:
  """Returns a ConfigDict with every legal field, defaults filled in.

  Raises:
    ValueError: a section or field is unknown.
  """
  known = ("objective", "model", *_SECTIONS)
  check_names("section", given, known, "config")
  result = {}
  for section in known:
    fields = dict(given.get(section, {}))
    name = {}
    if section == "objective":
      name = {"name": fields.pop("name", "mdlm")}
      cls = registry.objective_class(name["name"])
    elif section == "model":
      objective = registry.objective_class(result["objective"]["name"])
      name = {"name": fields.pop("name", _default_network(objective))}
      if name["name"] not in _NETWORKS:
        raise ValueError(
          f"unknown network {name['name']!r}; legal: {', '.join(_NETWORKS)}"
        )
      cls = _NETWORKS[name["name"]]
    else:
      cls = _SECTIONS[section]
    result[section] = name | _complete(section, cls, fields)
  return ConfigDict(result)


def _default_network(objective: type[Objective]) -> str:
  """Returns the first network that has as many passes as an objective."""
  passes = lambda name: getattr(_NETWORKS[name], "two_passes", False)
  return next(k for k in _NETWORKS if passes(k) == objective.two_passes)


def _complete(section: str, cls: type, given: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a dataclass: given values, else defaults."""
  hints = typing.get_type_hints(cls)
  derived = _DERIVED.get(section, ())
  fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in derived}
  check_names("field", given, fields, f"config.{section}")
  result = {}
  for name, field in fields.items():
    value = given.get(name, field.default)
    if value is dataclasses.MISSING:
      if field.default_factory is dataclasses.MISSING:
        raise ValueError(f"config.{section}.{name} must be given")
      value = field.default_factory()
    choices = field.metadata.get("choices")
    if choices is not None:
      value = _as_fields(value, choices, f"config.{section}.{name}")
    if _optional(hints[name]):
      kind = _optional(hints[name])
      if isinstance(value, int) and kind is float:
        value = float(value)
      value = config_dict.FieldReference(value, field_type=kind)
    elif hints[name] is float and isinstance(value, int):
      value = float(value)
    result[name] = value
  return result


def _optional(hint: Any) -> type | None:
  """Returns T of `T | None`, else None."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    inner = [t for t in typing.get_args(hint) if t is not type(None)]
    if len(inner) == 1 and len(typing.get_args(hint)) == 2:
      inner = inner[0]
      origin = typing.get_origin(inner)
      return str if origin is typing.Literal else origin or inner
  return None


def _as_fields(value: Any, choices: Mapping[str, type], where: str) -> dict:
  """Returns `{"name": ..., fields}` of one of several dataclasses."""
  if dataclasses.is_dataclass(value):
    name = {v: k for k, v in choices.items()}[type(value)]
    shallow = {
      f.name: getattr(value, f.name) for f in dataclasses.fields(value)
    }
    value = {"name": name} | shallow
  fields = {"name": value} if isinstance(value, str) else dict(value)
  name = fields.pop("name", None)
  if name not in choices:
    raise ValueError(
      f"{where}: unknown name {name!r}; legal: {', '.join(choices)}"
    )
  return {"name": name} | _complete(where, choices[name], fields)


def _nested(section: str, cls: type, name: str, value: Any) -> Any:
  """Returns the dataclass of a nested section, or the value as it is."""
  field = {f.name: f for f in dataclasses.fields(cls)}[name]
  choices = field.metadata.get("choices")
  if choices is None or not isinstance(value, Mapping):
    return value
  fields, where = dict(value), f"config.{section}.{name}"
  chosen = fields.pop("name")
  if chosen not in choices:
    raise ValueError(
      f"{where}: unknown name {chosen!r}; legal: {', '.join(choices)}"
    )
  kind = choices[chosen]
  # Another name on the command line leaves the fields of the one before.
  other = sorted(fields.keys() - {f.name for f in dataclasses.fields(kind)})
  if other:
    raise ValueError(
      f"{where}: {chosen} has no field {', '.join(other)}; choose it with its "
      "own fields in a config file"
    )
  return kind(**{k: _nested(section, kind, k, v) for k, v in fields.items()})


def check_names(kind: str, given, legal, where: str) -> None:
  """Checks that names are among the legal ones.

  Raises:
    ValueError: one is not; the message names what is close.
  """
  for name in given:
    if name not in legal:
      hint = check.close(name, legal)
      raise ValueError(
        f"unknown {kind} {where}.{name}; {hint}legal: {', '.join(legal)}"
      )


def stored(workdir: str | os.PathLike) -> ConfigDict:
  """Returns the configuration of a run on disk.

  Raises:
    FileNotFoundError: there is no run.
    ValueError: its file is not valid JSON, or names an unknown field.
  """
  path = paths.place(workdir) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"no run in {workdir} (it has no config.json); train one with "
      "`dllm train --config=... --workdir=...`"
    )
  try:
    given = json.loads(path.read_text(encoding="utf-8"))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}); restore it, or use another "
      "--workdir"
    ) from error
  return resolve(given)


def parse(config: ConfigDict) -> Config:
  """Returns a resolved ConfigDict as dataclasses.

  Raises:
    ValueError: a field has an illegal value.
  """
  values = config.to_dict()
  parsed = {name: cls(**values[name]) for name, cls in _SECTIONS.items()}
  parsed["training"] = parsed["training"].of_rows(parsed["data"].length)
  return Config(objective=values["objective"], model=values["model"], **parsed)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Returns `path: old -> new` for fields that a second start may not change."""
  found = []

  def walk(a, b, path):
    if path in _MAY_CHANGE:
      return
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      for key in sorted({*a, *b}):
        walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif json.dumps(a) != json.dumps(b):  # Tuples come back as lists.
      found.append(f"config.{path}: {a!r} -> {b!r}")

  walk(old, new, "")
  return found
