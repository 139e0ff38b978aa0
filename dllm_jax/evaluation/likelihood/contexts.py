"""What stands around an answer: contexts that fit, begun and ended, and stops.

Pure functions of what a request of the harness says; what is left out or cut is
told once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal
import warnings

from dllm_jax.data.tokenizer import Tokenizer

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
_DRAWS = ("temperature", "top_p", "top_k")
_LEGAL = ("until", *_LENGTHS, "do_sample", *_DRAWS, "seed")
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


def wishes(
  kwargs: Mapping[str, Any], *, tokens: int, fixed: bool
) -> tuple[list[str], int, dict[str, Any]]:
  """Returns (stops, tokens to write, fields of the sampler) of a task's wishes.

  Args:
    kwargs: the task's `generation_kwargs`.
    tokens: how many to write where it does not say.
    fixed: whether only its stops are heeded.

  Raises:
    ValueError: it wants what a diffusion model cannot give.
  """
  unknown = [k for k, v in kwargs.items() if k not in _LEGAL and v]
  if unknown:
    raise ValueError(
      f"a diffusion model cannot be asked for {', '.join(sorted(unknown))}: it "
      "writes all tokens of an answer together; legal generation_kwargs: "
      f"{', '.join(_LEGAL)}"
    )
  until = kwargs.get("until") or []
  until = [until] if isinstance(until, str) else list(until)
  if fixed:
    return until, tokens, {}
  tokens = next((int(kwargs[k]) for k in _LENGTHS if kwargs.get(k)), tokens)
  draws = _DRAWS if kwargs.get("do_sample") else ()
  return until, tokens, {k: kwargs[k] for k in draws if k in kwargs}


def cut(text: str, until: Sequence[str]) -> str:
  """Returns a text up to the first of some strings."""
  ends = [text.find(stop) for stop in until if stop and stop in text]
  return text[: min(ends)] if ends else text
