"""Multiple choice by constrained decoding: which of the choices is written.

The harness asks for the likelihood of each choice by itself. Here the choices of
a document are found again, and are a language that the sampler is held to: one
generation a document, whatever the number of choices.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

from lm_eval.api.instance import Instance

from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.evaluation.likelihood import contexts
from dllm_jax.sampling.constraints.automaton import Automaton, automaton_of
from dllm_jax.sampling.constraints.language import choices
from dllm_jax.sampling.constraints.paths import NO
from dllm_jax.sampling.constraints.spelling import spelling


def documents(
  requests: Sequence[Instance], *, cached: Mapping | None = None
) -> list[list[int]]:
  """Returns the numbers of requests that are the choices of one document.

  Args:
    requests: pairs of a context and a continuation.
    cached: the harness's cache, if there is one.

  Raises:
    ValueError: some have no choice, or their answers would be cached, each for
      itself, when they depend on each other.
  """
  if cached is not None:
    raise ValueError(
      "which choice is written depends on the others, and a cache knows each by"
      " itself: leave out --use_cache with multiple_choice=constrained"
    )
  found: dict[tuple, list[int]] = {}
  behind: dict[tuple, set[str]] = {}
  for i, request in enumerate(requests):
    context, _ = request.args
    document = (request.task_name, request.doc_id)
    found.setdefault((*document, context), []).append(i)
    behind.setdefault(document, set()).add(context)
  for numbers in found.values():
    if len({requests[i].args[1] for i in numbers}) < 2:
      raise ValueError(
        "constrained decoding chooses among continuations of one context, and a"
        " document has only one: leave out multiple_choice=constrained for tasks"
        " whose choices are contexts, and for those without choices"
      )
  if any(len(several) > 1 for several in behind.values()):
    raise ValueError(
      "a document has choices behind several contexts, as acc_mutual_info asks"
      " for: leave out that metric, or multiple_choice=constrained"
    )
  return list(found.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
  """The choices of one document.

  Attributes:
    given: the tokens of the context.
    slots: of the longest choice.
    language: the choices.
    texts: what each writes.
    tokenizer: ids to bytes.
  """

  given: Sequence[int]
  slots: int
  language: Automaton
  texts: Sequence[bytes]
  tokenizer: Tokenizer

  @classmethod
  def of(
    cls,
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[str], Sequence[int]],
    tokenizer: Tokenizer,
    length: int,
  ) -> "Asked":
    """Returns what is asked by pairs of one context and its continuations.

    Raises:
      ValueError: a choice is empty or longer than the canvas, or they have
        several lengths and no text an end.
    """
    context = pairs[0][0]
    split = [contexts.divided(encode, *pair) for pair in pairs]
    lengths = {len(reply) for _, reply in split}
    if max(lengths) > length:
      raise ValueError(
        f"a choice of {max(lengths)} tokens does not fit the canvas of {length}:"
        " give a longer length in --model_args"
      )
    if len(lengths) > 1 and not tokenizer.end_ids:
      raise ValueError(
        "choices of several lengths need a tokenizer with an end of text, which"
        " this run's has not: leave out multiple_choice=constrained"
      )
    space = context[len(context.rstrip()) :]
    texts = [space + continuation for _, continuation in pairs]
    return cls(
      given=split[0][0],
      slots=max(lengths),
      language=automaton_of(choices(list(dict.fromkeys(texts))), tokenizer),
      texts=[text.encode() for text in texts],
      tokenizer=tokenizer,
    )

  def told(self, tokens: Sequence[int]) -> list[tuple[float, bool]]:
    """Returns (0, True) of the choice that was written, (next to -inf, False) of others."""
    bytes_of = spelling(self.tokenizer).bytes_of
    written = b"".join(map(bytes_of, tokens))
    return [
      (0.0, True) if text == written else (NO, False) for text in self.texts
    ]
