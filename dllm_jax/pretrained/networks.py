"""From the fields of a published config to the config of our network.

Options that our networks do not have are refused by name.
"""

from collections.abc import Mapping
import math
from typing import Any

from dllm_jax.models import DiTConfig, rotary, TransformerConfig
from dllm_jax.pretrained.fields import Fields


def llada(f: Fields) -> TransformerConfig:
  """Returns LLaDA's network."""
  f.only(
      activation_type="silu", alibi=False, rope=True, block_type="llama",
      layer_norm_type="rms", include_bias=False, attention_layer_norm=False,
      input_emb_norm=False, scale_logits=False, bias_for_layer_norm=False,
      layer_norm_with_affine=True, attention_dropout=0.0, residual_dropout=0.0,
      embedding_dropout=0.0,
  )  # fmt: skip
  width, heads = f.integer("d_model"), f.integer("n_heads")
  kv_heads = 1 if f.flag("multi_query_attention") else heads
  return TransformerConfig(
    vocab_size=f.integer("embedding_size", "vocab_size"),
    width=width,
    layers=f.integer("n_layers"),
    heads=heads,
    kv_heads=f.integer("n_kv_heads", default=kv_heads),
    mlp_dim=f.integer(
      "mlp_hidden_size", default=int(f.number("mlp_ratio", 4.0) * width)
    ),
    norm_eps=f.number("rms_norm_eps", 1e-5),
    rope_theta=f.number("rope_theta", 10_000.0),
    qkv_bias=f.flag("include_qkv_bias"),
    tied=f.flag("weight_tying"),
  )


