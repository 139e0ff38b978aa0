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

_LENGTHS = (
  "max_gen_toks",
  "max_new_tokens",
  "max_tokens",
  "max_completion_tokens",
)
_DRAWS = ("temperature", "top_p", "top_k")
_LEGAL = (
  "until",
  *_LENGTHS,
  "do_sample",
  *_DRAWS,
  "repetition_penalty",
  "seed",
)
_ONE = ("num_beams", "num_return_sequences")  # of which 1 is none at all
_said: set[str] = set()


def say_once(text: str) -> None:
  """Warns, unless that was said before."""
  if text not in _said:
    _said.add(text)
    warnings.warn(text, stacklevel=3)


def special(
  tokenizer: Tokenizer, role: Literal["begin", "end"], wanted: bool | None
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
  """Returns a context behind what it begins with, which stands there once."""
  begin, given = list(begin), list(given)
  return given if given[: len(begin)] == begin else begin + given


def fitting(begin: Sequence[int], given: Sequence[int], room: int) -> list[int]:
  """Returns a context as it begins, cut from the left to fit."""
  row = begun(begin, given)
  over = len(row) - room
  if over > 0:
    say_once("contexts are cut from the left where they do not fit the canvas")
    row = [*begin, *row[len(begin) + over :]]
  return row[:room]


def wishes(
  kwargs: Mapping[str, Any], *, tokens: int, fixed: bool
) -> tuple[list[str], int, dict[str, Any]]:
  """Returns (stops, tokens to write, fields of the sampler) of a task's wishes.

  Args:
    kwargs: the task's `generation_kwargs`.
    tokens: how many to write where it does not say.
    fixed: whether only its stops, and a wish for the best token, are heeded.

  Raises:
    ValueError: it wants what a diffusion model cannot give, or what is none of
      what may be wanted.
  """
  kwargs = {k: v for k, v in kwargs.items() if k not in _ONE or v != 1}
  unknown = [k for k, v in kwargs.items() if k not in _LEGAL and v]
  if unknown:
    raise ValueError(
      f"a diffusion model cannot be asked for {', '.join(sorted(unknown))}: it "
      "writes all tokens of an answer together; legal generation_kwargs: "
      f"{', '.join(_LEGAL)}"
    )
  kwargs = {k: v for k, v in kwargs.items() if v is not None}
  until = _stops(kwargs.get("until"))
  # As `normalize_gen_kwargs` of lm-evaluation-harness 0.4.13 reads them, but for
  # a task that wants no kind of draws: it gets the sampler's own.
  warm = kwargs.get("do_sample", float(kwargs.get("temperature", 0.0)) > 0.0)
  asked = "do_sample" in kwargs or "temperature" in kwargs
  fields = {"temperature": 0.0} if asked and not warm else {}
  if fixed:
    return until, tokens, fields
  tokens = next((int(kwargs[k]) for k in _LENGTHS if k in kwargs), tokens)
  if tokens < 1:
    raise ValueError(f"max_gen_toks must be at least 1, not {tokens}")
  draws = ("repetition_penalty", *(_DRAWS if warm else ()))
  number = lambda k: int(kwargs[k]) if k == "top_k" else float(kwargs[k])
  return until, tokens, fields | {k: number(k) for k in draws if k in kwargs}


def _stops(until: Any) -> list[str]:
  found = [until] if isinstance(until, str) else until or []
  if not isinstance(found, list | tuple) or not all(
    isinstance(stop, str) for stop in found
  ):
    raise ValueError(f"until must be a text or a list of texts, not {until!r}")
  return list(found)


def cut(text: str, until: Sequence[str]) -> str:
  """Returns a text up to the first of some strings."""
  ends = [text.find(stop) for stop in until if stop and stop in text]
  return text[: min(ends)] if ends else text


def stopped(
  ids: Sequence[int],
  until: Sequence[str],
  decode: Callable[..., str],
  *,
  ends: Sequence[int] = (),
) -> str:
  """Returns the text of an answer up to what ends it, or the first of some stops.

  Names of special tokens stop as words do: what is cut is the text with them
  (LLaDA's `eval_llada.py`, the stopping criteria of the harness's own class);
  what is returned is without them, and has no stop in it either
  (`postprocess_generated_text` of lm-evaluation-harness 0.4.13).

  Args:
    ids: the answer.
    until: the stops.
    decode: `(ids, special=)`, the tokenizer's.
    ends: tokens of which the first ends the answer.
  """
  count = _until(ids, ends)
  spelled = lambda n: decode(ids[:n], special=True)
  whole, last = spelled(count), spelled(count + 1)  # a stop may hold the end
  short = cut(last, until)[: len(whole)]
  if short == whole:
    return cut(decode(ids[:count]), until)
  counts = range(count + 1)
  over = bisect.bisect_right(counts, len(short), key=lambda n: len(spelled(n)))
  kept = max(over - 1, 0)  # tokens that end before the stop
  while not short.startswith(spelled(kept)):  # inside a character
    kept -= 1
  return cut(decode(ids[:kept]) + short[len(spelled(kept)) :], until)


def _until(ids: Sequence[int], ends: Sequence[int]) -> int:
  return next((i for i, token in enumerate(ids) if token in ends), len(ids))


def behind(
  ids: Sequence[int],
  mark: str | int,
  decode: Callable[..., str],
  *,
  ends: Sequence[int] = (),
) -> list[int]:
  """Returns what stands after the last place of a mark, all if it is nowhere.

  Args:
    ids: the answer.
    mark: a text or a token.
    decode: `(ids, special=)`, the tokenizer's.
    ends: tokens of which the first ends the answer.
  """
  ids = list(ids[: _until(ids, ends) + 1])
  if isinstance(mark, int):
    at = max((i for i, token in enumerate(ids) if token == mark), default=-1)
    return ids[at + 1 :]
  spelled = lambda n: decode(ids[:n], special=True)
  at = spelled(len(ids)).rfind(mark)
  if at < 0:
    return ids
  counts = range(len(ids) + 1)
  end = at + len(mark)
  return ids[bisect.bisect_left(counts, end, key=lambda n: len(spelled(n))) :]


def rendered(
  tokenizer: Tokenizer,
  messages: Sequence[Message],
  answer: bool,
  **options: Any,
) -> str:
  """Returns a conversation as text, its last turn open unless an answer comes.

  A template that takes no system message is given the others, as the harness's
  own class does.

  Raises:
    ValueError: the template refuses the messages.
  """
  options |= {"answer": answer, "continued": not answer}
  try:
    return tokenizer.render(messages, **options)
  except ValueError:
    others = [m for m in messages if m["role"] != "system"]
    if len(others) == len(messages):
      raise
  say_once("the chat template takes no system message: it is left out")
  return tokenizer.render(others, **options)
