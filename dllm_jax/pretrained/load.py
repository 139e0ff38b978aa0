"""Published folders in and out: `load_pretrained` and `save_pretrained`.

Loading makes one shard of one parameter at a time, from the rows of the files
that it needs, and hands it to its device: the host holds no more than that.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.files import new_folder
from dllm_jax.core.mask import Full
from dllm_jax.core.types import Denoiser, ModelInputs, Objective
from dllm_jax.core.vocabulary import reduce
from dllm_jax.data.tokenizer import HuggingFace, Tokenizer
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import shardings
from dllm_jax.pretrained import convert, families, files, tokens
from dllm_jax.pretrained.families import Family, Fields, Ids
from dllm_jax.pretrained.layouts import orbax
from dllm_jax.pretrained.table import parameters, Region, shapes

_AVERAGE = re.compile(r"(^|\.)ema\.")
SHARD_BYTES = 5 * 10**9
# Small files that make a folder whole for the code it was published with.
_COMPANIONS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json",
    "chat_template.jinja", "*.py", "LICENSE*",
)  # fmt: skip
Progress = Callable[[int, int], None]  # called with (done, in all)


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A published model in our form.

  Attributes:
    denoiser: the network, `(init, apply)`.
    params: its parameters.
    objective: how it was trained.
    tokenizer: its tokenizer; ids by number where the folder has none.
    sampler: the name of the preset that samples as published.
    config: the network's config.
    family: its family.
    published: the fields of its `config.json`.
    ids: its special tokens.
    source: what its files were like.
    used: names of the tensors that were read.
    unused: names of the tensors that carry nothing new.
    folder: where it was read.
    mesh: what the parameters are divided over, or None.
  """

  denoiser: Denoiser
  params: PyTree
  objective: Objective
  tokenizer: Tokenizer
  sampler: str
  config: Any
  family: Family = dataclasses.field(kw_only=True)
  published: Mapping[str, Any] = dataclasses.field(kw_only=True, repr=False)
  ids: Ids = dataclasses.field(kw_only=True)
  source: convert.Source = dataclasses.field(kw_only=True, repr=False)
  used: tuple[str, ...] = dataclasses.field(kw_only=True, repr=False)
  unused: tuple[str, ...] = dataclasses.field(kw_only=True, repr=False)
  folder: paths.Path | None = dataclasses.field(default=None, kw_only=True)
  mesh: jax.sharding.Mesh | None = dataclasses.field(default=None, kw_only=True)

  @property
  def parameters(self) -> int:
    """The number of published parameters; tied ones count once."""
    return parameters(self.family.table, self.config)

  @functools.cached_property
  def _program(self):
    return compilation.jit(
      self._logits, mesh=self.mesh, dtype=self.denoiser.dtype
    )

  def _logits(self, params, inputs, tokens, time):
    """Returns what the network and its unembedding make of inputs."""
    out, _ = self.denoiser.apply(params, inputs, None)
    values = reduce(lambda logits: logits, out)
    if self.family.output is not None and time is not None:
      return self.family.output(self.objective, values, tokens, time)
    return values

  def logits(
    self,
    tokens: Int[Array, "B T"],
    attention_mask: Bool[Array, "B T"] | Bool[Array, "B T T"] | None = None,
    time: Float[Array, "B"] | float | None = None,
    *,
    positions: Int[Array, "B T"] | None = None,
  ) -> Float[Array, "B T V"]:
    """Returns what the original network returns for tokens, unshifted.

    Args:
      tokens: token ids.
      attention_mask: `[B, T]`, False at padding, under the family's own mask;
        or `[B, T, T]` (or `[1, T, T]`), who attends to whom, in its place.
      time: t in [0, 1], for networks that are told it. SEDD's then gives log
        scores, as the original does; without one, its bare logits.
      positions: rotary positions; by default as the family counts them.

    Raises:
      ValueError: the shapes do not fit together.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    inputs = self._inputs(tokens, attention_mask, time, positions)
    if time is not None:
      time = _column(time, tokens.shape[0])
    args = (self.params, inputs, tokens, time)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args)):
      return self._logits(*args)  # as a part of the program that is being made
    if self.mesh is None:
      return self._program(*args)
    with jax.set_mesh(self.mesh):
      return self._program(*args)

  def _inputs(self, tokens, attention_mask, time, positions) -> ModelInputs:
    if tokens.ndim != 2:
      raise ValueError(f"tokens must be [B, T], not {tokens.shape}")
    rows, length = tokens.shape
    spec, extra, real = self.objective.mask_spec, None, jnp.ones_like(tokens)
    if attention_mask is not None:
      mask = jnp.asarray(attention_mask) > 0
      if mask.shape == tokens.shape:
        real = mask.astype(jnp.int32)
      elif mask.ndim == 3 and mask.shape[1:] == (length, length):
        spec, extra = Full(), jnp.broadcast_to(mask, (rows, length, length))
      else:
        raise ValueError(
          f"attention_mask must be {tokens.shape} or {(rows, length, length)},"
          f" not {mask.shape}"
        )
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
      if not self.family.counts_padding:
        visible = jnp.cumsum(real, axis=1) - 1
        positions = jnp.where(real > 0, visible, 1)
    conditioning = None
    if time is not None:
      conditioning = self.objective.conditioning(_column(time, rows))
    return ModelInputs(
      latent=tokens,
      conditioning=conditioning,
      positions=jnp.asarray(positions, jnp.int32),
      segment_ids=real,
      mask=spec,
      extra_mask=extra,
    )


def _column(time, rows: int) -> Float[Array, "B 1"]:
  time = jnp.asarray(time, jnp.float32).reshape(-1, 1)
  return jnp.broadcast_to(time, (rows, 1))


def load_pretrained(
  path: str | os.PathLike,
  *,
  dtype: str | None = None,
  mesh: jax.sharding.Mesh | None = None,
  mask_id: int | None = None,
  family: str | None = None,
  progress: Progress | None = None,
) -> Pretrained:
  """Returns a published model, read from a folder onto its devices.

  Args:
    path: a folder with `config.json` and safetensors, or an Orbax checkpoint.
    dtype: "float32" or "bfloat16"; None for the files' (half becomes float32).
    mesh: what to divide the parameters over; None for the first device.
    mask_id: the mask token, where the folder does not name the right one.
    family: "sdar" or "idlm", between which a config does not decide.
    progress: called with the parameters that are in place, and all.

  Raises:
    FileNotFoundError: the folder, its config or a shard is missing.
    ValueError: the family is unknown, a file is damaged, or config and tensors
      differ.

  Examples:
    >>> model = load_pretrained(folder)
    >>> model.logits([[1, 2, 3]]).shape[:2]
    (1, 3)
  """
  folder = paths.place(path)
  published = orbax.read_config(folder)
  fields = families.as_told(published, family, folder / "config.json")
  published, family = fields.values, families.find(fields)
  tensors = orbax.read_tensors(folder)
  fields.values = family.widths(tensors) | published
  config = _network_config(family, fields)
  tokenizer = tokens.read(folder, family, fields, config.vocab_size)
  size, hint = config.vocab_size, tokens.hint(tokenizer)
  ids = tokens.ids(family, fields, size, hint, mask_id=mask_id)
  tokenizer = tokens.fit(tokenizer, ids, size, fields)
  if mask_id is not None:
    published = {**published, "mask_token_id": ids.mask}
  special = (ids, getattr(tokenizer, "images", None))
  objective = families.objective(family, fields, size, *special)
  families.check_fields(family, fields)
  dtype = _dtype(tensors, dtype)
  low = (dtype or _common(tensors)) == np.dtype(jnp.bfloat16)
  kind = "bfloat16" if low else "float32"
  config = dataclasses.replace(config, dtype=kind, param_dtype=kind)
  converted = convert.to_ours(
    family.table,
    tensors,
    config,
    dtype=dtype,
    place=_placer(family, config, mesh, progress),
  )
  _warn_of_averages(folder, converted.unused)
  return Pretrained(
    family.table.network(config),
    converted.params,
    objective,
    tokenizer,
    family.sampler,
    config,
    family=family,
    published=published,
    ids=ids,
    source=converted.source,
    used=converted.used,
    unused=converted.unused,
    folder=folder,
    mesh=mesh,
  )


def _network_config(family: Family, fields: Fields) -> Any:
  try:
    return family.network(fields)
  except (TypeError, ZeroDivisionError) as error:
    raise ValueError(f"{fields.path}: {error}") from error
  except ValueError as error:
    path, text = str(fields.path), str(error)
    raise ValueError(text if path in text else f"{path}: {text}") from error


def _warn_of_averages(folder: paths.Path, unused: Sequence[str]) -> None:
  """Says that there are averaged parameters, which nothing names."""
  averages = [key for key in unused if _AVERAGE.search(key)]
  if averages:
    warnings.warn(
      f"{folder}: {len(averages)} averaged tensors ({averages[0]}, ...) have no"
      " names of parameters and are unused; the plain parameters are loaded. To"
      " have the averages, save them under the parameters' names",
      stacklevel=3,
    )


def _common(tensors: Mapping[str, files.Stored]) -> np.dtype:
  """Returns the type that most of the numbers have."""
  sizes: dict[np.dtype, int] = {}
  for tensor in tensors.values():
    size = int(np.prod(tensor.shape))
    sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + size
  return max(sizes, key=sizes.get, default=np.dtype(np.float32))


def _dtype(tensors, name: str | None) -> np.dtype | None:
  if name is not None:
    if name not in ("float32", "bfloat16"):
      raise ValueError(
        f"dtype {name!r} is unknown; legal: float32, bfloat16, or None"
      )
    return np.dtype(jnp.dtype(name))
  ours = (np.dtype(np.float32), np.dtype(jnp.bfloat16))
  odd = any(tensor.dtype not in ours for tensor in tensors.values())
  return np.dtype(np.float32) if odd else None


def _placer(family, config, mesh, progress):
  """Returns what reads a parameter's shards and puts each on its device."""
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = lambda path: one
  else:
    flat = shapes(family.table, config)
    tree = shardings(flat, mesh)
    placed = tree.__getitem__
  total = done = 0
  if progress is not None:
    total = sum(leaf.size for leaf in shapes(family.table, config).values())

  def place(region: Region) -> jax.Array:
    nonlocal done
    sharding = placed(region.path)
    where = sharding.addressable_devices_indices_map(region.shape)
    order = sorted(where.items(), key=lambda item: str(item[1]))
    arrays, last, host = [], None, None
    for device, index in order:
      if host is None or index != last:
        host, last = region.read(index or ()), index
      arrays.append(jax.block_until_ready(jax.device_put(host, device)))
    del host
    if progress is not None:
      done += int(np.prod(region.shape))
      progress(done, total)
    return jax.make_array_from_single_device_arrays(
      region.shape, sharding, arrays
    )

  return place


