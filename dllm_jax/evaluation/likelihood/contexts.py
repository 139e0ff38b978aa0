"""What stands around an answer: contexts that fit, begun and ended, and stops.

Pure functions of what a request of the harness says; what is left out or cut is
told once.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
import warnings

from dllm_jax.data.chat import Message
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


def divided(
  encode: Callable[[str], Sequence[int]], context: str, answer: str
) -> tuple[list[int], list[int]]:
  """Returns the tokens of a context, and those of an answer to it.

  White space at the end of a context belongs to the answer: that is where
  tokenizers put it. The answer's tokens are what the whole has more than the
  context (lm-evaluation-harness 0.4.13, `_encode_pair`). Where one token spans
  both, the whole does not begin with the context's tokens, and the answer is
  encoded by itself.

  Args:
    encode: text to token ids, without what stands around it.
    context: what is given.
    answer: what is scored.
  """
  stripped = context.rstrip()
  answer = context[len(stripped) :] + answer
  given = [int(i) for i in encode(stripped)] if stripped else []
  whole = [int(i) for i in encode(stripped + answer)]
  cut = len(given)
  if answer and (whole[:cut] != given or len(whole) == cut):
    return given, [int(i) for i in encode(answer)]
  return given, whole[cut:]


def begun(begin: Sequence[int], given: Sequence[int]) -> list[int]:
  """Returns what is to stand before a context: nothing that it has already."""
  begin = list(begin)
  return [] if list(given[: len(begin)]) == begin else begin


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
    fixed: whether only its stops, and a wish for the best token, are heeded.

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
  # As `normalize_gen_kwargs` of lm-evaluation-harness 0.4.13 reads them.
  warm = kwargs.get("do_sample", bool(kwargs.get("temperature")))
  asked = "do_sample" in kwargs or "temperature" in kwargs
  greedy = {"temperature": 0.0} if asked and not warm else {}
  if fixed:
    return until, tokens, greedy
  tokens = next((int(kwargs[k]) for k in _LENGTHS if kwargs.get(k)), tokens)
  draws = _DRAWS if warm else ()
  return until, tokens, greedy | {k: kwargs[k] for k in draws if k in kwargs}


def cut(text: str, until: Sequence[str]) -> str:
  """Returns a text up to the first of some strings."""
  ends = [text.find(stop) for stop in until if stop and stop in text]
  return text[: min(ends)] if ends else text


def stopped(
  ids: Sequence[int],
  until: Sequence[str],
  decode: Callable[..., str],
) -> str:
  """Returns the text of an answer up to the first of some strings.

  Names of special tokens stop as words do: what is cut is the text with them
  (LLaDA's `eval_llada.py`, the stopping criteria of the harness's own class);
  what is returned is without them.

  Args:
    ids: the answer.
    until: the stops.
    decode: `(ids, special=)`, the tokenizer's.
  """
  spelled = lambda n: decode(ids[:n], special=True)
  whole = spelled(len(ids))
  short = cut(whole, until)
  if short == whole:
    return decode(ids)
  counts = range(len(ids) + 1)
  over = bisect.bisect_right(counts, len(short), key=lambda n: len(spelled(n)))
  kept = max(over - 1, 0)  # tokens that end before the stop
  return decode(ids[:kept]) + short[len(spelled(kept)) :]


def behind(
  ids: Sequence[int], mark: str, decode: Callable[..., str]
) -> list[int]:
  """Returns the tokens after the last place of a text, all if it is nowhere."""
  spelled = lambda n: decode(ids[:n], special=True)
  at = spelled(len(ids)).rfind(mark)
  if at < 0:
    return list(ids)
  counts = range(len(ids) + 1)
  end = at + len(mark)
  return list(
    ids[bisect.bisect_left(counts, end, key=lambda n: len(spelled(n))) :]
  )


def rendered(
  tokenizer: Tokenizer, messages: Sequence[Message], answer: bool
) -> str:
  """Returns a conversation as text, its last turn open unless an answer comes.

  A template that takes no system message is given the others, as the harness's
  own class does.

  Raises:
    ValueError: the template refuses the messages.
  """
  options = {"answer": answer, "continued": not answer}
  try:
    return tokenizer.render(messages, **options)
  except ValueError:
    others = [m for m in messages if m["role"] != "system"]
    if len(others) == len(messages):
      raise
  say_once("the chat template takes no system message: it is left out")
  return tokenizer.render(others, **options)
