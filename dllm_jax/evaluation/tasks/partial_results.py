"""Partial results on disk: an evaluation that was stopped goes on.

One JSON object a line, `{"protocol": ..., "item": ..., "value": ...}`, appended as
soon as an item is done. A value counts only under the very protocol that it was
computed under, which is kept as a hash; its fields stand in a line of their own.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import hashlib
import json
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from dllm_jax.core.files import Lines, read_lines
from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar

T = TypeVar("T", bound=Hashable)


class Ledger:
  """The values of a task's items under one protocol.

  Attributes:
    protocol: what every value depends on.

  Args:
    path: the file; None keeps nothing.
    protocol: what every value depends on, as JSON can hold it.
    progress: whether to draw bars on standard error.
  """

  def __init__(
    self,
    path: Path | None,
    protocol: Mapping[str, Any],
    *,
    progress: bool = False,
  ):
    self.protocol = dict(protocol)
    self._path = path
    self._progress = progress
    text = json.dumps(self.protocol, sort_keys=True)
    self._name = hashlib.sha256(text.encode()).hexdigest()[:16]
    self._values, self._known = {}, False
    self._lines: Lines | None = None
    if path is not None:
      self._read(path)

  def _read(self, path: Path) -> None:
    for line in read_lines(path):
      try:
        entry = json.loads(line)
      except json.JSONDecodeError:
        continue  # A line that a kill cut short.
      if entry.get("protocol") == self._name:
        self._known = True
        if "item" in entry:
          self._values[entry["item"]] = entry["value"]

  def __contains__(self, item: Any) -> bool:
    return str(item) in self._values

  def __getitem__(self, item: Any) -> Any:
    return self._values[str(item)]

  def __setitem__(self, item: Any, value: Any) -> None:
    """Keeps a value, written before this returns."""
    self._keep({item: value})

  def _keep(self, values: Mapping[Any, Any]) -> None:
    self._values |= {str(item): value for item, value in values.items()}
    if self._path is None or jax.process_index():
      return
    lines = [
      {"protocol": self._name, "item": str(item), "value": value}
      for item, value in values.items()
    ]
    if not self._known:
      lines.insert(0, {"protocol": self._name, "fields": self.protocol})
      self._known = True
    if self._lines is None:
      self._lines = Lines(self._path)
    self._lines.add("".join(json.dumps(line) + "\n" for line in lines))
    self._lines.flush()

  def bar(self, total: int | None, unit: str, done: int = 0) -> tqdm:
    """Returns a progress bar on standard error."""
    return progress_bar(total, unit, done=done, shown=self._progress)

  def each(
    self,
    items: Sequence[T],
    compute: Callable[[Sequence[T]], Sequence[Any]],
    *,
    at_once: int = 1,
    unit: str = "item",
  ) -> list[Any]:
    """Returns the value of each item, computing those that are not yet known.

    Args:
      items: the items; their text is their key.
      compute: the values of at most `at_once` items, as JSON can hold them.
      at_once: items in one call.
      unit: what the bar counts.
    """
    missing = [item for item in items if item not in self]
    with self.bar(len(items), unit, len(items) - len(missing)) as bar:
      for start in range(0, len(missing), at_once):
        part = missing[start : start + at_once]
        self._keep(dict(zip(part, compute(part), strict=True)))
        bar.update(len(part))
    return [self[item] for item in items]
