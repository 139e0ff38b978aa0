"""The fields of a published `config.json`, read with their types checked."""

from collections.abc import Mapping
import pathlib
from typing import Any


class Fields:
  """The fields of a `config.json`, read with their types checked.

  Attributes:
    values: the fields.
    path: the file, for messages.
  """

  def __init__(self, values: Mapping[str, Any], path: pathlib.Path | str):
    """Wraps the fields of a file."""
    self.values = dict(values)
    self.path = path

  def get(self, *names: str, default: Any = None) -> Any:
    """Returns the first field that is there and not null."""
    for name in names:
      if self.values.get(name) is not None:
        return self.values[name]
    return default

  def integer(self, *names: str, default: int | None = None) -> int:
    """Returns a whole number.

    Raises:
      ValueError: it is missing without a default, or something else.
    """
    value = self.get(*names, default=default)
    if value is None:
      raise ValueError(f"{self.path} lacks the field {names[0]}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
      raise ValueError(
        f"{self.path}: {names[0]} must be a whole number, not {value!r}"
      )
    return value

  def number(self, name: str, default: float | None = None) -> float:
    """Returns a number.

    Raises:
      ValueError: it is missing without a default, or something else.
    """
    value = self.get(name, default=default)
    if value is None:
      raise ValueError(f"{self.path} lacks the field {name}")
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f"{self.path}: {name} must be a number, not {value!r}")
    return float(value)

  def flag(self, name: str, default: bool = False) -> bool:
    """Returns a truth value."""
    return bool(self.get(name, default=default))

  def section(self, name: str) -> "Fields":
    """Returns the fields of a nested object."""
    value = self.values.get(name)
    if not isinstance(value, Mapping):
      raise ValueError(f"{self.path} lacks the section {name}")
    return Fields(value, self.path)

  def only(self, **legal: Any) -> None:
    """Checks that fields, where given, have values that we can run.

    Raises:
      ValueError: one has not.
    """
    for name, value in legal.items():
      values = value if isinstance(value, tuple) else (value,)
      found = self.values.get(name)
      if found is not None and found not in values:
        raise ValueError(
          f"{self.path}: {name}={found!r} is not supported; legal:"
          f" {', '.join(map(repr, values))}"
        )
