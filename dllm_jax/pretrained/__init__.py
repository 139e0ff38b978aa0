"""Published weights in and out.

`load_pretrained(folder)` tells the family from the folder and returns network,
parameters and tokenizer, checked tensor by tensor; `save_pretrained` writes one.
`FAMILIES` are the layouts; `Table` says how names and axes of tensors map.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "convert": ["Converted", "Source", "to_ours", "to_theirs"],
    "families": ["FAMILIES", "Family", "Ids"],
    "load": ["load_pretrained", "Pretrained", "save_pretrained"],
    "names": ["DIT"],
    "table": ["Name", "parameters", "Table"],
  },
)
