"""What the host knows of one row: what of it is final, and what was told."""

from collections.abc import Sequence

import numpy as np

from dllm_jax.sampling.requests import Template
from dllm_jax.serving.requests import Committed, Draft, Usage


class Row:
  """A request on its canvas, read from the left.

  Attributes:
    canvas: the template behind what a canvas begins with.
    cached: slots of the prompt that were in a cache.
  """

  def __init__(
    self,
    canvas: Template,
    *,
    before: int,
    ends: Sequence[int],
    mask_id: int | None,
    cached: int = 0,
  ):
    """Makes the row.

    Args:
      canvas: as above.
      before: slots of the canvas before the template.
      ends: tokens that end it.
      mask_id: the mask token, or None.
      cached: as above.
    """
    self.canvas, self.cached = canvas, cached
    self._before, self._ends, self._mask_id = before, frozenset(ends), mask_id
    self._first = list(canvas).index(None)
    self._at, self._ended, self._calls, self._count = self._first, False, 0, 0

  @property
  def over(self) -> bool:
    """Whether all of it was told."""
    return self._at == len(self.canvas)

  @property
  def ended(self) -> bool:
    """Whether it was an end token that ended it."""
    return self._ended

  @property
  def usage(self) -> Usage:
    """What it cost so far."""
    return Usage(
      prompt=sum(token is not None for token in self.canvas) - self._before,
      completion=self._count,
      cached=max(self.cached - self._before, 0),
      calls=self._calls,
    )

  def committed(
    self,
    tokens: np.ndarray,
    final: np.ndarray,
    log_probs: np.ndarray,
    tops: tuple[np.ndarray, np.ndarray] | None,
    calls: int,
  ) -> Committed | None:
    """Returns what is final now and was not told, None if nothing is.

    Args:
      tokens: the canvas after some network calls.
      final: which of its slots stay.
      log_probs: of tokens when they were committed.
      tops: the likeliest tokens then, and their log-probabilities; or None.
      calls: network calls of this row so far.
    """
    self._calls, found = int(calls), []
    while not self.over:
      at, given = self._at, self.canvas[self._at] is not None
      if not (given or final[at] or self._ended):
        break
      token = int(tokens[at])
      self._ended |= not given and token in self._ends
      if given or not self._ended:
        sure = None if given else float(log_probs[at])
        top = () if given or tops is None else _top(*(x[at] for x in tops))
        found.append((at - self._before, token, sure, top))
        self._count += not given
      self._at += 1
    if not found:
      return None
    slots, run, sure, top = zip(*found, strict=True)
    return Committed(slots=slots, tokens=run, log_probs=sure, tops=top)

  def draft(self, tokens: np.ndarray, log_probs: np.ndarray) -> Draft:
    """Returns the canvas as it is; arguments as of `committed`."""
    shown, sure = [], []
    for at in range(self._first, len(self.canvas)):
      masked = tokens[at] == self._mask_id
      shown.append(None if masked else int(tokens[at]))
      told = masked or self.canvas[at] is not None
      sure.append(None if told else float(log_probs[at]))
    return Draft(call=self._calls, tokens=tuple(shown), log_probs=tuple(sure))


def _top(ids: np.ndarray, log_probs: np.ndarray):
  """Returns the possible ones of the likeliest tokens, with how likely they are."""
  pairs = zip(ids.tolist(), log_probs.tolist(), strict=True)
  return tuple((token, sure) for token, sure in pairs if sure > -np.inf)
