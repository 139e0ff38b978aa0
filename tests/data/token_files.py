"""Writes token files as other packages do, by their documented layouts."""

import pathlib

import numpy as np

_TYPES = {"uint8": 1, "int32": 4, "int64": 5, "uint16": 8}


def megatron(prefix, documents, kind="uint16"):
  """Writes PREFIX.bin and PREFIX.idx of Megatron's MMapIndexedDataset."""
  sizes = np.array([len(d) for d in documents], np.int32)
  width = np.dtype(kind).itemsize
  pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * width
  np.concatenate(documents).astype(kind).tofile(f"{prefix}.bin")
  with pathlib.Path(f"{prefix}.idx").open("wb") as file:
    file.write(b"MMIDIDX\x00\x00")
    file.write(np.uint64(1).tobytes() + np.uint8(_TYPES[kind]).tobytes())
    file.write(np.array([len(sizes), len(sizes) + 1], np.uint64).tobytes())
    file.write(sizes.tobytes() + pointers.tobytes())
    file.write(np.arange(len(sizes) + 1, dtype=np.int64).tobytes())
  return f"{prefix}.bin"


def modded(path, ids):
  """Writes a shard of modded-nanogpt: 256 integers of header, then uint16."""
  header = np.zeros(256, np.int32)
  header[:3] = 20240520, 1, len(ids)
  path.write_bytes(header.tobytes() + np.asarray(ids, np.uint16).tobytes())
  return str(path)
