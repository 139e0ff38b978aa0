r"""Likelihood: of a corpus, of documents of any length, of answers.

A figure is a mean over independent passes. Within a pass counts or times are
spread evenly (`estimators`), so that passes are alike and their spread gives the
standard error of their mean and, with Student's t, its interval. It is the
error of the Monte Carlo on this text, not that of the text as a sample of the
language. Where nothing is drawn there is one pass and no error.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from scipy import stats

from dllm_jax.core.types import Batch
from dllm_jax.data.packing import TextSize
from dllm_jax.evaluation.likelihood import contexts, estimators
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer
from dllm_jax.evaluation.tasks.partial_results import Ledger

LEAST_PASSES = 4
"""Before a stopping rule may end: a spread of fewer says too little."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passes:
  """How many passes to make.

  Attributes:
    least: passes to make at least.
    most: passes to make at most.
    error: stop once the standard error, bits per token, is no larger; 0 for no
      such rule.
  """

  least: int = LEAST_PASSES
  most: int = LEAST_PASSES
  error: float = 0.0

  def __post_init__(self):
    if not 2 <= self.least <= self.most:
      raise ValueError(
        f"passes must be at least 2 (the standard error needs two), not "
        f"{self.least} to {self.most}"
      )
    if self.error < 0:
      raise ValueError(f"the error to reach is at least 0, not {self.error}")

  def over(self, nats: Sequence[float], tokens: int) -> bool:
    """Whether passes of so many nats are enough."""
    if len(nats) < self.least:
      return False
    if len(nats) >= self.most or not self.error:
      return len(nats) >= self.most
    return mean(nats)[1] / tokens / math.log(2.0) <= self.error


def mean(values: Sequence[float]) -> tuple[float, float, float]:
  """Returns (mean, standard error, half the 95 % interval) of passes.

  Of one value, which nothing was drawn for, the last two are 0.
  """
  values = np.asarray(values, np.float64)
  if len(values) == 1:
    return float(values[0]), 0.0, 0.0
  error = float(values.std(ddof=1) / math.sqrt(len(values)))
  t = float(stats.t.ppf(0.975, len(values) - 1))
  return float(values.mean()), error, t * error


def windows(
  tokens: Sequence[int],
  *,
  length: int,
  overlap: int = 0,
  begin: Sequence[int] = (),
) -> list[Item]:
  """Returns a document as windows: each token is scored once.

  Every window but the first sees the `overlap` tokens before what it scores.

  Args:
    tokens: the document.
    length: tokens of a window.
    overlap: tokens that are given again; below `length`.
    begin: what stands before the text and is given.

  Raises:
    ValueError: the document is empty, or the overlap leaves no room.
  """
  if not tokens:
    raise ValueError(
      "an empty document has no likelihood: leave it out, or give it text"
    )
  if not 0 <= overlap < length:
    raise ValueError(
      f"the overlap of windows of {length} tokens must lie in [0, {length}), "
      f"not {overlap}"
    )
  tokens = contexts.begun(begin, tokens)
  count = min(len(begin), length - 1, len(tokens) - 1)
  found = [Item(tokens=tuple(tokens[:length]), given=count)]
  for start in range(length, len(tokens), length - overlap):
    end = start + length - overlap
    part = tuple(tokens[start - overlap : end])
    found.append(Item(tokens=part, given=overlap))
  return found


def answer(prompt: Sequence[int], reply: Sequence[int], *, canvas: int) -> Item:
  """Returns an answer given a prompt.

  Raises:
    ValueError: the answer is empty, or both do not fit the canvas.
  """
  if not reply:
    raise ValueError(
      "an empty answer has no likelihood: give it at least one token"
    )
  if len(prompt) + len(reply) > canvas:
    raise ValueError(
      f"an answer of {len(reply)} tokens after a prompt of {len(prompt)} does "
      f"not fit the canvas of {canvas}: shorten them, or raise the length"
    )
  return Item(tokens=(*prompt, *reply), given=len(prompt))


def of_batches(
  scorer: Scorer,
  batches: Iterable[Batch],
  *,
  passes: Passes,
  seed: int,
  ledger: Ledger,
) -> tuple[list[float], int]:
  """Returns the nats of each pass over some batches, and their tokens.

  The rows of a batch share their strata: a pass looks at each once.

  Raises:
    ValueError: there is nothing to score.
  """
  tokens = _tokens(batches)
  if not tokens:
    raise ValueError("the held-out text is empty: raise data.held_out")

  def measure(key: jax.Array, j: int, batch: Batch) -> float:
    keys = jax.random.fold_in(key, j)[None]
    return float(np.sum(scorer.nats(keys, batch)))

  values = _passes(
    scorer, batches, measure, tokens, passes=passes, seed=seed, ledger=ledger
  )
  return [sum(parts) for parts in values], tokens


def _tokens(batches: Iterable[Batch]) -> int:
  """Returns the supervised tokens of all processes' batches."""
  here = sum(int(np.sum(batch.loss_mask)) for batch in batches)
  if jax.process_count() == 1:
    return here
  from jax.experimental import multihost_utils

  return int(np.sum(multihost_utils.process_allgather(np.int64(here))))


