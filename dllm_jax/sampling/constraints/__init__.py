"""Languages that a text has to be in: automata over tokens.

`choices([...])`, `regex(...)`, `json_schema(...)` and `json_object()` make a
`Language`; `automaton_of(language, tokenizer)` the arrays that the sampling program
follows. Whatever order a policy reveals slots in, what is committed can always be
completed to a text of the language (`paths`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "arrays": ["Followed", "placed", "Room"],
    "automaton": ["Automaton", "automaton_of"],
    "language": [
      "choices",
      "json_object",
      "json_schema",
      "Language",
      "regex",
    ],
  },
)
