"""From the fields of a published config to the config of our network.

Options that our networks do not have are refused by name.
"""

from typing import Any

from dllm_jax.models import DiTConfig, GemmaConfig, TransformerConfig
from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.rope import rotation


def llada(f: Fields) -> TransformerConfig:
  """Returns LLaDA's network."""
  f.only(
      activation_type="silu", alibi=False, rope=True, block_type="llama",
      layer_norm_type="rms", include_bias=False, attention_layer_norm=False,
      input_emb_norm=False, scale_logits=False, bias_for_layer_norm=False,
      layer_norm_with_affine=True, attention_dropout=0.0, residual_dropout=0.0,
      embedding_dropout=0.0, block_group_size=1, clip_qkv=None,
  )  # fmt: skip
  width, heads = f.integer("d_model"), f.integer("n_heads")
  rotates = rotation(f, width // max(heads, 1), kinds=("default",))
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
    qkv_bias=f.flag("include_qkv_bias"),
    tied=f.flag("weight_tying"),
    **rotates,
  )


def llama(
  f: Fields,
  *,
  rope_theta: float = 10_000.0,
  head_dim: int | None = None,
  **changes: Any,
) -> TransformerConfig:
  """Returns the network of configs that are written as LLaMA's.

  Args:
    f: the fields.
    rope_theta: what it is where the config does not say.
    head_dim: likewise; None for the width over the heads.
    **changes: fields of the network that are otherwise than LLaMA's.
  """
  f.only(
      hidden_act="silu", mlp_bias=False, use_sliding_window=False,
      attention_dropout=0.0, use_bias=False, clip_qkv=None,
  )  # fmt: skip
  _only_full_attention(f)
  width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
  own = width // max(heads, 1) if head_dim is None else head_dim
  head_dim = f.integer("head_dim", default=own)
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
      **rotation(f, head_dim, theta=rope_theta),
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
  layers = f.integer("num_hidden_layers")
  if kinds and len(kinds) != layers:
    raise ValueError(
      f"{f.path}: layer_types names {len(kinds)} layers, but num_hidden_layers"
      f" is {layers}; mend one of them"
    )
  if f.get("use_sliding_window") is None:  # Where it has no switch it is on.
    f.only(sliding_window=None)
  f.get("sliding_window")


def dream(f: Fields) -> TransformerConfig:
  """Returns Dream's network: Qwen 2's, which always has biases."""
  f.get("attention_bias")
  return llama(f, qkv_bias=True)


def qwen(f: Fields) -> TransformerConfig:
  """Returns Qwen 2, 2.5 and 3's network."""
  named = f"{f.get('model_type')} {f.get('architectures')}".lower()
  if "qwen2" in named and "qwen3" in named:
    raise ValueError(
      f"{f.path}: model_type and architectures name Qwen 2 and Qwen 3; mend one"
    )
  return sdar(f) if "qwen3" in named else dream(f)


def qwen_moe(f: Fields) -> TransformerConfig:
  """Returns Qwen 3's network of experts."""
  layers = f.integer("num_hidden_layers")
  step = f.integer("decoder_sparse_step", default=1)
  dense = f.get("mlp_only_layers", default=[])
  f.only(attention_bias=False)
  return llama(
    f,
    qk_norm=True,
    dense_layers=tuple(
      i for i in range(layers) if i in dense or (i + 1) % max(step, 1)
    ),
    router_normalised=f.flag("norm_topk_prob"),
    expert_dim=f.integer("moe_intermediate_size"),
    **_experts(f),
  )


def mixtral(f: Fields) -> TransformerConfig:
  """Returns Mixtral's network: every layer has experts, and nothing else."""
  f.only(router_jitter_noise=0.0, attention_bias=False)
  return llama(
    f,
    rope_theta=1e6,
    norm_eps=f.number("rms_norm_eps", 1e-5),
    router_normalised=True,
    expert_dim=f.integer("intermediate_size"),
    **_experts(f),
  )


def _experts(f: Fields) -> dict[str, Any]:
  one, other = f.get("num_experts"), f.get("num_local_experts")
  if None not in (one, other) and one != other:
    raise ValueError(
      f"{f.path}: num_experts is {one}, but num_local_experts {other}; remove"
      " the wrong one"
    )
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
  return llama(f, head_dim=128, qk_norm=True)


def dream_reasoner(f: Fields) -> TransformerConfig:
  """Returns DreamReasoner's network: Qwen 3's, by Dream's config."""
  f.only(attention_bias=False)
  return llama(f, qk_norm=True)


def wedlm(f: Fields) -> TransformerConfig:
  """Returns WeDLM's network: Qwen 2's or Qwen 3's, by two fields."""
  biases = f.flag("attention_bias")
  return llama(f, qk_norm=f.flag("qk_norm"), qkv_bias=biases)


def illada(f: Fields) -> TransformerConfig:
  """Returns iLLaDA's network: LLaMA's, seen both ways."""
  f.only(resid_pdrop=0.0, layer_norm_eps=None, rope_scaling=None)
  return meta(f)


def nemotron(f: Fields) -> TransformerConfig:
  """Returns Nemotron-Labs-Diffusion's network: Ministral 3's."""
  f.only(
      attention_bias=False, tie_word_embeddings=False,
      dlm_paradigm=("bidirectional", "block_diff", "autoregressive"),
      dlm_loss_weight=1.0, dp_varying_mask_ratio=False,
  )  # fmt: skip
  return llama(f, norm_eps=f.number("rms_norm_eps", 1e-5))


