"""Text in, batches out: sources, tokenizers, packing, and their order.

Names are imported when they are used, so that tokenising processes, which
import this package, start without jax and grain.
"""

import importlib

_HOMES = {
  "answers": ("answer_batch",),
  "batches": (
    "BatchIterator",
    "HeldOutBatches",
    "blank",
    "held_out_batches",
    "merge_states",
    "train_iterator",
  ),
  "corpus": ("Corpus", "Dataset", "load"),
  "packing": ("TextSize",),
  "record": ("prepare",),
  "tokenizer": (
    "Bytes",
    "Characters",
    "HuggingFace",
    "Tokenizer",
    "make_tokenizer",
    "tokenizer_from_json",
  ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
