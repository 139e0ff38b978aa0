"""The registry of published families: from a `config.json` to our objects.

A family is found by `architectures`, then by `model_type`, which several share,
then by its shape. What it says is data: a name table, and functions from the
fields of the config to a network's config and an objective. Nothing in the folder
is ever imported: where it has code of its own that is another model than the one
that it is named after, it is refused.
"""

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Any

from dllm_jax.core.images import ImageVocabulary
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
from dllm_jax.pretrained.family import (
  blocks,
  check_own,
  classes,
  code,
  DIFFUSION,
  told,
)
from dllm_jax.pretrained.family import Family as Family
from dllm_jax.pretrained.family import Ids as Ids
from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.layouts import blockwise, causal, gemma, mmada

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


def _mdlm_settings(f: Fields, **legal: Any) -> dict[str, Any]:
  f.section("noise").only(type="loglinear")
  algo = f.section("algo") if f.mapping("algo") else f
  algo.only(
      backbone=("dit", "hf_dit"), parameterization="subs", subs_masking=False,
      diffusion="absorbing_state", T=0, causal=False, causal_attention=False,
      **legal,
  )  # fmt: skip
  return {"time_conditioning": algo.flag("time_conditioning")}


def _bd3lm_settings(f: Fields) -> dict[str, Any]:
  return blocks(16)(f) | _mdlm_settings(f, cross_attn=True)


def _begins(f: Fields) -> dict[str, Any]:
  # Ours: what is published begins as its tokenizer says, and nothing else.
  return {"begins": f.flag("begins")}


def _training_config(f: Fields, kind: str) -> bool:
  """Whether this is the config that a Lightning module was trained with."""
  algo = f.get("algo", default={})
  name = algo.get("name") if isinstance(algo, Mapping) else None
  name = name or ("mdlm" if f.get("parameterization") == "subs" else None)
  return isinstance(f.get("model"), Mapping) and name == kind


# What a training config says besides: of the run, the data and the machine.
_OF_TRAINING = (
  "name", "length", "file", "report_all", "sigma_min", "sigma_max", "eps",
  "scale_by_sigma", "ngpus", "training", "eval", "optim", "sampling", "loader",
  "data", "mode", "seed", "trainer", "wandb", "hydra", "checkpointing",
  "callbacks", "lr_scheduler", "strategy", "cwd", "work_dir", "wandb_name",
  "load_dir", "neptune", "ignore_bos", "var_min", "sampling_eps_min",
  "sampling_eps_max", "clip_search_delta", "clip_search_widths",
  "fix_clipping", "sampler", "mdlm_loss_scale", "loss_type", "dropout",
)  # fmt: skip

_autoregressive = functools.partial(
  Family,
  objective=Autoregressive,
  settings=_begins,
  sampler="autoregressive",
  adopts=True,
)
_ANSWERS = {"normalisation": "sequence", "random_length": 0.0}
"""LLaDA's fine-tuning: an average over answers, of their fill too."""

FAMILIES: tuple[Family, ...] = (
  Family(
    name="llada",
    table=names.LLADA,
    model_types=("llada",),
    architectures=("LLaDAModelLM",),
    network=networks.llada,
    objective=LLaDA,
    finetuning=_ANSWERS,
    sampler="llada",
    ids=Ids(mask=126336, end=126081, pad=126081),
    harmless=(
      "attention_layer_norm_with_affine",  # of norms that are not there
      "rope_full_precision",
      "alibi_bias_max",
    ),
  ),
  Family(
    name="dream",
    table=names.DREAM,
    model_types=("dream",),
    architectures=("DreamModel",),
    network=networks.dream,
    objective=Dream,
    sampler="dream",
    chosen=lambda f: not blockwise.is_dreamon(f),
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
    settings=blocks(4),
    sampler="sdar",
    chosen=lambda f: not causal.is_idlm(f),
    ids=Ids(mask=151669, end=151643, pad=151643),
    harmless=(  # all of its training code
      "debug",
      "ep_size",
      "fuse_cross_entropy",
      "micro_forward",
      "skip_checkpoint",
      "use_deepep",
    ),
  ),
  Family(
    name="llada_moe",
    table=names.LLADA_MOE,
    model_types=("lladamoe", "llada_moe", "llada"),
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    network=networks.llada_moe,
    objective=LLaDA,
    finetuning=_ANSWERS,
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
    settings=blocks(32),
    sampler="llada2",
    chosen=lambda f: not f.get("expert_capacity"),
    ids=Ids(mask=156895, end=156892, pad=156892),
    # Its code asks partial_rotary_factor for rotary_dim.
    harmless=("router_dtype", "rotary_dim", "seq_aux"),
  ),
  _autoregressive(
    name="qwen_moe",
    table=names.QWEN_MOE,
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    network=networks.qwen_moe,
  ),
  _autoregressive(
    name="mixtral",
    table=names.MIXTRAL,
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    network=networks.mixtral,
  ),
  _autoregressive(
    name="qwen",
    table=names.QWEN,
    model_types=("qwen2", "qwen3"),
    architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    network=networks.qwen,
    harmless=("block_size", "fuse_cross_entropy"),  # SDAR's, which is its child
  ),
  _autoregressive(
    name="llama",
    table=names.LLAMA,
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    network=networks.meta,
  ),
  Family(
    name="bd3lm",
    table=names.DIT,
    model_types=("bd3lm",),
    architectures=("BD3LM",),
    network=networks.dit,
    objective=BD3LM,
    settings=_bd3lm_settings,
    sampler="bd3lm",
    harmless=_OF_TRAINING,
    matches=lambda f: _training_config(f, "bd3lm"),
  ),
  Family(
    name="mdlm",
    table=names.DIT,
    model_types=("mdlm",),
    architectures=("MDLM",),
    network=networks.dit,
    objective=MDLM,
    settings=lambda f: _mdlm_settings(f, cross_attn=False),
    sampler="mdlm",
    harmless=("block_size", *_OF_TRAINING),
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
    harmless=_OF_TRAINING,
    matches=lambda f: "graph" in f.values and "tokens" in f.values,
    output=lambda objective, logits, z, t: objective.log_score(logits, z, t),
  ),
  *blockwise.FAMILIES,
  *causal.FAMILIES,
  *gemma.FAMILIES,
  *mmada.FAMILIES,
)


