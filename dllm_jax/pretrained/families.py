"""The registry of published families: from a `config.json` to our objects.

A family is found by `model_type`, then by `architectures`, then by its shape.
What it says is data: a name table, and functions from the fields of the config
to a network's config and an objective. Nothing in the folder is ever imported.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
from typing import Any, NamedTuple

from dllm_jax.core.schedule import Geometric, LogLinear
from dllm_jax.core.types import Objective
from dllm_jax.models import DiTConfig, TransformerConfig
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.pretrained import names
from dllm_jax.pretrained.table import Table


class Fields:
  """The fields of a `config.json`, read with their types checked.

  Attributes:
    values: the fields.
    path: the file, for messages.
  """

  def __init__(self, values: Mapping[str, Any], path: pathlib.Path | str):
    """Wraps the fields of a file."""
    self.values = dict(values)
    self.path = path

  def get(self, *names: str, default: Any = None) -> Any:
    """Returns the first field that is there and not null."""
    for name in names:
      if self.values.get(name) is not None:
        return self.values[name]
    return default

  def integer(self, *names: str, default: int | None = None) -> int:
    """Returns a whole number.

    Raises:
      ValueError: it is missing without a default, or something else.
    """
    value = self.get(*names, default=default)
    if value is None:
      raise ValueError(f"{self.path} lacks the field {names[0]}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise ValueError(
          f"{self.path}: {names[0]} must be a whole number, not {value!r}"
      )
    return value

  def number(self, name: str, default: float) -> float:
    """Returns a number."""
    value = self.get(name, default=default)
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{self.path}: {name} must be a number, not {value!r}")
    return float(value)

  def flag(self, name: str, default: bool = False) -> bool:
    """Returns a truth value."""
    return bool(self.get(name, default=default))

  def section(self, name: str) -> "Fields":
    """Returns the fields of a nested object."""
    value = self.values.get(name)
    if not isinstance(value, Mapping):
      raise ValueError(f"{self.path} lacks the section {name}")
    return Fields(value, self.path)

  def only(self, **legal: Any) -> None:
    """Checks that fields, where given, have values that we can run.

    Raises:
      ValueError: one has not.
    """
    for name, value in legal.items():
      values = value if isinstance(value, tuple) else (value,)
      found = self.values.get(name)
      if found is not None and found not in values:
        raise ValueError(
            f"{self.path}: {name}={found!r} is not supported; legal:"
            f" {', '.join(map(repr, values))}"
        )


class Ids(NamedTuple):
  """Special tokens.

  Attributes:
    mask: the mask, or None for a family without one.
    end: what ends a text, or None.
    pad: padding, or None.
    begin: what begins a text, or None.
  """

  mask: int | None
  end: int | None = None
  pad: int | None = None
  begin: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """What is known of one published family.

  Attributes:
    name: what it is called.
    table: its name table.
    model_types: `model_type`s of its configs.
    architectures: `architectures` of its configs.
    network: the network's config.
    objective: the objective's class.
    settings: its fields.
    sampler: the preset that samples as published.
    ids: the published special tokens.
    counts_padding: whether hidden slots take positions, as in LLaDA; else
      positions count visible ones, from 0, and hidden ones have 1 (Dream).
    matches: recognises configs without a `model_type`.
    output: `(objective, logits, tokens, t)` to what the original returns, where
      that is not its logits.
    adopts: whether a mask is added to start diffusion from its weights.
  """

  name: str
  table: Table
  model_types: tuple[str, ...]
  architectures: tuple[str, ...] = ()
  network: Callable[[Fields], Any]
  objective: type
  settings: Callable[[Fields], dict[str, Any]] = lambda fields: {}
  sampler: str
  ids: Ids = Ids(None)
  counts_padding: bool = True
  matches: Callable[[Fields], bool] = lambda fields: False
  output: Callable[..., Any] | None = None
  adopts: bool = False


# ------------------------------------------------------------------- networks


def _llada_network(f: Fields) -> TransformerConfig:
  f.only(
      activation_type="silu", alibi=False, rope=True, block_type="llama",
      layer_norm_type="rms", include_bias=False, attention_layer_norm=False,
      input_emb_norm=False, scale_logits=False,
  )  # fmt: skip
  width, heads = f.integer("d_model"), f.integer("n_heads")
  kv_heads = 1 if f.flag("multi_query_attention") else heads
  return TransformerConfig(
      vocab_size=f.integer("embedding_size", "vocab_size"),
      width=width,
      layers=f.integer("n_layers"),
      heads=heads,
      kv_heads=f.integer("n_kv_heads", default=kv_heads),
      mlp_dim=f.integer("mlp_hidden_size", default=4 * width),
      norm_eps=f.number("rms_norm_eps", 1e-5),
      rope_theta=f.number("rope_theta", 10_000.0),
      qkv_bias=f.flag("include_qkv_bias"),
      tied=f.flag("weight_tying"),
  )


def _llama_network(f: Fields, **changes: Any) -> TransformerConfig:
  """Returns the network of configs that are written as LLaMA's."""
  f.only(
      hidden_act="silu", mlp_bias=False, use_sliding_window=False,
      attention_dropout=0.0, use_bias=False,
  )  # fmt: skip
  scaling = f.get("rope_scaling", default={})
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind != "default":
    raise ValueError(
        f"{f.path}: rope_scaling of type {kind!r} is not supported; legal:"
        " null, 'default'"
    )
  width, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
  head_dim = f.integer("head_dim", default=width // max(heads, 1))
  share = f.number("partial_rotary_factor", 1.0)
  return TransformerConfig(**{
      "vocab_size": f.integer("vocab_size"),
      "width": width,
      "layers": f.integer("num_hidden_layers"),
      "heads": heads,
      "kv_heads": f.integer("num_key_value_heads", default=heads),
      "head_dim": head_dim,
      "rotary_dim": int(head_dim * share),
      "mlp_dim": f.get("intermediate_size"),
      "norm_eps": f.number("rms_norm_eps", 1e-6),
      "rope_theta": f.number("rope_theta", 10_000.0),
      "tied": f.flag("tie_word_embeddings"),
  } | changes)


def _qwen_network(f: Fields) -> TransformerConfig:
  third = f.get("model_type") == "qwen3"
  bias = f.flag("attention_bias", default=not third)
  return _llama_network(f, qk_norm=third, qkv_bias=bias)


def _sdar_network(f: Fields) -> TransformerConfig:
  f.only(attention_bias=False)
  return _llama_network(f, qk_norm=True)


def _llada_moe_network(f: Fields) -> TransformerConfig:
  f.only(
      moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
      routed_scaling_factor=1, n_group=1, topk_group=1,
  )  # fmt: skip
  layers = f.integer("num_hidden_layers")
  kinds = f.get("moe_layer_freq", default=[1] * layers)
  if not isinstance(kinds, list) or len(kinds) != layers:
    raise ValueError(
        f"{f.path}: moe_layer_freq must name 0 or 1 for each of {layers} layers"
    )
  return _llama_network(
      f,
      norm_eps=f.number("rms_norm_eps", 1e-5),
      qk_norm=f.flag("qk_layernorm", default=True),
      qkv_bias=f.flag("attention_bias"),
      mlp_dim=f.integer("dense_intermediate_size", "intermediate_size"),
      dense_layers=tuple(i for i, kind in enumerate(kinds) if not kind),
      experts=f.integer("num_experts"),
      experts_per_token=f.integer("num_experts_per_tok"),
      expert_dim=f.integer("expert_intermediate_size"),
      shared_dim=f.integer("shared_expert_intermediate_size", default=0),
      # Deviates: the original ignores norm_topk_prob, and so must we.
      router_normalised=False,
      balance_weight=f.number("router_aux_loss_coef", 0.01),
  )


def _llada2_network(f: Fields) -> TransformerConfig:
  f.only(score_function="sigmoid", norm_topk_prob=True)
  expert_dim = f.integer("moe_intermediate_size")
  return _llama_network(
      f,
      qk_norm=f.flag("use_qk_norm", default=True),
      qkv_bias=f.flag("use_qkv_bias"),
      dense_layers=tuple(range(f.integer("first_k_dense_replace", default=0))),
      experts=f.integer("num_experts"),
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


def _dit_network(f: Fields) -> DiTConfig:
  """Returns the DiT of an exported config, flat, or of a training config."""
  vocab = f.get("vocab_size", "dim")
  if vocab is None:
    vocab = f.integer("tokens") + (not _uniform(f))
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


# ----------------------------------------------------------------- objectives


def _uniform(f: Fields) -> bool:
  graph = f.get("graph", default={})
  return isinstance(graph, Mapping) and graph.get("type") == "uniform"


def _sedd_settings(f: Fields) -> dict[str, Any]:
  noise = f.section("noise")
  noise.only(type=("loglinear", "geometric"))
  schedule = LogLinear()
  if noise.get("type") == "geometric":
    schedule = Geometric(
        sigma_min=noise.number("sigma_min", 1e-4),
        sigma_max=noise.number("sigma_max", 20.0),
    )
  uniform = _uniform(f)
  return {
      "schedule": schedule,
      "graph": "uniform" if uniform else "absorbing",
      "scale_by_sigma": f.section("model").flag("scale_by_sigma", not uniform),
  }


def _time(f: Fields) -> dict[str, Any]:
  return {"time_conditioning": f.flag("time_conditioning")}


def _blocks(default: int) -> Callable[[Fields], dict[str, Any]]:
  return lambda f: {"block_size": f.integer("block_size", default=default)}


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
        network=_llada_network,
        objective=LLaDA,
        sampler="llada",
        ids=Ids(mask=126336, end=126081, pad=126081),
    ),
    Family(
        name="dream",
        table=names.DREAM,
        model_types=("dream",),
        architectures=("DreamModel",),
        network=lambda f: _llama_network(f, qkv_bias=True),
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
        network=_sdar_network,
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
        network=_llada_moe_network,
        objective=LLaDA,
        sampler="llada",
        ids=Ids(mask=156895, end=156892, pad=156892),
    ),
    Family(
        name="llada2_moe",
        table=names.LLADA2_MOE,
        model_types=("llada2_moe",),
        architectures=("LLaDA2MoeModelLM",),
        network=_llada2_network,
        objective=BD3LM,
        settings=_blocks(32),
        sampler="llada2",
        ids=Ids(mask=156895, end=156892, pad=156892),
    ),
    Family(
        name="qwen",
        table=names.QWEN,
        model_types=("qwen2", "qwen3"),
        architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        network=_qwen_network,
        objective=Autoregressive,
        sampler="autoregressive",
        adopts=True,
    ),
    Family(
        name="llama",
        table=names.LLAMA,
        model_types=("llama",),
        architectures=("LlamaForCausalLM",),
        network=lambda f: _llama_network(
            f, qkv_bias=f.flag("attention_bias")
        ),
        objective=Autoregressive,
        sampler="autoregressive",
        adopts=True,
    ),
    Family(
        name="bd3lm",
        table=names.DIT,
        model_types=("bd3lm",),
        architectures=("BD3LM",),
        network=_dit_network,
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
        network=_dit_network,
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
        network=_dit_network,
        objective=SEDD,
        settings=_sedd_settings,
        sampler="sedd",
        matches=lambda f: "graph" in f.values and "tokens" in f.values,
        output=lambda objective, logits, z, t: objective.log_score(
            logits, z, t
        ),
    ),
)


