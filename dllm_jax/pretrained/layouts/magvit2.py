"""Folders of image tokenizers: `showlab/magvitv2`'s layout, both ways.

A published config.json names no widths: they are those of the tensors. Ours says
besides how many channels are normalised together, where that is not 32.
"""

from collections.abc import Mapping
import functools
import os
import re
from typing import Any

from jaxtyping import Array, Float, Int, PyTree
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.files import new_folder
from dllm_jax.core.images import lookup_free
from dllm_jax.models.image_tokenizer import (
  decode,
  encode,
  ImageTokenizerConfig,
)
from dllm_jax.parallel import compilation
from dllm_jax.pretrained import files

WEIGHTS = "pytorch_model.safetensors"
_CONFIG = {"_class_name": "MAGVITv2", "_diffusers_version": "0.30.1"}
_BUFFERS = ("quantize.embedding", "quantize.power_vals")
_ROWS = 32  # pictures at a time


class MagvitTokenizer:
  """Pictures to code numbers and back: `data.images.ImageTokenizer`.

  Attributes:
    config: its shape.
    params: its parameters.
  """

  def __init__(self, config: ImageTokenizerConfig, params: PyTree):
    self.config, self.params = config, params

  @property
  def codes(self) -> int:
    """The number of codes."""
    return self.config.codes

  @property
  def side(self) -> int:
    """Pixels of a token's side."""
    return self.config.side

  def encode(self, pixels: Float[Array, "B H W 3"]) -> Int[np.ndarray, "B n"]:
    """Returns the codes of pictures in [-1, 1], row by row.

    Raises:
      ValueError: a side is no multiple of a token's.
    """
    height, width = pixels.shape[1:3]
    if height % self.side or width % self.side:
      raise ValueError(
        f"pictures of {width} x {height} pixels are no whole tokens, whose side"
        f" is {self.side}: set data.image_size to a multiple of {self.side}"
      )
    ids = self._in_parts(self._encode, np.asarray(pixels, np.float32))
    return ids.reshape(len(ids), -1)

  def decode(
    self,
    ids: Int[Array, "B n"],
    grid: tuple[int, int] | None = None,
  ) -> np.ndarray:
    """Returns pictures `[B, H, W, 3]` of bytes.

    Args:
      ids: code numbers, row by row; those outside are the nearest inside.
      grid: rows and columns of tokens; None for a square.

    Raises:
      ValueError: they do not fill the grid.
    """
    ids = np.asarray(ids, np.int32)
    side = round(ids.shape[1] ** 0.5)
    grid = grid or (side, side)
    if grid[0] * grid[1] != ids.shape[1]:
      raise ValueError(
        f"{ids.shape[1]} tokens fill no grid of {grid[0]} x {grid[1]}"
      )
    return bytes_of(self._in_parts(self._decode, ids.reshape(-1, *grid)))

  def _in_parts(self, program, rows):
    """Runs a program on some rows at a time, all of one shape."""
    made = []
    size = min(_ROWS, max(len(rows), 1))
    for start in range(0, len(rows), size):
      part = rows[start : start + size]
      room = [(0, size - len(part))] + [(0, 0)] * (rows.ndim - 1)
      made.append(np.asarray(program(self.params, np.pad(part, room))))
    return np.concatenate(made)[: len(rows)]

  @functools.cached_property
  def _encode(self):
    return compilation.jit(functools.partial(encode, self.config))

  @functools.cached_property
  def _decode(self):
    return compilation.jit(functools.partial(decode, self.config))


def bytes_of(pixels: Float[np.ndarray, "*n"]) -> np.ndarray:
  """Returns bytes of values in [-1, 1], cut off as the original does."""
  unit = np.clip((np.asarray(pixels, np.float32) + 1.0) / 2.0, 0.0, 1.0)
  return (unit * 255.0).astype(np.uint8)


def read(folder: str | os.PathLike) -> MagvitTokenizer:
  """Returns the image tokenizer of a folder.

  Raises:
    FileNotFoundError: there is no such folder, or it has no weights.
    ValueError: its tensors are not those of such a network.
  """
  folder = paths.place(folder)
  if not folder.is_dir():
    raise FileNotFoundError(
      f"image tokenizer {folder} does not exist; give the folder with its"
      f" config.json and {WEIGHTS}, or the run that trained one"
    )
  said = {}
  if (folder / "config.json").is_file():
    said = files.read_json(folder / "config.json")
  tensors = {
    name: np.asarray(tensor)
    for name, tensor in files.read_tensors(folder).items()
    if name not in _BUFFERS
  }
  try:
    config = shape_of({n: t.shape for n, t in tensors.items()}, **_ours(said))
  except KeyError as error:
    raise ValueError(
      f"{folder} lacks tensor {error.args[0]}: it is no MAGVIT-v2 tokenizer, or"
      " not whole; fetch it again"
    ) from error
  return MagvitTokenizer(config, to_ours(tensors))


