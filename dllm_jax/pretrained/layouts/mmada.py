"""MMaDA: LLaDA's network and names, with image tokens behind those of text."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.objectives.mmada import MMaDA
from dllm_jax.pretrained import names, networks
from dllm_jax.pretrained.family import Family, Ids

_HEAD = 128  # features of LLaDA's heads, where a config does not say how many


def widths(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what tensors say of the network: published configs may name nothing.

  Args:
    tensors: what has a shape, by name.
  """
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  begin = next((n for n in shapes if n.endswith("blocks.0.q_proj.weight")), "")
  prefix = begin.removesuffix("blocks.0.q_proj.weight")
  shape = lambda name: shapes.get(f"{prefix}{name}.weight", (0, 0))
  (q, width), (kv, _) = shape("blocks.0.q_proj"), shape("blocks.0.k_proj")
  if not q:
    return {}
  found = {
    "d_model": width,
    "n_layers": sum(
      n.startswith(f"{prefix}blocks.") and n.endswith(".q_proj.weight")
      for n in shapes
    ),
    "mlp_hidden_size": shape("blocks.0.ff_proj")[0],
    "embedding_size": shape("wte")[0],
    "weight_tying": f"{prefix}ff_out.weight" not in shapes,
  }
  if q % _HEAD == 0 and kv % _HEAD == 0:
    found |= {"n_heads": q // _HEAD, "n_kv_heads": kv // _HEAD}
  return found


FAMILIES = (
  Family(
    name="mmada",
    table=names.LLADA,
    model_types=("mmada", "llada"),
    architectures=("MMadaModelLM",),
    network=networks.llada,
    objective=MMaDA,
    finetuning={"lm": 0.6, "mmu": 0.4, "t2i": 0.05, "text_over": "answer"},
    sampler="llada",
    ids=Ids(mask=126336, end=126081, pad=126081, begin=126080),
    widths=widths,
    codes=lambda f: (
      f.integer("codebook_size", default=8192),
      f.integer("num_vq_tokens", default=1024),
    ),
    harmless=(
      "codebook_size",  # of image tokens, read where there is a tokenizer
      "num_vq_tokens",
      "attention_layer_norm_with_affine",  # of norms that are not there
      "rope_full_precision",
      "alibi_bias_max",
      # Of the training scripts.
      "llm_vocab_size", "llm_model_path", "w_clip_vit",
      "num_new_special_tokens", "new_vocab_size", "gradient_checkpointing",
      "tie_word_embeddings", "pretrained_model_path",
    ),
  ),
)  # fmt: skip