def find(fields: Fields) -> Family:
  """Returns the family of a config.

  Raises:
    ValueError: it is none that is known.
  """
  kind = fields.get("model_type")
  classes = fields.get("architectures", default=[])
  classes = classes if isinstance(classes, list) else [classes]
  tests = (
      lambda one: isinstance(kind, str) and kind.lower() in one.model_types,
      lambda one: any(name in one.architectures for name in classes),
      lambda one: kind is None and one.matches(fields),
  )
  for test in tests:
    for family in FAMILIES:
      if test(family):
        return _adopted(family, fields)
  known = ", ".join(t for family in FAMILIES for t in family.model_types)
  raise ValueError(
      f"{fields.path}: model_type {kind!r} with architectures {classes} is"
      f" unknown; known model_types: {known}"
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
    KeyError: there is none.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  known = ", ".join(family.name for family in FAMILIES)
  raise KeyError(f"unknown family {name!r}; legal: {known}")


def ids(family: Family, fields: Fields, vocab_size: int, hint: Ids) -> Ids:
  """Returns the special tokens: the config's, the tokenizer's, the published.

  Families without a mask among their tokens have the last id for one, and so
  have folders in which nothing names a mask that fits.

  Args:
    family: the family.
    fields: the config.
    vocab_size: the network's tokens.
    hint: what the tokenizer says.

  Raises:
    ValueError: the config's mask is not in the vocabulary.
  """

  def pick(role: str, stated: tuple[str, ...]) -> int | None:
    value = fields.get(*stated)
    if role == "begin" and hint.begin is not None:
      return hint.begin  # Dream's config names another than its tokenizer.
    value = value[0] if isinstance(value, list) and value else value
    if value is not None:
      return value
    published = getattr(family.ids, role)
    for one in (getattr(hint, role), published):
      if one is not None and one < vocab_size:
        return one
    return None

  mask = pick("mask", ("mask_token_id", "mask_index"))
  if _uniform(fields):  # no mask among the tokens: the id after the last
    return Ids(vocab_size)
  if mask is None:
    mask = vocab_size - 1
  if not isinstance(mask, int) or not 0 <= mask < vocab_size:
    raise ValueError(
        f"{fields.path}: the vocabulary of {vocab_size} tokens is smaller than"
        f" the mask id {mask}; mend vocab_size or mask_token_id"
    )
  return Ids(
      mask,
      pick("end", ("eos_token_id",)),
      pick("pad", ("pad_token_id",)),
      pick("begin", ("bos_token_id",)),
  )


def objective(
    family: Family, fields: Fields, vocab_size: int, special: Ids
) -> Objective:
  """Returns the objective that a family was trained with."""
  settings = family.settings(fields)
  row = length(fields)
  block = settings.get("block_size", 1)
  if _uniform(fields):  # noise that has no mask: every token is a real one
    return family.objective(vocab_size=vocab_size, mask_id=None, **settings)
  space = TokenSpace(
      vocab_size=vocab_size,
      mask_id=special.mask,
      bos_id=special.begin,
      eos_id=special.end,
      length=max(row // block, 1) * block,
  )
  return family.objective.over(space, **settings)


def length(fields: Fields) -> int:
  """Returns the tokens of a row that the family was trained on."""
  inner = fields.get("model", default={})
  nested = inner.get("length") if isinstance(inner, Mapping) else None
  found = fields.get(
      "max_sequence_length", "max_position_embeddings", "model_length", "length"
  )
  return found or nested or 1024
