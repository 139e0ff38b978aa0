"""Conversations and preferences, as they are published, as rows to tune on.

    records -> forms -> messages -> supervision -> examples -> rows
    dict       which    roles,      text and what  tokens and  fill,
               form     contents    of it counts   what counts packing

`load_examples` and `load_preferences` give tokens with what counts of them; rows
for training come from `data.load`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "examples": ["Example", "Examples", "load_examples"],
    "forms": ["check_text", "Comparison", "Conversation", "Form", "recognise"],
    "preferences": ["load_preferences", "Pair", "Preferences"],
    "report": ["Report"],
    "rows": ["ConversationRows", "load_rows"],
    "supervision": ["templated"],
  },
)