def llama(f: Fields, **changes: Any) -> TransformerConfig:
  """Returns the network of configs that are written as LLaMA's."""
  f.only(
      hidden_act="silu", mlp_bias=False, use_sliding_window=False,
      attention_dropout=0.0, use_bias=False, clip_qkv=None,
  )  # fmt: skip
  _only_full_attention(f)
  width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
  head_dim = f.integer("head_dim", default=width // max(heads, 1))
  return TransformerConfig(
    **{
      "vocab_size": f.integer("vocab_size"),
      "width": width,
      "layers": f.integer("num_hidden_layers"),
      "heads": heads,
      "kv_heads": f.integer("num_key_value_heads", default=heads),
      "head_dim": head_dim,
      "mlp_dim": f.get("intermediate_size"),
      "norm_eps": f.number("rms_norm_eps", 1e-6),
      **_rotary(f, head_dim),
      "tied": f.flag("tie_word_embeddings"),
    }
    | changes
  )


def _only_full_attention(f: Fields) -> None:
  """Raises ValueError if a layer sees less than all, a window say."""
  kinds = f.get("layer_types", default=[])
  others = sorted({str(kind) for kind in kinds} - {"full_attention"})
  if others:
    raise ValueError(
      f"{f.path}: layer_types has {', '.join(others)}, which is not supported;"
      " legal: full_attention"
    )
  if f.get("use_sliding_window") is None:  # Where it has no switch it is on.
    f.only(sliding_window=None)
  f.get("sliding_window")


def _rotary(f: Fields, head_dim: int) -> dict[str, Any]:
  """Returns what rotates: how much of a head, by which wavelengths.

  Newer configs have it all under `rope_parameters`, some once for each kind of
  layer, of which only those of full attention are there.
  """
  newer = f.get("rope_parameters")
  name = "rope_scaling" if f.get("rope_scaling") else "rope_parameters"
  r = f.section(name) if f.get("rope_scaling") or newer else Fields({}, f.path)
  if isinstance(r.get("full_attention"), Mapping):
    r = r.section("full_attention")
  theta = f.number("rope_theta", r.number("rope_theta", 10_000.0))
  share = r.number("partial_rotary_factor", 1.0)
  share = f.number("partial_rotary_factor", share)
  kind = r.get("rope_type", "type", default="default")
  if kind not in _SCALINGS:
    raise ValueError(
      f"{f.path}: {name} of type {kind!r} is not supported; legal:"
      f" {', '.join(_SCALINGS)}"
    )
  scaling = _SCALINGS[kind](f, r)
  r.no_others(*_UNUSED_OF_ROPE, what=f"{name} of type {kind!r}")
  return {
    "rotary_dim": int(head_dim * share),
    "rope_theta": theta,
    "rope_scaling": scaling,
  }


# Numbers of one kind of scaling, which others leave in a file.
_UNUSED_OF_ROPE = (
  "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
  "mscale", "mscale_all_dim", "original_max_position_embeddings", "finetuned",
)  # fmt: skip


def _llama3(f: Fields, r: Fields) -> rotary.Llama3:
  return rotary.Llama3(
    factor=r.number("factor"),
    first_length=r.integer("original_max_position_embeddings"),
    low=r.number("low_freq_factor"),
    high=r.number("high_freq_factor"),
  )


def _yarn(f: Fields, r: Fields) -> rotary.Yarn:
  factor = r.number("factor")
  scale = r.get("attention_factor")
  if scale is None and r.get("mscale") and r.get("mscale_all_dim"):
    grown = lambda name: 0.1 * r.number(name) * math.log(factor) + 1.0
    scale = grown("mscale") / grown("mscale_all_dim")
  first = r.get("original_max_position_embeddings")
  return rotary.Yarn(
    factor=factor,
    first_length=first or f.integer("max_position_embeddings"),
    low=r.number("beta_slow", 1.0),
    high=r.number("beta_fast", 32.0),
    whole=r.flag("truncate", True),
    scale=scale,
  )


_SCALINGS = {
  "default": lambda f, r: rotary.Unscaled(),
  "linear": lambda f, r: rotary.Linear(factor=r.number("factor")),
  "llama3": _llama3,
  "yarn": _yarn,
}


def qwen(f: Fields) -> TransformerConfig:
  """Returns Qwen 2, 2.5 and 3's network."""
  third = f.get("model_type") == "qwen3"
  asked = f.flag("attention_bias")
  bias = not third or asked  # Qwen 2 always has them
  return llama(f, qk_norm=third, qkv_bias=bias)


def qwen_moe(f: Fields) -> TransformerConfig:
  """Returns Qwen 3's network of experts."""
  layers = f.integer("num_hidden_layers")
  step = f.integer("decoder_sparse_step", default=1)
  dense = f.get("mlp_only_layers", default=[])
  return llama(
    f,
    qk_norm=True,
    qkv_bias=f.flag("attention_bias"),
    dense_layers=tuple(
      i for i in range(layers) if i in dense or (i + 1) % max(step, 1)
    ),
    router_normalised=f.flag("norm_topk_prob"),
    expert_dim=f.integer("moe_intermediate_size"),
    **_experts(f),
  )


def mixtral(f: Fields) -> TransformerConfig:
  """Returns Mixtral's network: every layer has experts, and nothing else."""
  return llama(
    f,
    norm_eps=f.number("rms_norm_eps", 1e-5),
    router_normalised=True,
    expert_dim=f.integer("intermediate_size"),
    **_experts(f),
  )


def _experts(f: Fields) -> dict[str, Any]:
  return {
    "experts": f.integer("num_experts", "num_local_experts"),
    "experts_per_token": f.integer("num_experts_per_tok"),
    "balance_weight": f.number("router_aux_loss_coef", 0.01),
  }


def meta(f: Fields) -> TransformerConfig:
  """Returns LLaMA's network."""
  f.only(attention_bias=False)
  return llama(f)


def sdar(f: Fields) -> TransformerConfig:
  """Returns SDAR's network: Qwen 3's."""
  f.only(attention_bias=False)
  return llama(f, qk_norm=True)


def llada_moe(f: Fields) -> TransformerConfig:
  """Returns LLaDA-MoE's network."""
  f.only(
      moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
      routed_scaling_factor=1, n_group=1, topk_group=1, router_num_group=1,
      router_topk_group=1,
  )  # fmt: skip
  f.get("norm_topk_prob")
  layers = f.integer("num_hidden_layers")
  kinds = f.get("moe_layer_freq", default=[1] * layers)
  if not isinstance(kinds, list) or len(kinds) != layers:
    raise ValueError(
      f"{f.path}: moe_layer_freq must name 0 or 1 for each of {layers} layers"
    )
  return llama(
    f,
    norm_eps=f.number("rms_norm_eps", 1e-5),
    qk_norm=f.flag("qk_layernorm", default=True),
    qkv_bias=f.flag("attention_bias"),
    mlp_dim=f.integer("dense_intermediate_size", "intermediate_size"),
    dense_layers=tuple(i for i, kind in enumerate(kinds) if not kind),
    expert_dim=f.integer("expert_intermediate_size"),
    shared_dim=f.integer("shared_expert_intermediate_size", default=0),
    # Deviates: the original ignores norm_topk_prob, and so must we.
    router_normalised=False,
    **_experts(f),
  )


def llada2(f: Fields) -> TransformerConfig:
  """Returns LLaDA2's network."""
  if f.get("expert_capacity"):
    raise ValueError(
      f"{f.path}: expert_capacity is LLaDA2.2's, which chooses experts by blocks"
      " and inserts and deletes tokens: it is not supported"
    )
  f.only(
      score_function="sigmoid", norm_topk_prob=True, use_rmsnorm=True,
      moe_router_enable_expert_bias=True, num_nextn_predict_layers=0,
      embedding_dropout=0.0, output_dropout=0.0,
  )  # fmt: skip
  expert_dim = f.integer("moe_intermediate_size")
  return llama(
    f,
    qk_norm=f.flag("use_qk_norm", default=True),
    qkv_bias=f.flag("use_qkv_bias"),
    dense_layers=tuple(range(f.integer("first_k_dense_replace", default=0))),
    experts=f.integer("num_experts", "num_local_experts"),
    experts_per_token=f.integer("num_experts_per_tok"),
    expert_dim=expert_dim,
    shared_dim=f.integer("num_shared_experts", default=0) * expert_dim,
    router="sigmoid",
    router_bias=True,
    router_groups=f.integer("n_group", default=1),
    router_top_groups=f.integer("topk_group", default=1),
    router_normalised=f.integer("num_experts_per_tok") > 1,
    router_scale=f.number("routed_scaling_factor", 1.0),
  )


def dit(f: Fields) -> DiTConfig:
  """Returns the DiT of an exported config, flat, or of a training config."""
  vocab = f.get("vocab_size", "dim")
  if vocab is None:
    vocab = f.integer("tokens") + (not has_uniform_noise(f))
  shape = f.section("model") if "model" in f.values else f
  adaptive = f.flag("adaln", default=shape.flag("adaln", default=True))
  return DiTConfig(
    vocab_size=vocab,
    width=shape.integer("hidden_dim", "hidden_size"),
    layers=shape.integer("n_blocks"),
    heads=shape.integer("n_heads"),
    cond_dim=shape.integer("cond_dim", default=128),
    adaptive=adaptive,
    tied=shape.flag("tie_word_embeddings"),
    dropout=shape.number("dropout", 0.0),
  )


def has_uniform_noise(f: Fields) -> bool:
  """Whether noise replaces tokens by others, so that there is no mask."""
  graph = f.get("graph", default={})
  return isinstance(graph, Mapping) and graph.get("type") == "uniform"
