"""Text in, batches out: sources, tokenizers, packing, and their order.

`load(Dataset(path=...))` opens a corpus, `train_iterator` and `held_out_batches`
cut it into `core.Batch` rows, `prepare` tokenises one once (`merge` makes what
several machines prepared one), `make_tokenizer` and `tokenizer_from_json` make
tokenizers, `load_examples` and `load_preferences` conversations as tokens.
Tokenising processes import this room: it starts without jax and grain.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "batches": [
      "blank",
      "held_out_batches",
      "HeldOutBatches",
    ],
    "corpus": ["Corpus", "load"],
    "conversations": [
      "Example",
      "Examples",
      "load_examples",
      "load_preferences",
      "Pair",
      "Preferences",
    ],
    "dataset": ["Dataset"],
    "order": ["BatchIterator", "merge_states", "train_iterator"],
    "packing": ["TextSize"],
    "record": ["merge", "prepare"],
    "tokenizer": [
      "Bytes",
      "Characters",
      "HuggingFace",
      "make_tokenizer",
      "Tokenizer",
      "tokenizer_from_json",
    ],
  },
)