def _ours(said: Mapping[str, Any]) -> dict[str, int]:
  return {"groups": int(said["groups"])} if "groups" in said else {}


def write(folder: str | os.PathLike, tokenizer: MagvitTokenizer) -> None:
  """Writes an image tokenizer as a new folder that `read` reads.

  Raises:
    FileExistsError: there is something at `folder`.
  """
  config = tokenizer.config
  bits = config.bits
  numbers = np.arange(config.codes, dtype=np.int32)
  tensors = to_theirs(tokenizer.params) | {
    "quantize.embedding": np.asarray(
      lookup_free.code_of(numbers, bits), np.float32
    ),
    "quantize.power_vals": 2 ** np.arange(bits - 1, -1, -1, dtype=np.int64),
  }
  own = {} if config.groups == 32 else {"groups": config.groups}
  with new_folder(folder) as made:
    from safetensors.numpy import save  # noqa: PLC0415  Only to write.

    (made / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    files.write_json(made / "config.json", _CONFIG | own)


def shape_of(
  shapes: Mapping[str, tuple[int, ...]], **fields: Any
) -> ImageTokenizerConfig:
  """Returns the shape of an image tokenizer whose tensors have some shapes.

  Raises:
    KeyError: one is missing.
    ValueError: they do not go together.
  """
  levels = _count(shapes, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
  if not levels:
    raise KeyError("encoder.down.0.block.0.conv1.weight")

  def channels(side, way):
    name = f"{side}.{way}.{{}}.block.0.conv1.weight"
    return tuple(shapes[name.format(i)][0] for i in range(levels))

  def blocks(side, way):
    name = rf"{side}\.{way}\.{{}}\.block\.(\d+)\.conv1\.weight"
    return tuple(_count(shapes, name.format(i)) for i in range(levels))

  return ImageTokenizerConfig(
    bits=shapes["encoder.quant_conv.weight"][0],
    stem=shapes["encoder.conv_in.weight"][0],
    encoder_channels=channels("encoder", "down"),
    encoder_blocks=blocks("encoder", "down"),
    decoder_channels=channels("decoder", "up"),
    decoder_blocks=blocks("decoder", "up"),
    **fields,
  )


def _count(shapes, pattern: str) -> int:
  return sum(re.fullmatch(pattern, name) is not None for name in shapes)


_FORMS = (
  (r"(down|up)\.(\d+)\.block\.(\d+)\.", r"\1\2_block\3."),
  (r"(down|up)\.(\d+)\.(downsample|upsample)\.conv\.", r"\1\2_\3."),
  (r"mid\.block_(\d)\.", r"mid_block\1."),
  (r"mid\.attn_1\.", "mid_attn_1."),
)
_BACK = (
  (r"(down|up)(\d+)_block(\d+)\.", r"\1.\2.block.\3."),
  (r"(down|up)(\d+)_(downsample|upsample)\.", r"\1.\2.\3.conv."),
  (r"mid_block(\d)\.", r"mid.block_\1."),
  (r"mid_attn_1\.", "mid.attn_1."),
)


def to_ours(tensors: Mapping[str, np.ndarray]) -> PyTree:
  """Returns parameters of tensors by their published names."""
  params: dict[str, Any] = {}
  for name, tensor in tensors.items():
    *path, last = _renamed(name, _FORMS).split(".")
    node = params
    for part in path:
      node = node.setdefault(part, {})
    if last == "weight" and tensor.ndim == 4:
      node["kernel"] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
    else:
      node["scale" if last == "weight" else last] = tensor
  return params


def to_theirs(params: PyTree) -> dict[str, np.ndarray]:
  """Returns tensors of parameters, by their published names."""
  tensors = {}

  def walk(node, path):
    for key, value in node.items():
      if isinstance(value, Mapping):
        walk(value, [*path, key])
        continue
      value = np.asarray(value, np.float32)
      if key == "kernel":
        value = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
      last = "bias" if key == "bias" else "weight"
      tensors[_renamed(".".join([*path, last]), _BACK)] = value

  walk(params, [])
  return dict(sorted(tensors.items()))


def _renamed(name: str, forms) -> str:
  for pattern, form in forms:
    name = re.sub(pattern, form, name)
  return name
