"""The name table of each published family; `convert` reads them both ways."""

import dataclasses

import numpy as np

from dllm_jax.models import dit, DiTConfig, gemma, transformer
from dllm_jax.pretrained.table import Name, Table


def _inverse_frequencies(config: DiTConfig) -> np.ndarray:
  dim = config.head_dim
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return np.float32(1) / np.float32(config.rope_theta) ** exponent


def _affine(theirs: str, ours: str) -> tuple[Name, Name]:
  return (
    Name(f"{theirs}.weight", f"{ours}/kernel", contracts=1),
    Name(f"{theirs}.bias", f"{ours}/bias"),
  )


_BLOCK = "blocks.{i}."

DIT = Table(
  family="DiT",
  network=dit,
  names=(
    Name("vocab_embed.embedding", "embed/embedding", kept=1, vocabulary=True),
    *_affine("sigma_map.mlp.0", "time/hidden"),
    *_affine("sigma_map.mlp.2", "time/out"),
    Name("cond_map.embedding_table.weight", "classes/embedding", kept=1),
    Name(_BLOCK + "norm1.weight", "layers/attention_norm/scale"),
    Name(
      _BLOCK + "attn_qkv.weight",
      tuple(f"layers/attention/{x}/kernel" for x in "qkv"),
      contracts=1,
    ),
    Name(
      _BLOCK + "attn_out.weight",
      "layers/attention/o/kernel",
      contracts=2,
    ),
    Name(_BLOCK + "norm2.weight", "layers/mlp_norm/scale"),
    *_affine(_BLOCK + "mlp.0", "layers/mlp/up"),
    *_affine(_BLOCK + "mlp.2", "layers/mlp/down"),
    *_affine(_BLOCK + "adaLN_modulation", "layers/modulation"),
    Name("output_layer.norm_final.weight", "final_norm/scale"),
    *_affine("output_layer.adaLN_modulation", "final_modulation"),
    Name(
      "output_layer.linear.weight",
      "unembed/kernel",
      contracts=1,
      vocabulary=True,
    ),
    Name("output_layer.linear.bias", "unembed/bias", vocabulary=True),
  ),
  prefixes=("backbone.", "model.backbone.", "module."),
  tied=("output_layer.linear.weight", "vocab_embed.embedding"),
  derived={"rotary_emb.inv_freq": _inverse_frequencies},
  ignored=(
    r"(.*\.)?sampling_eps_(min|max)",
    r"noise\..*",
    r"ema\..*",
  ),
)
"""MDLM, SEDD, BD3-LM and UDLM: bare, or under "backbone." as exported.

Under "backbone." a Lightning module's own tensors may lie beside them: its noise
schedule, and an averaged copy of the parameters. That is a list without names,
so that it stays unused, and `load_pretrained` warns of it.
"""


def _linear(theirs: str, ours: str, contracts: int = 1) -> Name:
  return Name(f"{theirs}.weight", f"{ours}/kernel", contracts=contracts)


def _perceptron(theirs: str, ours: str) -> tuple[Name, ...]:
  """Returns the names of gate, up and down."""
  return tuple(
    _linear(f"{theirs}.{x}_proj", f"{ours}/{x}") for x in ("gate", "up", "down")
  )


_LAYER = "model.layers.{i}."
_ATTENTION = "layers/attention/"
_FREQUENCIES = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"

_ENDS = (
  Name("model.embed_tokens.weight", "embed/embedding", kept=1, vocabulary=True),
  Name("model.norm.weight", "final_norm/scale"),
  Name("lm_head.weight", "unembed/kernel", contracts=1, vocabulary=True),
)
_NORMS = (
  Name(_LAYER + "input_layernorm.weight", "layers/attention_norm/scale"),
  Name(_LAYER + "post_attention_layernorm.weight", "layers/mlp_norm/scale"),
)
_SEPARATE = (
  *(_linear(f"{_LAYER}self_attn.{x}_proj", f"{_ATTENTION}{x}") for x in "qkv"),
  *(
    Name(f"{_LAYER}self_attn.{x}_proj.bias", f"{_ATTENTION}{x}/bias")
    for x in "qkv"
  ),
  *(
    Name(f"{_LAYER}self_attn.{x}_norm.weight", f"{_ATTENTION}{x}_norm/scale")
    for x in "qk"
  ),
  _linear(_LAYER + "self_attn.o_proj", _ATTENTION + "o", contracts=2),
)
_EXPERTS = tuple(
  Name(
    f"{_LAYER}mlp.experts.{{e}}.{x}_proj.weight",
    f"layers/mlp/experts/{x}",
    contracts=1,
  )
  for x in ("gate", "up", "down")
)
_TIED = ("lm_head.weight", "model.embed_tokens.weight")


