"""A working directory and what it can do; published folders in and out.

`Run.create(config, workdir)` begins one, `Run.open(workdir)` goes on; then
`train`, `evaluate`, `sample`. `begin` makes one of another's parameters,
`import_folder` of a published folder; `export_run` is the way out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "begin": ["begin"],
    "exchange": ["export_run", "import_folder"],
    "run": ["Run"],
  },
)
