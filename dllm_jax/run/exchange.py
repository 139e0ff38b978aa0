"""Published folders to working directories and back.

An imported model is a run at step 0: sampling, evaluating and training it need
nothing else. What only its first owners need (their config, their tokenizer's
files) is kept under `published/` and written again on the way out.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import resource
import time
from typing import Any

import jax
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.core.files import new_folder
from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar
from dllm_jax.models import LoRA, merge_adapters
from dllm_jax.objectives.base import TokenSpace
from dllm_jax.parallel import make_mesh, shardings
from dllm_jax.pretrained import families, files
from dllm_jax.pretrained.adopt import adopt, check_target, TOLD
from dllm_jax.pretrained.convert import Source
from dllm_jax.pretrained.describe import describe, PREFIXES, retrained
from dllm_jax.pretrained.family import sampler_fields
from dllm_jax.pretrained.layouts import orbax
from dllm_jax.pretrained.load import (
  copy_companions,
  load_pretrained,
  Pretrained,
  save_pretrained,
)
from dllm_jax.pretrained.peft import load_adapter, save_adapter
from dllm_jax.pretrained.table import expected, places_of, shapes
from dllm_jax.run import images
from dllm_jax.run.run import Run
from dllm_jax.run.workdir import PUBLISHED
from dllm_jax.training.checkpoint import Checkpoints

_ROW = 512  # tokens of a row that fine-tuning begins with


class _Bar:
  """A progress bar on standard error, from the first report on."""

  def __init__(self, text: str, unit: str):
    self._text, self._unit, self._bar = text, unit, None

  def __call__(self, done: int, total: int) -> None:
    if self._bar is None:
      self._bar = progress_bar(total, self._unit, text=self._text, scaled=True)
    self._bar.update(done - self._bar.n)
    if done == total:
      self._bar.close()


def import_folder(
  folder: str | os.PathLike,
  workdir: str | os.PathLike,
  *,
  target: str | None = None,
  adapter: str | os.PathLike | None = None,
  dtype: str | None = None,
  mask_id: int | None = None,
  length: int | None = None,
  image_tokenizer: str | os.PathLike | None = None,
) -> dict[str, Any]:
  """Makes a working directory of a published folder; returns what was read.

  The directory appears when it is complete.

  Args:
    folder: the published folder.
    workdir: a new directory.
    target: "dream", "llada" or "bd3lm" to start diffusion from autoregressive
      weights; "sdar" or "idlm" for which of them a folder named SDAR's holds;
      None for what the weights are.
    adapter: a folder of PEFT's with an adapter of these weights; None for none.
    dtype: "float32" or "bfloat16"; None for what is in the files.
    mask_id: the mask token, where the folder does not name it.
    length: tokens of a row; None for the trained length, at most 512.
    image_tokenizer: of a model with image tokens, the folder of what makes them,
      or the run that trained it; None to do without.

  Raises:
    FileExistsError: there is something at `workdir`.
    FileNotFoundError: a file is missing.
    ValueError: the folder cannot be read; nothing is written then.
  """
  start = time.perf_counter()
  if target is not None:
    check_target(target)
  told, target = (target, None) if target in TOLD else (None, target)
  with new_folder(workdir) as temporary:
    model = load_pretrained(
      folder,
      dtype=dtype,
      mesh=_mesh(folder, told),
      mask_id=mask_id,
      family=told,
      progress=_Bar("reading", " parameters"),
    )
    names = model.family.table
    if target is not None:
      model = adopt(model, target)
    network, params = model.config, model.params
    if adapter is not None:
      found, params = load_adapter(
        adapter, names, params, network, prefix=model.source.prefix
      )
      network = dataclasses.replace(network, adapter=found)
    resolved = configs.resolve(_config(model, network, length))
    tokenizer = model.tokenizer.to_json()
    objective, _ = configs.parse(resolved).build(model.tokenizer)
    (temporary / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    _keep(model, temporary / PUBLISHED)
    if image_tokenizer is not None:
      images.keep(temporary, images.find(image_tokenizer))
    checkpoints = Checkpoints(temporary)
    process = objective.init(jax.random.key(0))
    checkpoints.save_imported(params, process.replace(constants={}))
    checkpoints.close()
    # Last: in a bucket, nothing is a run before this.
    (temporary / "config.json").write_text(
      resolved.to_json(indent=2), encoding="utf-8"
    )
  return _summary(model, time.perf_counter() - start)


def export_run(
  workdir: str | os.PathLike,
  folder: str | os.PathLike,
  *,
  family: str | None = None,
  use_ema: bool = True,
  dtype: str | None = None,
) -> dict[str, Any]:
  """Writes a run's newest parameters as a published folder; tells which.

  Adapters are merged.

  Args:
    workdir: a run.
    folder: a new folder.
    family: whose layout, for a run that was trained from scratch; None for the
      first with its objective that holds its network. A run that began with an
      import goes back to what it was.
    use_ema: whether to write averaged parameters where there are any.
    dtype: "float32" or "bfloat16"; None for the types that were imported.

  Raises:
    FileExistsError: there is something at `folder`.
    FileNotFoundError: there is no run.
    ValueError: no layout holds the run's network.
  """
  start = time.perf_counter()
  run = Run.open(workdir)
  model = _layout(run, family)
  state = run.load(masters=dtype == "float32")
  params = (state.eval_params if use_ema else state.params)["model"]
  params = merge_adapters(params, run.network)
  model = dataclasses.replace(model, params=params)
  save_pretrained(model, folder, dtype=dtype, progress=_Bar("writing", "B"))
  return _summary(model, time.perf_counter() - start)


def export_adapter(
  workdir: str | os.PathLike,
  folder: str | os.PathLike,
  *,
  family: str | None = None,
  use_ema: bool = True,
  dtype: str | None = None,
) -> dict[str, Any]:
  """Writes a run's newest adapters as a folder of PEFT's; tells which.

  Args:
    workdir: a run.
    folder: a new folder.
    family: whose modules, as in `export_run`.
    use_ema: whether to write averaged parameters where there are any.
    dtype: "float32" or "bfloat16"; None for float32.

  Raises:
    FileExistsError: there is something at `folder`.
    FileNotFoundError: there is no run.
    ValueError: the run has no adapters, or trains more than those.
  """
  run = Run.open(workdir)
  model, network = _layout(run, family), run.network
  if network.adapter.rank and run.config.optimizer.train_only:
    raise ValueError(
      f"{workdir} trains what optimizer.train_only names, which no folder of"
      " PEFT's holds; write all of its parameters with --to_hf"
    )
  state = run.load(masters=True)
  params = (state.eval_params if use_ema else state.params)["model"]
  ranks = save_adapter(
    folder,
    model.family.table,
    params,
    network,
    prefix=model.source.prefix,
    base=model.published.get("_name_or_path") or None,
    dtype=dtype or "float32",
  )
  return {
    "family": model.family.name,
    "modules": len(ranks),
    "rank": network.adapter.rank,
  }


def _layout(run: Run, family: str | None) -> Pretrained:
  """Returns the published model that a run is written as, without parameters.

  Raises:
    ValueError: a family is named, and the run began with an import.
  """
  if not (run.workdir / PUBLISHED).is_dir():
    return _described(run, family)
  if family is not None:
    raise ValueError(
      f"{run.workdir} began with an import and goes back to that layout; leave"
      " --as out"
    )
  return _kept(run)


def _mesh(folder, told):
  """Returns a mesh that divides parameters over all devices, or None."""
  count = jax.device_count()
  if count == 1:
    return None
  path = paths.place(folder) / "config.json"
  fields = families.as_told(orbax.read_config(folder), told, path)
  family = families.find(fields)
  mesh = make_mesh({"data": 1, "fsdp": count})
  try:
    shardings(shapes(family.table, family.network(fields)), mesh)
  except ValueError:  # too small to be divided
    return None
  return mesh


def _summary(model: Pretrained, seconds: float) -> dict[str, Any]:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return {
    "family": model.family.name,
    "parameters": model.parameters,
    "tensors_used": len(model.used),
    "tensors_unused": list(model.unused),
    "bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
    "seconds": seconds,
    "peak_bytes": usage.ru_maxrss * 1024,
  }


def _config(
  model: Pretrained, network: Any, length: int | None
) -> dict[str, Any]:
  """Returns the fields of a configuration for an imported model.

  Args:
    model: what was read.
    network: its network's config, with its adapter.
    length: tokens of a row; None for the trained length.
  """
  objective = model.objective
  derived = {f.name for f in dataclasses.fields(TokenSpace)}
  fields = {
    f.name: getattr(objective, f.name)
    for f in dataclasses.fields(objective)
    if f.name not in derived
  }
  block = getattr(objective, "masks_ahead", 0) or objective.block_length or 1
  trained = families.length(families.Fields(model.published, "config.json"))
  pictures = getattr(model.tokenizer, "images", None)
  # A picture stands beside a text of so many tokens.
  room = _ROW if pictures is None else _ROW + pictures.tokens + 3
  length = length or max(min(trained, room) // block, 1) * block
  name = type(objective).__module__.rsplit(".", 1)[-1]
  kind = type(network).__name__.removesuffix("Config").lower()
  shape = {
    f.name: getattr(network, f.name)
    for f in dataclasses.fields(network)
    if f.name != "vocab_size"
  }
  rows = 8 * jax.device_count()
  return {
    "data": {"length": length},
    "objective": {"name": name, **fields, **_finetuning(model)},
    "model": {"name": kind, **shape},
    "optimizer": {"learning_rate": 1e-5},
    "training": {"batch_size": rows},
    "evaluation": {"batch_size": rows},
    "sampler": {
      "preset": model.sampler,
      **(sampler_fields(model.family, model.folder) if model.folder else {}),
    },
  }


def _finetuning(model: Pretrained) -> Mapping[str, Any]:
  """Returns fields of the objective that the family is fine-tuned with."""
  own = type(model.objective) is model.family.objective
  return model.family.finetuning if own else {}


def _keep(model: Pretrained, folder: Path) -> None:
  """Writes what the published folder needs besides parameters."""
  folder.mkdir()
  files.write_json(folder / "config.json", model.published)
  copy_companions(model.folder, folder)
  source = model.source
  dtypes = {key: str(dtype) for key, dtype in (source.dtypes or {}).items()}
  files.write_json(
    folder / "source.json",
    {
      "prefix": source.prefix,
      "dtypes": dtypes,
      "used": list(model.used),
      "unused": list(model.unused),
    },
  )
  extras = {
    key: files.Outgoing(array.dtype, array.shape, lambda a=array: np.asarray(a))
    for key, array in (source.extras or {}).items()
  }
  if extras:
    files.write_tensors(folder, extras, shard_bytes=2**40)


def _kept(run: Run) -> Pretrained:
  """Returns the model that a run began with, without its parameters."""
  folder = run.workdir / PUBLISHED
  fields = families.Fields(files.read_config(folder), folder / "config.json")
  family = families.find(fields)
  kept = json.loads((folder / "source.json").read_text(encoding="utf-8"))
  extras = {}
  if (folder / files.SINGLE).is_file():
    extras = files.read_tensors(folder)
  network = dataclasses.replace(run.network, adapter=LoRA())
  ids = families.Ids(run.tokenizer.mask_id)
  return Pretrained(
    family.table.network(network),
    {},
    run.objective,
    run.tokenizer,
    family.sampler,
    network,
    family=family,
    published=retrained(family, fields, run.objective),
    ids=ids,
    source=Source(
      kept["prefix"],
      {key: np.dtype(name) for key, name in kept["dtypes"].items()},
      extras,
    ),
    used=tuple(kept["used"]),
    unused=tuple(kept["unused"]),
    folder=folder,
  )


def _described(run: Run, name: str | None) -> Pretrained:
  """Returns a run that was trained from scratch as a model of a family."""
  tokenizer = run.tokenizer
  special = families.Ids(
    run.objective.mask_id,
    tokenizer.eos_id,
    tokenizer.pad_id,
    tokenizer.bos_id,
  )
  network = dataclasses.replace(run.network, adapter=LoRA())
  family, published = describe(
    run.objective, network, special, length=run.config.data.length, name=name
  )
  places = places_of(family.table, network)
  prefix = PREFIXES.get(family.name, "")
  return Pretrained(
    family.table.network(network),
    {},
    run.objective,
    tokenizer,
    family.sampler,
    network,
    family=family,
    published=published,
    ids=special,
    source=Source(prefix),
    used=tuple(prefix + key for key in expected(places)),
    unused=(),
  )