def llada_moe(f: Fields) -> TransformerConfig:
  """Returns LLaDA-MoE's network."""
  f.only(
      moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
      routed_scaling_factor=1, n_group=1, topk_group=1,
      router_num_group=(1, -2), router_topk_group=(1, -2),  # -2: not set
      attention_bias=False,
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
  capacity = f.integer("expert_capacity", default=0)
  if capacity:  # LLaDA2.2: no groups, but a choice for each block.
    f.only(n_group=1, topk_group=1)
  f.only(
      score_function="sigmoid", norm_topk_prob=True, use_rmsnorm=True,
      moe_router_enable_expert_bias=True, num_nextn_predict_layers=0,
      embedding_dropout=0.0, output_dropout=0.0, norm_head=False,
      mtp_loss_scaling_factor=0, attention_bias=False, norm_softmax=False,
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
    expert_capacity=capacity,
    expert_block=f.integer("block_size", default=32) if capacity else 1,
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
  if shape is not f:
    shape.only(type="ddit")
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
  """Whether noise replaces tokens by others, so that there is no mask.

  Raises:
    ValueError: the graph of a config is none of SEDD's.
  """
  if f.get("graph") is None:
    return False
  graph = f.section("graph")
  graph.only(type=("absorb", "uniform"))
  return graph.get("type") == "uniform"


_FULL, _SLIDING = "full_attention", "sliding_attention"


def gemma(f: Fields) -> GemmaConfig:
  """Returns DiffusionGemma's network, of either way in which its config is written.

  What differs in full layers stands beside the rest as `global_head_dim` and
  `num_global_key_value_heads`, or by layer, as transformers 5.24 has it.
  """
  f.only(tie_word_embeddings=True)
  t = f.section("text_config")
  t.only(
      attention_bias=False, attention_dropout=0.0, tie_word_embeddings=True,
      hidden_activation="gelu_pytorch_tanh",
      use_bidirectional_attention="vision",
  )  # fmt: skip
  count = t.integer("num_hidden_layers")
  kinds = t.get("layer_types", default=_every_sixth(count))
  others = sorted({str(kind) for kind in kinds} - {_FULL, _SLIDING})
  if others or len(kinds) != count:
    raise ValueError(
      f"{f.path}: layer_types must name {_FULL} or {_SLIDING} for each of {count}"
      f" layers, not {', '.join(others) or f'{len(kinds)} of them'}"
    )
  full = tuple(i for i, kind in enumerate(kinds) if kind == _FULL)
  own = _of_full_layers(t, full)
  rope = t.section("rope_parameters")
  near, far = rope.section(_SLIDING), rope.section(_FULL)
  near.only(rope_type="default", partial_rotary_factor=1.0)
  far.only(rope_type="proportional")
  return GemmaConfig(
    vocab_size=t.integer("vocab_size"),
    width=t.integer("hidden_size"),
    layers=count,
    heads=t.integer("num_attention_heads"),
    kv_heads=t.integer("num_key_value_heads"),
    head_dim=t.integer("head_dim"),
    full_layers=full,
    full_kv_heads=own.get("num_key_value_heads"),
    full_head_dim=own.get("head_dim", 512),
    window=t.integer("sliding_window"),
    mlp_dim=t.integer("intermediate_size"),
    experts=t.integer("num_experts"),
    experts_per_token=t.integer("top_k_experts"),
    expert_dim=t.integer("moe_intermediate_size"),
    norm_eps=t.number("rms_norm_eps", 1e-6),
    rope_theta=near.number("rope_theta", 1e4),
    full_rope_theta=far.number("rope_theta", 1e6),
    full_rotary_share=far.number("partial_rotary_factor", 0.25),
    softcap=t.number("final_logit_softcapping", 30.0),
  )


def _every_sixth(count: int) -> list[str]:
  full = lambda i: i % 6 == 5 or i + 1 == count
  return [_FULL if full(i) else _SLIDING for i in range(count)]


def _of_full_layers(t: Fields, full: tuple[int, ...]) -> dict[str, Any]:
  """Returns what full layers have otherwise, all of them alike.

  Raises:
    ValueError: they differ, or other layers have something of their own too.
  """
  names = {
    "global_head_dim": "head_dim",
    "num_global_key_value_heads": "num_key_value_heads",
  }
  found = {
    ours: t.integer(theirs)
    for theirs, ours in names.items()
    if t.get(theirs) is not None
  }
  layers = t.mapping("per_layer_config")
  t.get("per_layer_config")
  each = {int(i): dict(own) for i, own in layers.items()}
  first = next(iter(each.values()), {})
  alike = all(own == first for own in each.values()) and set(each) == set(full)
  if each and not (alike and set(first) <= set(names.values())):
    raise ValueError(
      f"{t.path}: per_layer_config must give all full_attention layers one"
      " head_dim and num_key_value_heads, and no other layer anything"
    )
  if any(found.get(name, value) != value for name, value in first.items()):
    raise ValueError(
      f"{t.path}: per_layer_config and global_head_dim or"
      " num_global_key_value_heads disagree; remove the wrong ones"
    )
  return found | first