def save_pretrained(
  model: Pretrained,
  path: str | os.PathLike,
  *,
  params: PyTree | None = None,
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
  progress: Progress | None = None,
) -> None:
  """Writes a folder that the original code loads.

  Names, shapes and types are those that were read, and `config.json` says the
  type of the weights. The folder appears when it is complete.

  Args:
    model: what `load_pretrained` returned.
    path: a new folder.
    params: other parameters for it, such as fine-tuned ones.
    dtype: "float32" or "bfloat16"; None for the types that were read.
    shard_bytes: the most bytes of a file; more files get an index.
    progress: called as bytes are written.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: the parameters do not fit the model.
  """
  source = model.source
  if dtype is not None:
    source = source._replace(dtype=_dtype({}, dtype))
  tensors = convert.to_theirs(
    model.family.table,
    model.params if params is None else params,
    model.config,
    source=source,
  )
  total = sum(tensor.nbytes for tensor in tensors.values())
  done = 0

  def report(count: int) -> None:
    nonlocal done
    done += count
    if progress is not None:
      progress(done, total)

  with new_folder(path) as folder:
    kind = str(_common(tensors))
    files.write_tensors(
      folder, tensors, shard_bytes=shard_bytes, progress=report
    )
    if model.folder is not None:
      copy_companions(model.folder, folder)
    elif isinstance(model.tokenizer, HuggingFace):
      model.tokenizer.save(folder)
    # Last: in a bucket, nothing is a published folder before this.
    files.write_json(folder / "config.json", _typed(model.published, kind))


def _typed(published: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Returns a config that names the type of the weights beside it.

  By the name that it has for it. One that has none means float32; for others it
  gets the name that all versions of transformers read.
  """
  names = [name for name in ("dtype", "torch_dtype") if name in published]
  if not names and kind != "float32":
    names = ["torch_dtype"]
  return dict(published) | dict.fromkeys(names, kind)


def copy_companions(
  source: str | os.PathLike, target: str | os.PathLike
) -> None:
  """Copies what a folder holds besides its config and weights."""
  for pattern in _COMPANIONS:
    for file in paths.place(source).glob(pattern):
      if file.is_file():
        file.copy(paths.place(target) / file.name, overwrite=True)
