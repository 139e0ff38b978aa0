"""Runs that begin with another run's parameters.

The new working directory is an ordinary run at step 0, as an import is:
sampling, evaluating, converting and resuming it need nothing else. What trains
it is written beside its configuration, in `method.json`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from typing import Any

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.models import merge_adapters
from dllm_jax.parallel import check_batches, distributed
from dllm_jax.run import workdir as workdirs
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import Checkpoints

_METHOD = "method.json"


def begin(
  source: Run,
  output: str | os.PathLike,
  resolved: ConfigDict,
  method: Any = None,
  grown: Callable[[PyTree], PyTree] | None = None,
) -> Run:
  """Returns a run whose step 0 are the newest parameters of another.

  The averaged ones where there are any, adapters multiplied out. A directory
  that was begun before goes on from its newest checkpoint.

  Args:
    source: the run to begin with.
    output: the directory of the new one; made if missing.
    resolved: its configuration.
    method: what trains it, a frozen dataclass of numbers and words that is
      called as its class, in small letters; None: its own objective.
    grown: of the network's parameters those of the process that the method
      trains beside them; None for the source's.

  Raises:
    ValueError: the directory holds something else, or was begun with another
      method, source or configuration; or the network is not the source's.
    FileNotFoundError: the source has no checkpoint.
  """
  output = paths.place(output)
  devices = list(source.mesh.devices.flat)
  run = Run(output, resolved, source.tokenizer, devices=devices)
  training = run.config.training
  check_batches(
    run.mesh,
    {
      "training.batch_size / training.microbatches": training.batch_size
      // training.microbatches
    },
    run.config.data.length,
  )
  record = _record(source, method)
  begun = (output / "config.json").exists()
  with distributed.together():
    if begun:
      _check_same(output, record)
      workdirs.check_same(output, resolved)
    elif not (output / _METHOD).exists():  # else cut off while it was made
      workdirs.check_empty(output)
  if not begun:
    _write(source, run, record, grown)
  with distributed.together():
    if jax.process_index() == 0:  # last: nothing is a run before this
      workdirs.begin(output, resolved, source.tokenizer)
  return run


def _write(
  source: Run,
  run: Run,
  record: Mapping[str, Any],
  grown: Callable[[PyTree], PyTree] | None,
) -> None:
  """Writes all of a new run but its configuration."""
  state = source.load()  # not kept: it is as large as the run itself
  params = state.eval_params
  with jax.set_mesh(source.mesh):
    model = merge_adapters(params["model"], source.network)
  with distributed.together():
    _check_network(run, model, source.workdir)
    if jax.process_index() == 0:
      run.workdir.mkdir(parents=True, exist_ok=True)
      write_whole(run.workdir / _METHOD, json.dumps(record, indent=2) + "\n")
      (run.workdir / "checkpoints").rmtree(missing_ok=True)
      _copy(
        source.workdir / workdirs.PUBLISHED, run.workdir / workdirs.PUBLISHED
      )
  own = params["process"] if grown is None else grown(model)
  process = state.process.replace(params=own, constants={})
  with jax.set_mesh(source.mesh), Checkpoints(run.workdir) as checkpoints:
    checkpoints.save_imported(model, process)


def _record(source: Run, method: Any) -> dict[str, Any]:
  """Returns what `method.json` holds."""
  named = "train" if method is None else type(method).__name__.lower()
  record = {
    "method": named,
    "source": os.fspath(paths.absolute(source.workdir)),
    **({} if method is None else dataclasses.asdict(method)),
  }
  return json.loads(json.dumps(record))  # Tuples come back as lists.


def _check_same(output: Path, record: Mapping[str, Any]) -> None:
  """Checks that a run was begun by a method.

  Raises:
    ValueError: it was not.
  """
  path = output / _METHOD
  if not path.exists():
    raise ValueError(
      f"{output} holds a run that {record['method']} did not begin; use another"
      " --output"
    )
  old = json.loads(path.read_text(encoding="utf-8"))
  changed = [
    f"{key}: {old.get(key)!r} -> {record.get(key)!r}"
    for key in sorted({*old, *record})
    if old.get(key) != record.get(key)
  ]
  if changed:
    raise ValueError(
      f"{output} was begun otherwise ({'; '.join(changed[:3])}); use another"
      " --output, or leave these as they were"
    )


def _check_network(run: Run, model: PyTree, source: Path) -> None:
  """Checks that parameters are those of a run's network.

  Raises:
    ValueError: the shape of one is another.
  """
  served = run.served.abstract.params["model"]
  wanted = jax.eval_shape(lambda p: merge_adapters(p, run.network), served)
  shapes = dict(jax.tree_util.tree_leaves_with_path(wanted))
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    if path in shapes and shapes[path].shape != leaf.shape:
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      raise ValueError(
        f"config.model has {name} {shapes[path].shape}, and {source} has"
        f" {leaf.shape}: of config.model only adapters and types may be other"
        " than there"
      )


def _copy(folder: Path, target: Path) -> None:
  """Copies the files of a folder, if there is one."""
  if not folder.is_dir():
    return
  target.mkdir(exist_ok=True)
  for file in folder.iterdir():
    file.copy(target / file.name, overwrite=True)
