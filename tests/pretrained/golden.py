"""Recorded cases laid out as published folders."""

import json
import pathlib
import shutil

import safetensors

from dllm_jax.models import DiTConfig
from dllm_jax.pretrained import families
from dllm_jax.pretrained.fields import Fields
from tests import golden_cases
from tests.golden_cases import Case


def _supported(path: pathlib.Path) -> bool:
  """Whether a case keeps the configuration of a family that is supported."""
  config = json.loads(path.read_text()).get("hf_config")
  if config is None:
    return False
  try:
    families.find(Fields(config, path)).network(Fields(config, path))
  except ValueError:
    return False
  # A reward model's head is no part of a published language model.
  with safetensors.safe_open(path.with_name("weights.safetensors"), "np") as f:
    return "value_head.weight" not in f.keys()  # noqa: SIM118  It has no iterator.


PUBLISHED = tuple(
  sorted(
    path.parent.name
    for path in golden_cases.ROOT.glob("*/config.json")
    if _supported(path)
  )
)
"""The cases that keep the published configuration of a known family."""


def published_config(case: Case) -> dict:
  """Returns the `config.json` of the folder that a case stands for."""
  if "hf_config" in case.config:
    return case.config["hf_config"]
  config = case.config["config"]
  if "graph" in config:  # SEDD publishes its training config as it is
    return config
  model = config["model"]
  algo = config.get("algo", config)
  kind = "bd3lm" if "algo" in config else "mdlm"
  return {
    "model_type": kind,
    "architectures": [kind.upper()],
    "vocab_size": case.config["vocab_size"],
    "hidden_dim": model["hidden_size"],
    "n_blocks": model["n_blocks"],
    "n_heads": model["n_heads"],
    "cond_dim": model["cond_dim"],
    "dropout": model["dropout"],
    "model_length": model["length"],
    "time_conditioning": algo["time_conditioning"],
    "block_size": config.get("block_size"),
  }


def vocabulary(name: str) -> int:
  """Returns how many tokens the network of a published case has."""
  fields = Fields(published_config(golden_cases.load(name)), name)
  return families.find(fields).network(fields).vocab_size


def plain(name: str) -> list[int]:
  """Returns the ids of a published case that have no meaning of their own."""
  config = published_config(golden_cases.load(name))
  meant = {config[key] for key in config if key.endswith("_token_id")}
  return sorted(set(range(vocabulary(name))) - meant)


def publish(name: str, folder: pathlib.Path, **changes) -> pathlib.Path:
  """Lays a case out as a published folder; returns it."""
  folder.mkdir(parents=True, exist_ok=True)
  config = published_config(golden_cases.load(name)) | changes
  config = {key: value for key, value in config.items() if value is not ...}
  (folder / "config.json").write_text(json.dumps(config))
  shutil.copyfile(
    golden_cases.ROOT / name / "weights.safetensors",
    folder / "model.safetensors",
  )
  return folder


def dit_config(case: Case) -> DiTConfig:
  """Returns our config of a case whose network is the DiT."""
  model = case.config["config"]["model"]
  data = case.config["config"].get("data", {})
  return DiTConfig(
    vocab_size=case.config.get("vocab_size") or case.config["dim"],
    width=model["hidden_size"],
    layers=model["n_blocks"],
    heads=model["n_heads"],
    cond_dim=model["cond_dim"],
    num_classes=data.get("num_classes") or 0,
    tied=model.get("tie_word_embeddings", False),
    dropout=model["dropout"],
  )
