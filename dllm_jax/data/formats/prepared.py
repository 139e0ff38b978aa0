"""Rows of what `dllm prepare` wrote, by index."""

from typing import Any

import grain
import numpy as np

from dllm_jax.data import packing as packing_lib
from dllm_jax.data import record


class Records:
  """Rows of prepared data, read from disk by index.

  Args:
    folder: the prepared directory.
    side: "train" or "held_out".
    manifest: the directory's manifest.
    length: tokens a row, a divisor of a record's.
  """

  def __init__(
    self, folder: str, side: str, manifest: dict[str, Any], length: int
  ):
    counts = manifest[side]
    files = record.files(folder, side, manifest)
    self._manifest = manifest
    self._length = length
    self._slices = manifest["length"] // length
    self._source = grain.sources.ArrayRecordDataSource(files)
    if len(self._source) != counts["records"]:
      raise ValueError(
        f"{folder} has {len(self._source)} {side} records where its manifest "
        f"counts {counts['records']}; remove it and run dllm prepare again"
      )
    # Only the last record of a file is padded: rows of padding alone, at its
    # end, are left out.
    tokens = np.asarray(counts["file_tokens"])
    self._rows = np.cumsum(-(-tokens // length))
    records = -(-tokens // manifest["length"])
    self._first_record = np.cumsum(records) - records

  def __len__(self) -> int:
    return int(self._rows[-1])

  def __getitem__(self, index: int) -> packing_lib.Row:
    file = int(np.searchsorted(self._rows, index, side="right"))
    inside = index - (self._rows[file - 1] if file else 0)
    at, part = divmod(int(inside), self._slices)
    tokens, segments, _ = record.decode(
      self._source[int(self._first_record[file]) + at], self._manifest
    )
    cut = slice(part * self._length, (part + 1) * self._length)
    tokens, segments = tokens[cut], segments[cut]
    real = segments > 0
    segments[real] = packing_lib.renumber(segments[real])
    return packing_lib.Row(tokens, segments)
