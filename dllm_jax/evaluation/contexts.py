"""What stands around an answer: contexts that fit, begun and ended, and stops.

Pure functions of token ids and texts; what is left out or cut is said once.
"""

from collections.abc import Sequence
from typing import Literal
import warnings

from dllm_jax.data.tokenizer import Tokenizer

_said: set[str] = set()


def say_once(text: str) -> None:
  """Warns, unless that was said before."""
  if text not in _said:
    _said.add(text)
    warnings.warn(text, stacklevel=3)


def special(
  tokenizer: Tokenizer, role: Literal["begin", "end"], wanted: bool
) -> list[int]:
  """Returns the token that begins or ends a text, if one is wanted and known."""
  if not wanted:
    return []
  token = tokenizer.bos_id if role == "begin" else tokenizer.eos_id
  if token is None:
    say_once(
      f"the protocol wants texts to {role} with a token of their own, which the "
      "tokenizer of this run has not: it is left out"
    )
  return [] if token is None else [token]


def fitting(begin: Sequence[int], given: Sequence[int], room: int) -> list[int]:
  """Returns a context behind what it begins with, cut from the left to fit."""
  over = len(begin) + len(given) - room
  if over > 0:
    say_once("contexts are cut from the left where they do not fit the canvas")
    given = given[min(over, len(given)) :]
  return [*begin, *given][:room]


def cut(text: str, until: Sequence[str]) -> str:
  """Returns a text up to the first of some strings."""
  ends = [text.find(stop) for stop in until if stop and stop in text]
  return text[: min(ends)] if ends else text
