"""Families that denoise with a network known by another name.

Qwen's, LLaMA's, Ministral's, Dream's and LLaDA2's, most of them block by block.
"""

from typing import Any

from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.pretrained import names, networks
from dllm_jax.pretrained.family import blocks, Family, Ids, told
from dllm_jax.pretrained.fields import Fields


def _nemotron(f: Fields) -> dict[str, Any]:
  weight = f.number("ar_loss_weight", 1.0)
  return blocks(32)(f) | {"autoregressive_weight": weight}


def _llada22(f: Fields) -> dict[str, Any]:
  # The published config may lack the tokens, and the tokenizer has them.
  return blocks(32)(f) | {
    "delete_id": f.integer("delete_token_id", default=156930),
    "split_id": f.integer("split_token_id", default=156931),
  }


def is_dreamon(f: Fields) -> bool:
  """Whether a config of Dream's is DreamOn's: as it is told, or by its token."""
  named = f.get("expand_token_id") is not None
  return told(f) == "dreamon" or (told(f) is None and named)


def _dreamon(f: Fields) -> dict[str, Any]:
  # The published folder was not read: its tokenizer has this token.
  return {
    "expand_id": f.integer("expand_token_id", default=151667),
    "delete_id": f.integer("eos_token_id", default=151643),
  }


_MASKED = {"parameterisation": "softmax", "normalisation": "masked"}
"""A mean over masked tokens, the mask's own probability left in."""

FAMILIES: tuple[Family, ...] = (
  Family(
    name="dreamon",
    table=names.DREAM,
    model_types=("dream",),
    architectures=("DreamModel",),
    network=networks.dream,
    objective=Dream,
    settings=_dreamon,
    renamed={"expand_id": "expand_token_id", "delete_id": "eos_token_id"},
    sampler="dreamon",
    chosen=is_dreamon,
    ids=Ids(mask=151666, end=151643, pad=151643),
    counts_padding=False,
  ),
  Family(
    name="illada",
    table=names.LLAMA,
    # Which one the folder has is not known; the architecture is.
    model_types=("illada", "llada", "llama"),
    architectures=("ILLaDAForCausalLM",),
    network=networks.illada,
    objective=LLaDA,
    finetuning={"mask_prompts": True, "random_length": 0.0},
    sampler="llada",
    ids=Ids(mask=5),
  ),
  Family(
    name="sdar_moe",
    table=names.SDAR_MOE,
    model_types=("sdar_moe",),
    architectures=("SDARMoeForCausalLM",),
    network=networks.qwen_moe,
    objective=BD3LM,
    settings=blocks(4),
    sampler="sdar",
    ids=Ids(mask=151669, end=151643, pad=151643),
  ),
  Family(
    name="dream_reasoner",
    table=names.DREAM,
    model_types=("dream",),
    architectures=("DreamForCausalLM",),
    network=networks.dream_reasoner,
    objective=BD3LM,
    settings=blocks(32),
    sampler="dream_reasoner",
    ids=Ids(mask=151669, end=151645, pad=151643),
  ),
  Family(
    name="stable_diffcoder",
    table=names.LLAMA,
    model_types=("llama",),
    architectures=(
      "StableDiffcoderForCausalLM",
      "SeedDiffcoderForCausalLM",
      "LlamaForCausalLM",  # as copies of the tuned one have it, beside code
    ),
    network=networks.meta,
    objective=BD3LM,
    settings=blocks(4),
    sampler="llada",
    ids=Ids(mask=5, end=2, pad=1),
  ),
  Family(
    name="fast_dllm_v2",
    table=names.DREAM,
    model_types=("fast_dllm_qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM",),
    network=networks.dream,
    objective=BD3LM,
    settings=blocks(32, "bd_size"),
    fixed={"shift": 1, "opens": True},
    renamed={"block_size": "bd_size"},
    finetuning=_MASKED | {"weighting": "uniform", "complement": True},
    sampler="fast_dllm_v2",
    ids=Ids(mask=151665, end=151645, pad=151645),
    harmless=("conplemenrary_mask",),  # of its training, spelled so
  ),
  Family(
    name="nemotron",
    table=names.NEMOTRON,
    model_types=("nemotron_labs_diffusion",),
    architectures=("NemotronLabsDiffusionModel",),
    network=networks.nemotron,
    objective=BD3LM,
    settings=_nemotron,
    fixed={"attention": "causal_context", "opens": True, "times_of": "row"},
    renamed={"autoregressive_weight": "ar_loss_weight"},
    finetuning=_MASKED,
    sampler="nemotron",
    ids=Ids(mask=100, end=2),
  ),
  Family(
    name="llada22",
    table=names.LLADA2_MOE,
    model_types=("llada2_moe",),
    architectures=("LLaDA2MoeModelLM",),
    network=networks.llada2,
    objective=BD3LM,
    settings=_llada22,
    renamed={"delete_id": "delete_token_id", "split_id": "split_token_id"},
    sampler="llada2_2",
    ids=Ids(mask=156895, end=156892, pad=156892),
    chosen=lambda f: bool(f.get("expert_capacity")),
    harmless=("router_dtype", "rotary_dim", "seq_aux"),
  ),
)