def _llama_like(family: str, *more: Name) -> Table:
  return Table(
    family=family,
    network=transformer,
    names=(*_DENSE, *more),
    tied=_TIED,
    ignored=(_FREQUENCIES,),
  )


_DENSE = (
  *_ENDS,
  *_NORMS,
  *_SEPARATE,
  *_perceptron(_LAYER + "mlp", "layers/mlp"),
)


DREAM = _llama_like("Dream")
QWEN = _llama_like("Qwen")
LLAMA = _llama_like("LLaMA")
SDAR = _llama_like("SDAR")
QWEN_MOE = _llama_like(
  "Qwen-MoE", _linear(_LAYER + "mlp.gate", "layers/mlp/router"), *_EXPERTS
)
SDAR_MOE = dataclasses.replace(QWEN_MOE, family="SDAR-MoE")
_NEMOTRON = {"model.": "encoder.", "lm_head.": "diffusion_head."}
NEMOTRON = Table(
  family="Nemotron-Labs-Diffusion",
  network=transformer,
  names=tuple(
    dataclasses.replace(one, theirs=one.theirs.replace(*pair))
    for one in _DENSE
    for pair in _NEMOTRON.items()
    if one.theirs.startswith(pair[0])
  ),
  ignored=(r"encoder\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
)
# Gate, down and up, in this order.
MIXTRAL = _llama_like(
  "Mixtral",
  _linear(_LAYER + "block_sparse_moe.gate", "layers/mlp/router"),
  *(
    Name(
      f"{_LAYER}block_sparse_moe.experts.{{e}}.{theirs}.weight",
      f"layers/mlp/experts/{ours}",
      contracts=1,
    )
    for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up"))
  ),
)
LLADA_MOE = _llama_like(
  "LLaDA-MoE",
  _linear(_LAYER + "mlp.gate", "layers/mlp/router"),
  *_EXPERTS,
  *_perceptron(_LAYER + "mlp.shared_expert", "layers/mlp/shared"),
)

_WTE = "model.transformer."
_LLADA_BLOCK = "model.transformer.blocks.{i}."

LLADA = Table(
  family="LLaDA",
  network=transformer,
  names=(
    Name(_WTE + "wte.weight", "embed/embedding", kept=1, vocabulary=True),
    Name(_LLADA_BLOCK + "attn_norm.weight", "layers/attention_norm/scale"),
    *(_linear(f"{_LLADA_BLOCK}{x}_proj", f"{_ATTENTION}{x}") for x in "qkv"),
    *(
      Name(f"{_LLADA_BLOCK}{x}_proj.bias", f"{_ATTENTION}{x}/bias")
      for x in "qkv"
    ),
    _linear(_LLADA_BLOCK + "attn_out", _ATTENTION + "o", contracts=2),
    Name(_LLADA_BLOCK + "ff_norm.weight", "layers/mlp_norm/scale"),
    _linear(_LLADA_BLOCK + "ff_proj", "layers/mlp/gate"),
    _linear(_LLADA_BLOCK + "up_proj", "layers/mlp/up"),
    _linear(_LLADA_BLOCK + "ff_out", "layers/mlp/down"),
    Name(_WTE + "ln_f.weight", "final_norm/scale"),
    Name(
      _WTE + "ff_out.weight",
      "unembed/kernel",
      contracts=1,
      vocabulary=True,
    ),
  ),
  tied=(_WTE + "ff_out.weight", _WTE + "wte.weight"),
  ignored=(r"model\.transformer\.(.*\.)?rotary_emb\.inv_freq",),
)

LLADA2_MOE = Table(
  family="LLaDA2",
  network=transformer,
  names=(
    Name(
      "model.word_embeddings.weight", "embed/embedding", kept=1, vocabulary=True
    ),
    *_ENDS[1:],
    *_NORMS,
    Name(
      _LAYER + "attention.query_key_value.weight",
      tuple(f"{_ATTENTION}{x}/kernel" for x in "qkv"),
      contracts=1,
    ),
    Name(
      _LAYER + "attention.query_key_value.bias",
      tuple(f"{_ATTENTION}{x}/bias" for x in "qkv"),
    ),
    Name(
      _LAYER + "attention.query_layernorm.weight",
      _ATTENTION + "q_norm/scale",
    ),
    Name(
      _LAYER + "attention.key_layernorm.weight",
      _ATTENTION + "k_norm/scale",
    ),
    _linear(_LAYER + "attention.dense", _ATTENTION + "o", contracts=2),
    *_perceptron(_LAYER + "mlp", "layers/mlp"),
    _linear(_LAYER + "mlp.gate", "layers/mlp/router"),
    Name(_LAYER + "mlp.gate.expert_bias", "layers/mlp/router/expert_bias"),
    *_EXPERTS,
    *_perceptron(_LAYER + "mlp.shared_experts", "layers/mlp/shared"),
  ),
  tied=("lm_head.weight", "model.word_embeddings.weight"),
  ignored=(_FREQUENCIES,),
)

_DECODER = "model.decoder."
_GEMMA_LAYER = "model.decoder.layers.{i}."
_TEXT = "model.encoder.language_model."

GEMMA = Table(
  family="DiffusionGemma",
  network=gemma,
  names=(
    Name(
      _DECODER + "embed_tokens.weight",
      "embed/embedding",
      kept=1,
      vocabulary=True,
    ),
    Name(_DECODER + "norm.weight", "final_norm/scale"),
    Name(
      _DECODER + "self_conditioning.pre_norm.weight",
      "self_conditioning/norm/scale",
    ),
    *_perceptron(_DECODER + "self_conditioning", "self_conditioning/mlp"),
    *(
      Name(f"{_GEMMA_LAYER}{theirs}.weight", f"layers/{ours}_norm/scale")
      for theirs, ours in (
        ("input_layernorm", "attention"),
        ("post_attention_layernorm", "attention_post"),
        ("pre_feedforward_layernorm", "mlp"),
        ("post_feedforward_layernorm_1", "mlp_post"),
        ("pre_feedforward_layernorm_2", "routed"),
        ("post_feedforward_layernorm_2", "routed_post"),
        ("post_feedforward_layernorm", "sum_post"),
      )
    ),
    *(
      _linear(f"{_GEMMA_LAYER}self_attn.{x}_proj", f"{_ATTENTION}{x}")
      for x in "qkv"
    ),
    *(
      Name(
        f"{_GEMMA_LAYER}self_attn.{x}_norm.weight",
        f"{_ATTENTION}{x}_norm/scale",
      )
      for x in "qk"
    ),
    _linear(_GEMMA_LAYER + "self_attn.o_proj", _ATTENTION + "o", contracts=2),
    *_perceptron(_GEMMA_LAYER + "mlp", "layers/mlp"),
    _linear(_GEMMA_LAYER + "router.proj", "layers/routed/router"),
    Name(_GEMMA_LAYER + "router.scale", "layers/routed/router/scale"),
    Name(
      _GEMMA_LAYER + "router.per_expert_scale",
      "layers/routed/router/expert_scale",
    ),
    Name(
      _GEMMA_LAYER + "experts.gate_up_proj",
      ("layers/routed/experts/gate", "layers/routed/experts/up"),
      contracts=1,
      fused=True,
    ),
    Name(
      _GEMMA_LAYER + "experts.down_proj",
      "layers/routed/experts/down",
      contracts=1,
      fused=True,
    ),
    Name(_GEMMA_LAYER + "layer_scalar", "layers/canvas_scale"),
    Name(_TEXT + "layers.{i}.layer_scalar", "layers/text_scale"),
  ),
  tied=("lm_head.weight", _DECODER + "embed_tokens.weight"),
  copies=((r"model\.encoder\.language_model\.(.+)", r"model.decoder.\1"),),
  carried=(r"model\.encoder\.(vision_tower|embed_vision)\..+",),
)
"""DiffusionGemma: names of the decoder, which the encoder's repeat, if anything.

All but the number that multiplies a layer's output, which each has of its own.
What reads images is carried along.
"""
