"""From our objects to a published `config.json`: `networks`, backwards.

What a family's layout cannot say would be lost, so that every config made here
is read again and compared: a network goes out as what it will come in as.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from dllm_jax.core.schedule import Geometric
from dllm_jax.core.types import Objective
from dllm_jax.models import DiTConfig, GemmaConfig, rotary, TransformerConfig
from dllm_jax.pretrained import families
from dllm_jax.pretrained.families import Family, Fields, Ids
from dllm_jax.pretrained.family import DIFFUSION
from dllm_jax.pretrained.layouts import gemma

_PATH = "the config.json to be written"
# What a network's numbers do not depend on.
_ARITHMETIC = {
  "attention", "dropout", "dtype", "embedding_std", "experts_implementation",
  "adapter", "param_dtype", "remat", "unroll", "vocab_multiple",
  "balance_weight", "cond_dim",
}  # fmt: skip
_ROUTED = (
  "llada_moe", "llada2_moe", "llada22", "qwen_moe", "mixtral", "sdar_moe",
)  # fmt: skip
_LENGTHS = {
  "llada": "max_sequence_length",
  "mmada": "max_sequence_length",
  "mdlm": "model_length",
  "bd3lm": "model_length",
}
PREFIXES = {"mdlm": "backbone.", "bd3lm": "backbone."}
"""What the published names of a family begin with, where it is something."""


def _llada(c: TransformerConfig) -> dict[str, Any]:
  return {
    "d_model": c.width,
    "n_layers": c.layers,
    "n_heads": c.heads,
    "n_kv_heads": c.kv_heads,
    "mlp_hidden_size": c.mlp_dim,
    "embedding_size": c.vocab_size,
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "include_qkv_bias": c.qkv_bias,
    "weight_tying": c.tied,
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
  }


def _llama(c: TransformerConfig) -> dict[str, Any]:
  return {
    "hidden_act": "silu",
    "hidden_size": c.width,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "intermediate_size": c.mlp_dim,
    "rms_norm_eps": c.norm_eps,
    "rope_theta": c.rope_theta,
    "rope_scaling": _scaling(c.rope_scaling),
    "tie_word_embeddings": c.tied,
  }  # Layouts with a field for biases mean four of them, which no network has.


def _scaling(scaling: Any) -> dict[str, Any] | None:
  first = "original_max_position_embeddings"
  match scaling:
    case rotary.Linear():
      return {"rope_type": "linear", "factor": scaling.factor}
    case rotary.Llama3():
      return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        first: scaling.first_length,
      }
    case rotary.Yarn():
      return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "beta_slow": scaling.low,
        "beta_fast": scaling.high,
        "truncate": scaling.whole,
        "attention_factor": scaling.scale,
        "llama_4_scaling_beta": scaling.query_growth or None,
        first: scaling.first_length,
      }
  return None


def _llada_moe(c: TransformerConfig) -> dict[str, Any]:
  routed = [int(i not in c.dense_layers) for i in range(c.layers)]
  return _llama(c) | {
    "qk_layernorm": c.qk_norm,
    "dense_intermediate_size": c.mlp_dim,
    "expert_intermediate_size": c.expert_dim,
    "shared_expert_intermediate_size": c.shared_dim or None,
    "moe_layer_freq": routed,
    "num_experts": c.experts,
    "num_experts_per_tok": c.experts_per_token,
    "router_aux_loss_coef": c.balance_weight,
  }


def _qwen_moe(c: TransformerConfig) -> dict[str, Any]:
  return _llama(c) | {
    "num_experts": c.experts,
    "num_experts_per_tok": c.experts_per_token,
    "moe_intermediate_size": c.expert_dim,
    "mlp_only_layers": list(c.dense_layers),
    "norm_topk_prob": c.router_normalised,
    "router_aux_loss_coef": c.balance_weight,
  }


def _mixtral(c: TransformerConfig) -> dict[str, Any]:
  return _llama(c) | {
    "intermediate_size": c.expert_dim,
    "num_local_experts": c.experts,
    "num_experts_per_tok": c.experts_per_token,
    "router_aux_loss_coef": c.balance_weight,
  }


def _llada2(c: TransformerConfig) -> dict[str, Any]:
  return _llama(c) | {
    "use_qk_norm": c.qk_norm,
    "use_qkv_bias": c.qkv_bias,
    "partial_rotary_factor": c.rotary_dim / c.head_dim,
    "first_k_dense_replace": len(c.dense_layers),
    "moe_intermediate_size": c.expert_dim,
    "num_experts": c.experts,
    "num_experts_per_tok": c.experts_per_token,
    "num_shared_experts": c.shared_dim // c.expert_dim,
    "n_group": c.router_groups,
    "topk_group": c.router_top_groups,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "routed_scaling_factor": c.router_scale,
  }


def _llada22(c: TransformerConfig) -> dict[str, Any]:
  return _llada2(c) | {"expert_capacity": c.expert_capacity}


def _wedlm(c: TransformerConfig) -> dict[str, Any]:
  return _llama(c) | {"qk_norm": c.qk_norm, "attention_bias": c.qkv_bias}


def _dit(c: DiTConfig) -> dict[str, Any]:
  return {
    "hidden_dim": c.width,
    "n_blocks": c.layers,
    "n_heads": c.heads,
    "cond_dim": c.cond_dim,
    "dropout": c.dropout,
    "adaln": c.adaptive,
    "tie_word_embeddings": c.tied,
  }


def _sedd(c: DiTConfig, objective: Any, length: int) -> dict[str, Any]:
  uniform = objective.graph == "uniform"
  noise = {"type": "loglinear"}
  if isinstance(objective.schedule, Geometric):
    noise = {
      "type": "geometric",
      "sigma_min": objective.schedule.sigma_min,
      "sigma_max": objective.schedule.sigma_max,
    }
  shape = _dit(c)
  return {
    "tokens": c.vocab_size - (not uniform),
    "graph": {"type": "uniform" if uniform else "absorb"},
    "noise": noise,
    "model": shape
    | {
      "hidden_size": shape.pop("hidden_dim"),
      "length": length,
      "scale_by_sigma": objective.scale_by_sigma,
    },
  }


_SHAPES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
  "llada": _llada,
  "mmada": _llada,
  "dream": _llama,
  "dream_reasoner": _llama,
  "fast_dllm_v2": _llama,
  "idlm": _llama,
  "illada": _llama,
  "nemotron": _llama,
  "sdar_moe": _qwen_moe,
  "stable_diffcoder": _llama,
  "wedlm": _wedlm,
  "llada22": _llada22,
  "sdar": _llama,
  "llada_moe": _llada_moe,
  "llada2_moe": _llada2,
  "qwen": _llama,
  "qwen_moe": _qwen_moe,
  "mixtral": _mixtral,
  "llama": _llama,
  "mdlm": _dit,
  "bd3lm": _dit,
  "diffusion_gemma": gemma.described,
}
_NETWORKS = {"DiT": DiTConfig, "DiffusionGemma": GemmaConfig}


def describe(
  objective: Objective,
  network: Any,
  special: Ids,
  *,
  length: int,
  name: str | None = None,
) -> tuple[Family, dict[str, Any]]:
  """Returns the family of a model of ours, and a `config.json` for it.

  Args:
    objective: how it was trained.
    network: the network's config.
    special: its special tokens.
    length: tokens of a row.
    name: the family; None for the first with this objective whose layout holds
      the network.

  Raises:
    ValueError: there is no such family, or its layout cannot hold the network.
  """
  if name is not None:
    family = families.by_name(name)
    return family, _config(family, objective, network, special, length)
  reasons = []
  for family in families.FAMILIES:
    if family.objective is type(objective):
      try:
        config = _config(family, objective, network, special, length)
      except ValueError as error:
        reasons.append(str(error))
      else:
        return family, config
  kind = type(objective).__name__
  raise ValueError(
    f"no published layout is known to hold {kind} on this network"
    + "".join(f"; {reason}" for reason in reasons)
    + f"; name one that does by --as: {', '.join(_names())}"
  )


def retrained(
  family: Family, fields: Fields, objective: Objective
) -> dict[str, Any]:
  """Returns a published config with the settings of an objective.

  Raises:
    ValueError: the config has no place for one that is another now.
  """
  values = dict(fields.values)
  settings = family.settings(fields)
  if type(objective) is not family.objective:
    return values
  now = {key: getattr(objective, key) for key in settings}
  changed = {key: now[key] for key in now if now[key] != settings[key]}
  values |= family.said(changed)
  read = family.settings(Fields(values, fields.path))
  for key, value in now.items():
    if read[key] != value:
      raise ValueError(
        f"{fields.path} says {key} {read[key]}, but the run was trained with "
        f"{value}, for which it has no place: export a run with objective.{key} "
        "as it was"
      )
  return values


def _names() -> list[str]:
  return [family.name for family in families.FAMILIES]


def _config(family, objective, network, special, length) -> dict[str, Any]:
  """Returns a config that is read as this network, or says what is lost."""
  kind = _NETWORKS.get(family.table.family, TransformerConfig)
  if not isinstance(network, kind):
    name = kind.__name__.removesuffix("Config").lower()
    raise ValueError(
      f"the layout of {family.name} holds a {name}, which this network is not"
    )
  if family.name in _ROUTED and not network.experts:
    raise ValueError(f"the layout of {family.name} has experts")
  if objective.shift != family.shift:
    raise ValueError(
      f"outputs of {family.name} predict the token {family.shift}"
      f" slots on, those of this model {objective.shift}"
    )
  same = type(objective) is family.objective
  if family.name == "sedd":
    if not same:
      raise ValueError("the layout of sedd holds SEDD's objective alone")
    fields = _sedd(network, objective, length)
  else:
    block = objective.block_length or 1
    fields = _kind(family, network, block) | _SHAPES[family.name](network)
    network_fields = fields.get("text_config", fields)
    network_fields["vocab_size"] = network.vocab_size
    longest = _LENGTHS.get(family.name, "max_position_embeddings")
    network_fields[longest] = length
    if same:
      settings = family.settings(Fields(fields, _PATH))
      fields |= family.said({key: getattr(objective, key) for key in settings})
    images = getattr(objective, "images", None)
    if family.codes is not None and images is not None:
      fields["codebook_size"] = images.codes
      fields["num_vq_tokens"] = images.tokens
  fields |= {
    "mask_token_id": special.mask if family.masked else None,
    "eos_token_id": special.end,
    "pad_token_id": special.pad,
    "bos_token_id": special.begin,
  }
  fields = {key: value for key, value in fields.items() if value is not None}
  _check_same(family, Fields(fields, _PATH), objective, network)
  return fields


_MODEL_TYPES = {
  "dream": "Dream",
  "dream_reasoner": "Dream",
  "fast_dllm_v2": "Fast_dLLM_Qwen",
}


def _kind(family: Family, network: Any, block: int) -> dict[str, Any]:
  """Returns what the family is found by."""
  if family.name == "qwen" and network.qk_norm:
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
  # The original writes it so.
  named = _MODEL_TYPES.get(family.name, family.model_types[0])
  kind = {"model_type": named, "architectures": [family.architectures[0]]}
  # Of two that share both names.
  if family.name == "idlm" or (family.name == "sdar" and block < 4):
    kind[DIFFUSION] = family.name
  return kind


def _check_same(family, fields, objective, network) -> None:
  """Raises ValueError unless a config says what the objects say."""
  try:
    found = families.find(fields).name
    if found != family.name:
      raise ValueError(f"it would be taken for {found}'s")
    read = family.network(fields)
    settings = {**family.fixed, **family.settings(fields)}
    families.check_fields(family, fields)
  except (TypeError, ZeroDivisionError) as error:
    raise ValueError(f"the layout of {family.name}: {error}") from error
  pairs = {
    field.name: (getattr(network, field.name), getattr(read, field.name))
    for field in dataclasses.fields(network)
    if field.name not in _ARITHMETIC
  }
  if type(objective) is family.objective:
    pairs |= {
      key: (getattr(objective, key), value) for key, value in settings.items()
    }
  for key, (ours, theirs) in pairs.items():
    if ours != theirs and not (
      isinstance(ours, float) and np.isclose(ours, theirs)
    ):
      raise ValueError(
        f"the layout of {family.name} has {key} {theirs}, not {ours}"
      )
