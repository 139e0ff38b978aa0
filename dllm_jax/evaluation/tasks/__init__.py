"""The tasks of `dllm evaluate`, one a file that holds `TASK`.

`task(name)` finds one, here or by an entry point of the group `dllm_jax.tasks`; a
`Task` says what it does with a `Setting`, and `Ledger` keeps partial results.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "partial_results": ["Ledger"],
    "registry": ["option", "Setting", "task", "Task", "tasks"],
  },
)
