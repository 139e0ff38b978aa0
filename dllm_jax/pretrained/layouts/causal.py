"""Families that read causally, and yet decide several tokens a call."""

from typing import Any

from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.pretrained import names, networks
from dllm_jax.pretrained.family import blocks, Family, Ids, told
from dllm_jax.pretrained.fields import Fields


def is_idlm(f: Fields) -> bool:
  """Whether a config that is named SDAR's is I-DLM's: as it is told, or likely.

  Both have the same names and fields; SDAR's blocks are of 4 tokens and more.
  """
  said = told(f)
  if said in ("sdar", "idlm"):
    return said == "idlm"
  named = str(f.get("model_type", default="sdar")).lower() == "sdar"
  return named and f.integer("block_size", default=4) < 4


def _idlm(f: Fields) -> dict[str, Any]:
  return {"masks_ahead": f.integer("block_size", default=3)}


FAMILIES: tuple[Family, ...] = (
  Family(
    name="idlm",
    table=names.SDAR,
    model_types=("sdar",),
    architectures=("SDARForCausalLM",),
    network=networks.sdar,
    objective=Autoregressive,
    settings=_idlm,
    fixed={"begins": False},
    renamed={"masks_ahead": "block_size"},
    sampler="idlm",
    ids=Ids(mask=151669, end=151645),
    chosen=is_idlm,
    harmless=(  # all of its training code
      "debug",
      "fuse_cross_entropy",
      "use_regular_causal",
    ),
  ),
  Family(
    name="wedlm",
    table=names.QWEN,
    model_types=("wedlm",),
    architectures=("WeDLMForCausalLM",),
    network=networks.wedlm,
    objective=BD3LM,
    settings=blocks(32),
    fixed={"attention": "decided_first"},
    finetuning={
      "parameterisation": "softmax",
      "normalisation": "weight",
      "autoregressive_weight": 1.0,
    },
    sampler="wedlm",
    ids=Ids(mask=151665, end=151643, pad=151643),
  ),
)