def find(fields: Fields) -> Family:
  """Returns the family of a config.

  Raises:
    ValueError: it is none that is known, or only named like one.
  """
  kind = fields.get("model_type")
  named = classes(fields)
  written = [name.rpartition(".")[2] for name in code(fields)]
  tests = (
    lambda one: any(name in one.architectures for name in written),
    lambda one: any(name in one.architectures for name in named),
    lambda one: isinstance(kind, str) and kind.lower() in one.model_types,
    lambda one: kind is None and one.matches(fields),
  )
  for test in tests:
    for family in FAMILIES:
      if test(family) and family.chosen(fields):
        check_own(family, fields)
        return _adopted(family, fields)
  if str(kind).startswith("gemma"):
    raise ValueError(
      f"{fields.path}: model_type {kind!r} is an autoregressive Gemma, which"
      " writes from left to right; give DiffusionGemma's folder, whose"
      " model_type is 'diffusion_gemma'"
    )
  known = dict.fromkeys(t for family in FAMILIES for t in family.model_types)
  raise ValueError(
    f"{fields.path}: model_type {kind!r} with architectures {named} is"
    f" unknown; known model_types: {', '.join(known)}"
  )


def as_told(
  values: Mapping[str, Any], name: str | None, path: str | os.PathLike
) -> Fields:
  """Returns the fields of a config, with the family that a caller says it is.

  Args:
    values: what the file has.
    name: the family, or None for what the file says.
    path: the file, for messages.

  Raises:
    ValueError: the file is of another family.
  """
  if name is None:
    return Fields(values, path)
  kind = values.get("model_type")
  if str(kind).lower() not in by_name(name).model_types:
    raise ValueError(
      f"{path} has model_type {kind!r}, and {name}'s is"
      f" {by_name(name).model_types[0]!r}: leave --as={name} out"
    )
  return Fields({**values, DIFFUSION: name}, path)


_ADOPTED = {
  "dream": (Dream, lambda fields: {}, "dream"),
  "llada": (LLaDA, lambda fields: {}, "llada"),
  "bd3lm": (BD3LM, blocks(16), "bd3lm"),
}


def _adopted(family: Family, fields: Fields) -> Family:
  """Returns a family with the objective that its weights were adopted for."""
  target = told(fields)
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
  family: Family,
  fields: Fields,
  vocab_size: int,
  special: Ids,
  images: ImageVocabulary | None = None,
) -> Objective:
  """Returns the objective that a family was trained with."""
  settings = {**family.fixed, **family.settings(fields)}
  row = length(fields)
  block = settings.get("block_size", 1)
  if not has_mask(family, fields):
    return family.objective(vocab_size=vocab_size, mask_id=None, **settings)
  space = TokenSpace(
    vocab_size=vocab_size,
    mask_id=special.mask,
    bos_id=special.begin,
    eos_id=special.end,
    length=max(row // block, 1) * block,
    images=images,
  )
  return family.objective.over(space, **settings)


def has_mask(family: Family, fields: Fields) -> bool:
  """Whether one token of a model is the mask; else every token is a real one."""
  return family.masked and not networks.has_uniform_noise(fields)


def check_fields(family: Family, fields: Fields) -> None:
  """Raises ValueError for a field that may change the network unnoticed."""
  length(fields)
  fields.no_others(*family.harmless, what=family.name)


def length(fields: Fields) -> int:
  """Returns the tokens of a row that the family was trained on."""
  inner = fields.section("model")
  found = fields.get(
    "max_sequence_length", "max_position_embeddings", "model_length", "length"
  )
  return found or inner.get("length") or 1024
