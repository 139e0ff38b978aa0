"""Pictures: as pixels, as image tokens, and in rows beside their texts.

`decoded` makes pixels of a file's bytes, `fitted` a square of a picture,
`Sequences` MMaDA's rows of ids; `records` reads pairs and conversations from
JSONL, Parquet, WebDataset's tar shards and IDX. `ImageTokenizer` is what turns
pixels into codes and back.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "pictures": ["decoded", "fitted", "pixels_of"],
    "protocol": ["ImageTokenizer"],
    "records": ["Record"],
    "rows": ["load_images", "load_pixels"],
    "sequences": ["Sequence", "Sequences"],
    "texts": ["CHAT", "joined"],
  },
)
