"""Mathematics, code, puzzles and facts: how they are asked and marked.

`gsm8k`, `humaneval` and `mbpp` read published problems, `sudoku` and `countdown`
make puzzles, `Facts` holds facts with questions in both directions; `sandbox` runs
programs that a model wrote, contained.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "facts": ["Facts", "Question"],
    "math_and_code": ["Code", "gsm8k", "GSM8K", "humaneval", "mbpp"],
    "puzzles": ["countdown", "Countdown", "sudoku", "Sudoku"],
    "sandbox": ["Limits", "Verdict"],
  },
)