def of_items(
  scorer: Scorer,
  items: Sequence[Item],
  *,
  samples: int,
  passes: Passes,
  seed: int,
  rows: int,
  ledger: Ledger,
) -> tuple[list[list[float]], int]:
  """Returns the nats of each item in each pass, `[passes][items]`, and tokens.

  Raises:
    ValueError: there is nothing to score.
  """
  if not items:
    raise ValueError("there is no text to score")
  tokens = sum(item.targets for item in items)
  samples = 1 if scorer.estimator in FREE else samples
  parts = _parts(scorer, items, at_least=max(rows // samples, 1))

  def measure(key: jax.Array, j: int, part: Sequence[int]) -> list[float]:
    del j  # an item's randomness depends on the item, wherever it stands
    some = [items[i] for i in part]
    return scorer.score(some, samples=samples, key=key, rows=rows).tolist()

  values = _passes(
    scorer, parts, measure, tokens, passes=passes, seed=seed, ledger=ledger
  )
  found = np.zeros((len(values), len(items)))
  for i, each in enumerate(values):
    for part, nats in zip(parts, each, strict=True):
      found[i, part] = nats
  return found.tolist(), tokens


FREE = ("exact", *estimators.ORDERS)
"""Estimators that draw nothing: one sample in one pass is all."""
_CALLS = 16  # of the network, about, before their values are kept


def _parts(
  scorer: Scorer, items: Sequence[Item], *, at_least: int
) -> list[list[int]]:
  """Returns the items in parts of one canvas, none shorter than a call's."""
  order: dict[int, list[int]] = {}
  for i, item in enumerate(items):
    order.setdefault(scorer.canvas(len(item.tokens)), []).append(i)
  size = _CALLS * at_least
  found = []
  for at in order.values():
    parts = [at[start : start + size] for start in range(0, len(at), size)]
    if len(parts) > 1 and len(parts[-1]) < at_least:  # it would compile anew
      parts[-2:] = [parts[-2] + parts[-1]]
    found += parts
  return found


def _passes(
  scorer: Scorer,
  parts: Iterable[Any],
  measure: Callable[[jax.Array, int, Any], Any],
  tokens: int,
  *,
  passes: Passes,
  seed: int,
  ledger: Ledger,
) -> list[list[Any]]:
  """Returns the values of the parts in each pass, until these are enough.

  Args:
    scorer: whose estimator says how often it has to be.
    parts: what a pass goes over, again and again.
    measure: `(key of the pass, number of the part, part) -> ` its nats, one
      number or several.
    tokens: of all parts.
    passes: how many there are to be.
    seed: of the passes.
    ledger: what keeps each part's value.
  """
  free = scorer.estimator in FREE
  values: list[list[Any]] = []
  totals: list[float] = []
  most = 1 if free else passes.most
  count = None if passes.error and not free else most * sum(1 for _ in parts)
  with ledger.bar(count, "batch") as bar:
    while not (values if free else passes.over(totals, tokens)):
      i, found = len(values), []
      key = jax.random.fold_in(jax.random.key(seed), i)
      for j, part in enumerate(parts):
        name = f"{i}.{j}"
        if name not in ledger:
          ledger[name] = measure(key, j, part)
        found.append(ledger[name])
        bar.update(1)
      values.append(found)
      totals.append(float(sum(np.sum(value) for value in found)))
      if len(totals) > 1:
        spread = mean(totals)[1] / tokens / math.log(2.0)
        bar.set_postfix(error=f"{spread:.4f} bits")
  return values


def figures(
  nats: Sequence[float], size: TextSize, *, words: int = 0
) -> dict[str, Any]:
  """Returns what passes over a text come to, with their error.

  Args:
    nats: of each pass over all of the text.
    size: what the scored tokens stand for.
    words: words of the text as it was published; 0 if nobody counted them.

  Returns:
    `bits_per_token`, `bits_per_char`, `bits_per_byte`, `perplexity` (per
    token), `word_perplexity` if there are words, `standard_error` and
    `interval` (95 %, Student's t) of bits per token, `passes`, and the text's
    `tokens, characters, bytes, words`.
  """
  total, error, half = mean(nats)
  bits = total / math.log(2.0)
  per_token = bits / size.tokens
  half /= math.log(2.0) * size.tokens
  found = {
    "bits_per_token": per_token,
    "bits_per_char": bits / size.characters,
    "bits_per_byte": bits / size.bytes,
    "perplexity": 2.0**per_token,
    "standard_error": error / math.log(2.0) / size.tokens,
    "interval": [per_token - half, per_token + half],
    "perplexity_interval": [
      2.0 ** (per_token - half),
      2.0 ** (per_token + half),
    ],
    "passes": len(nats),
    "tokens": size.tokens,
    "characters": size.characters,
    "bytes": size.bytes,
  }
  if words:
    found |= {"word_perplexity": math.exp(total / words), "words": words}
  return found
