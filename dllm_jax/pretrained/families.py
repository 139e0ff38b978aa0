"""The registry of published families: from a `config.json` to our objects.

A family is found by `architectures`, then by `model_type`, which several share,
then by its shape. What it says is data: a name table, and functions from the
fields of the config to a network's config and an objective. Nothing in the folder
is ever imported: where it has code of its own that is another model than the one
that it is named after, it is refused.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from dllm_jax.core.schedule import Geometric, LogLinear
from dllm_jax.core.types import Objective
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.pretrained import names, networks
from dllm_jax.pretrained.family import Family as Family
from dllm_jax.pretrained.family import Ids as Ids
from dllm_jax.pretrained.fields import Fields

# ----------------------------------------------------------------- objectives


def _sedd_settings(f: Fields) -> dict[str, Any]:
  noise = f.section("noise")
  noise.only(type=("loglinear", "geometric"))
  schedule = LogLinear()
  if noise.get("type") == "geometric":
    schedule = Geometric(
      sigma_min=noise.number("sigma_min", 1e-4),
      sigma_max=noise.number("sigma_max", 20.0),
    )
  uniform = networks.has_uniform_noise(f)
  return {
    "schedule": schedule,
    "graph": "uniform" if uniform else "absorbing",
    "scale_by_sigma": f.section("model").flag("scale_by_sigma", not uniform),
  }


def _time(f: Fields) -> dict[str, Any]:
  return {"time_conditioning": f.flag("time_conditioning")}


def _blocks(default: int) -> Callable[[Fields], dict[str, Any]]:
  return lambda f: {"block_size": f.integer("block_size", default=default)}


def _begins(f: Fields) -> dict[str, Any]:
  # Ours: what is published begins as its tokenizer says, and nothing else.
  return {"begins": f.flag("begins")}


def _training_config(f: Fields, kind: str) -> bool:
  """Whether this is the config that a Lightning module was trained with."""
  algo = f.get("algo", default={})
  name = algo.get("name") if isinstance(algo, Mapping) else None
  name = name or ("mdlm" if f.get("parameterization") == "subs" else None)
  return isinstance(f.get("model"), Mapping) and name == kind


FAMILIES: tuple[Family, ...] = (
  Family(
    name="llada",
    table=names.LLADA,
    model_types=("llada",),
    architectures=("LLaDAModelLM",),
    network=networks.llada,
    objective=LLaDA,
    sampler="llada",
    ids=Ids(mask=126336, end=126081, pad=126081),
    harmless=(
      "attention_layer_norm_with_affine",
      "rope_full_precision",
      "block_group_size",
      "alibi_bias_max",
      "vocab_size",
    ),
  ),
  Family(
    name="dream",
    table=names.DREAM,
    model_types=("dream",),
    architectures=("DreamModel",),
    network=lambda f: networks.llama(f, qkv_bias=True),
    objective=Dream,
    sampler="dream",
    ids=Ids(mask=151666, end=151643, pad=151643),
    counts_padding=False,
  ),
  Family(
    name="sdar",
    table=names.SDAR,
    model_types=("sdar",),
    architectures=("SDARForCausalLM",),
    network=networks.sdar,
    objective=BD3LM,
    settings=_blocks(4),
    sampler="sdar",
    ids=Ids(mask=151669, end=151643, pad=151643),
  ),
  Family(
    name="llada_moe",
    table=names.LLADA_MOE,
    model_types=("lladamoe", "llada_moe"),
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    network=networks.llada_moe,
    objective=LLaDA,
    sampler="llada",
    ids=Ids(mask=156895, end=156892, pad=156892),
  ),
  Family(
    name="llada2_moe",
    table=names.LLADA2_MOE,
    model_types=("llada2_moe",),
    architectures=("LLaDA2MoeModelLM",),
    network=networks.llada2,
    objective=BD3LM,
    settings=_blocks(32),
    sampler="llada2",
    ids=Ids(mask=156895, end=156892, pad=156892),
    harmless=("router_dtype", "seq_aux", "mtp_loss_scaling_factor"),
  ),
  Family(
    name="qwen_moe",
    table=names.QWEN_MOE,
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    network=networks.qwen_moe,
    objective=Autoregressive,
    settings=_begins,
    sampler="autoregressive",
    adopts=True,
  ),
  Family(
    name="mixtral",
    table=names.MIXTRAL,
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    network=networks.mixtral,
    objective=Autoregressive,
    settings=_begins,
    sampler="autoregressive",
    adopts=True,
  ),
  Family(
    name="qwen",
    table=names.QWEN,
    model_types=("qwen2", "qwen3"),
    architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    network=networks.qwen,
    objective=Autoregressive,
    settings=_begins,
    sampler="autoregressive",
    adopts=True,
    harmless=("block_size",),
  ),
  Family(
    name="llama",
    table=names.LLAMA,
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    network=networks.meta,
    objective=Autoregressive,
    settings=_begins,
    sampler="autoregressive",
    adopts=True,
  ),
  Family(
    name="bd3lm",
    table=names.DIT,
    model_types=("bd3lm",),
    architectures=("BD3LM",),
    network=networks.dit,
    objective=BD3LM,
    settings=lambda f: _blocks(16)(f) | _time(f),
    sampler="bd3lm",
    matches=lambda f: _training_config(f, "bd3lm"),
  ),
  Family(
    name="mdlm",
    table=names.DIT,
    model_types=("mdlm",),
    architectures=("MDLM",),
    network=networks.dit,
    objective=MDLM,
    settings=_time,
    sampler="mdlm",
    matches=lambda f: _training_config(f, "mdlm"),
  ),
  Family(
    name="sedd",
    table=names.DIT,
    model_types=("sedd",),
    architectures=("SEDD",),
    network=networks.dit,
    objective=SEDD,
    settings=_sedd_settings,
    sampler="sedd",
    matches=lambda f: "graph" in f.values and "tokens" in f.values,
    output=lambda objective, logits, z, t: objective.log_score(logits, z, t),
  ),
)


def find(fields: Fields) -> Family:
  """Returns the family of a config.

  Raises:
    ValueError: it is none that is known, or only named like one.
  """
  kind = fields.get("model_type")
  classes = fields.get("architectures", default=[])
  classes = classes if isinstance(classes, list) else [classes]
  tests = (
    lambda one: any(name in one.architectures for name in classes),
    lambda one: isinstance(kind, str) and kind.lower() in one.model_types,
    lambda one: kind is None and one.matches(fields),
  )
  for test in tests:
    for family in FAMILIES:
      if test(family):
        _check_code(family, fields, classes)
        return _adopted(family, fields)
  known = ", ".join(t for family in FAMILIES for t in family.model_types)
  raise ValueError(
    f"{fields.path}: model_type {kind!r} with architectures {classes} is"
    f" unknown; known model_types: {known}"
  )


def _check_code(family: Family, fields: Fields, classes: list[str]) -> None:
  """Raises ValueError if a config names another model than its family.

  Several diffusion models call themselves by the autoregressive model, or by the
  diffusion model, that they began with; their code does something else.
  """
  code = fields.get("auto_map", default={})
  code = list(code.values()) if isinstance(code, Mapping) else []
  flat = [n for one in code for n in (one if isinstance(one, list) else [one])]
  named = {
    str(name).rpartition("--")[2]
    for name in flat
    if not str(name).endswith(("Config", "Tokenizer", "TokenizerFast"))
  }
  last = {name.rpartition(".")[2] for name in named}
  # A bare network, without its head, may stand beside the whole.
  own = {*family.architectures} | {
    name.replace("ForCausalLM", "Model") for name in family.architectures
  }
  foreign = sorted((last | set(classes)) - own)
  if family.architectures and foreign:
    raise ValueError(
      f"{fields.path} has model_type {fields.get('model_type')!r}, but its code"
      f" is {', '.join(foreign)}: another model than {family.name}, which is"
      f" not supported; {family.name}'s is {', '.join(family.architectures)}"
    )
  if family.adopts and named:
    raise ValueError(
      f"{fields.path} has model_type {fields.get('model_type')!r}, but code of"
      f" its own, {', '.join(sorted(named))}: another model than {family.name},"
      " which is not supported; if it is the same, remove auto_map"
    )
  if family.name == "sdar" and (
    fields.get("fuse_cross_entropy") or fields.get("block_size", default=4) < 4
  ):
    raise ValueError(
      f"{fields.path} has model_type 'sdar' with fuse_cross_entropy or a"
      " block_size below 4: it is I-DLM's, which is causal and shifted, and not"
      " supported"
    )


_ADOPTED = {
  "dream": (Dream, lambda fields: {}, "dream"),
  "llada": (LLaDA, lambda fields: {}, "llada"),
  "bd3lm": (BD3LM, _blocks(16), "bd3lm"),
}


def _adopted(family: Family, fields: Fields) -> Family:
  """Returns a family with the objective that its weights were adopted for."""
  target = fields.get("diffusion_objective")
  if target is None or not family.adopts:
    return family
  if target not in _ADOPTED:
    raise ValueError(
      f"{fields.path}: diffusion_objective {target!r} is unknown; legal:"
      f" {', '.join(_ADOPTED)}"
    )
  objective, settings, sampler = _ADOPTED[target]
  return dataclasses.replace(
    family,
    objective=objective,
    settings=settings,
    sampler=sampler,
    adopts=False,
  )


def by_name(name: str) -> Family:
  """Returns a family by its name.

  Raises:
    ValueError: there is none.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  known = ", ".join(family.name for family in FAMILIES)
  raise ValueError(f"unknown family {name!r}; legal: {known}")


def objective(
  family: Family, fields: Fields, vocab_size: int, special: Ids
) -> Objective:
  """Returns the objective that a family was trained with."""
  settings = family.settings(fields)
  row = length(fields)
  block = settings.get("block_size", 1)
  if networks.has_uniform_noise(fields):  # every token is a real one
    return family.objective(vocab_size=vocab_size, mask_id=None, **settings)
  space = TokenSpace(
    vocab_size=vocab_size,
    mask_id=special.mask,
    bos_id=special.begin,
    eos_id=special.end,
    length=max(row // block, 1) * block,
  )
  return family.objective.over(space, **settings)


def check_fields(family: Family, fields: Fields) -> None:
  """Raises ValueError for a field that may change the network unnoticed.

  Of configs that name their family: those that a Lightning module was trained
  with say much else.
  """
  if fields.get("model_type") is not None:
    length(fields)
    fields.no_others(*family.harmless, what=family.name)


def length(fields: Fields) -> int:
  """Returns the tokens of a row that the family was trained on."""
  inner = fields.get("model", default={})
  nested = inner.get("length") if isinstance(inner, Mapping) else None
  found = fields.get(
    "max_sequence_length", "max_position_embeddings", "model_length", "length"
  )
  return found or nested or 1024
