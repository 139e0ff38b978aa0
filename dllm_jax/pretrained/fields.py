"""The fields of a published `config.json`, read with their types checked.

A field that nobody reads may still change the network. So what was read is
remembered, and what is left over is an error that names it, unless it is known
not to matter. docs/pretrained.md lists all three kinds.
"""

from collections.abc import Mapping
import os
from typing import Any

# What a network's numbers cannot depend on: who wrote a file and how, what
# generation and training default to, what is told to other code.
HARMLESS = frozenset({
  "architectures", "auto_map", "model_type", "dtype", "torch_dtype",
  "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_class",
  "transformers_version", "transformers.js_config", "unsloth_fixed",
  "unsloth_version", "is_llama_config",
  "attn_implementation", "_attn_implementation", "_flash_attn_2_enabled",
  "_attn_implementation_autoset", "_attn_implementation_internal",
  "_experts_implementation", "experts_implementation", "flash_attention",
  "attn_backend", "precision",
  "use_cache", "use_bfloat16", "torchscript", "gradient_checkpointing",
  "pretraining_tp", "tf_legacy_loss", "return_dict", "is_decoder",
  "output_attentions", "output_hidden_states", "output_router_logits",
  "initializer_range", "init_device", "init_fn", "init_std",
  "init_cutoff_factor", "initializer_cutoff_factor",
  "id2label", "label2id", "num_labels", "problem_type", "finetuning_task",
  "prefix", "task_specific_params", "chunk_size_feed_forward",
  "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p",
  "typical_p", "repetition_penalty", "length_penalty", "num_beams",
  "num_beam_groups", "num_return_sequences", "diversity_penalty",
  "early_stopping", "max_new_tokens", "output_scores",
  "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
  "return_dict_in_generate", "remove_invalid_values",
  "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
  "sep_token_id", "cls_token_id", "mask_token_id", "mask_index",
  "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
  "max_window_layers", "max_position_embeddings", "max_sequence_length",
  "model_max_length",
})  # fmt: skip
# What other networks are made of; with these values it is not there.
NEUTRAL: Mapping[str, Any] = {
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "tie_encoder_decoder": False,
  "is_causal": True,
  "use_bidirectional_attention": False,
  "use_mrope": False,
  "rope_interleaved": False,
  "activation": ("silu", "swiglu"),
}


class Fields:
  """The fields of a `config.json`, read with their types checked.

  Attributes:
    values: the fields.
    path: the file, for messages.
  """

  def __init__(self, values: Mapping[str, Any], path: str | os.PathLike):
    """Wraps the fields of a file."""
    self.values = dict(values)
    self.path = path
    self._read: set[str] = set()
    self._sections: dict[str, Fields] = {}

  def get(self, *names: str, default: Any = None) -> Any:
    """Returns the first field that is there and not null."""
    self._read.update(names)
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

  def number(self, name: str, default: float | None = None) -> float:
    """Returns a number.

    Raises:
      ValueError: it is missing without a default, or something else.
    """
    value = self.get(name, default=default)
    if value is None:
      raise ValueError(f"{self.path} lacks the field {name}")
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{self.path}: {name} must be a number, not {value!r}")
    return float(value)

  def flag(self, name: str, default: bool = False) -> bool:
    """Returns a truth value."""
    return bool(self.get(name, default=default))

  def mapping(self, name: str) -> Mapping[str, Any]:
    """Returns a nested object as it is; empty where there is none.

    Raises:
      ValueError: it is something else.
    """
    value = self.get(name, default={})
    if not isinstance(value, Mapping):
      raise ValueError(f"{self.path} lacks the section {name}")
    return value

  def section(self, name: str) -> "Fields":
    """Returns the fields of a nested object, always the same ones."""
    value = self.mapping(name)
    return self._sections.setdefault(name, Fields(value, self.path))

  def no_others(self, *harmless: str, what: str) -> None:
    """Checks that every field was read, or cannot matter; so in sections.

    One that is null or empty asks for nothing.

    Args:
      *harmless: further names that do not matter here.
      what: whose fields they are, for the message.

    Raises:
      ValueError: one may change the network, and is not understood.
    """
    self.only(**{k: v for k, v in NEUTRAL.items() if k not in self._read})
    known = self._read | HARMLESS | set(harmless)
    for name, value in self.values.items():
      if name not in known and value not in (None, "", [], {}):
        raise ValueError(
          f"{self.path}: the field {name}={str(value)[:60]} is not understood by"
          f" {what}: it may change the network; if it does not, remove it"
        )
    for section in self._sections.values():
      section.no_others(*harmless, what=what)

  def only(self, **legal: Any) -> None:
    """Checks that fields, where given, have values that we can run.

    Raises:
      ValueError: one has not.
    """
    for name, value in legal.items():
      values = value if isinstance(value, tuple) else (value,)
      found = self.get(name)
      if found is not None and found not in values:
        raise ValueError(
          f"{self.path}: {name}={found!r} is not supported; legal:"
          f" {', '.join(map(repr, values))}"
        )
