r"""The log-probability of each token of a text, read from left to right.

    log p(x_i | x_1 ... x_{i-1})

of an autoregressive network, all from one call; of a masked one, at the first
mask where x_i and what follows it are masked, a row for each i. Their sum over an
answer is the harness's figure by the estimator "exact", and "left": a law over
texts, which other orders of a masked network need not agree with. What precedes
the first token is nothing: it is not read.
"""

from collections.abc import Callable, Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Float, Int
import numpy as np

from dllm_jax.core.types import Objective
from dllm_jax.core.vocabulary import reduce
from dllm_jax.evaluation.likelihood.estimators import Name
from dllm_jax.evaluation.likelihood.scorer import batch_of, Item, Scorer
from dllm_jax.objectives.autoregressive import Autoregressive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """What a network holds of a text; `n` tokens without the first.

  Attributes:
    log_probs: of each token, nats.
    top_ids: the likeliest tokens there.
    top_log_probs: how likely they are.
    calls: of the network, for any number of rows each.
  """

  log_probs: Float[np.ndarray, "n"]
  top_ids: Int[np.ndarray, "n k"]
  top_log_probs: Float[np.ndarray, "n k"]
  calls: int


def estimator(objective: Objective) -> Name:
  """Returns the estimator whose figure the sum of a reading is.

  Raises:
    ValueError: the network has no such law that one pass reads.
  """
  drafts = getattr(objective, "masks_ahead", 0)
  if objective.opens or objective.two_passes or drafts:
    raise ValueError(
      f"{type(objective).__name__} as configured reads text by passes of its "
      "own: its tokens have no log-probabilities from left to right here"
    )
  return "exact" if isinstance(objective, Autoregressive) else "left"


class Reader:
  """A network that reads texts; compiled once for each canvas.

  Args:
    scorer: the network, by the estimator of `estimator(objective)`.
    rows: places of a text in one call, about, where a call reads one each.
    top: how many of the likeliest tokens are told.
  """

  def __init__(self, scorer: Scorer, *, rows: int = 8, top: int = 0):
    self._scorer, self._top = scorer, top
    self._at_once = scorer.estimator == "exact"
    self._rows = scorer.whole(1 if self._at_once else rows)
    self._read = scorer.compiled(self._all if self._at_once else self._first)

  def __call__(
    self, tokens: Sequence[int], *, gone: Callable[[], bool] = lambda: False
  ) -> Reading:
    """Returns what the network holds of a text.

    Args:
      tokens: of the text.
      gone: whether nobody wants it any more; asked between calls.
    """
    given = [1] if self._at_once else range(1, len(tokens))
    items = [Item(tokens=tuple(tokens), given=i) for i in given]
    items = items if len(tokens) > 1 else []
    width = self._scorer.canvas(len(tokens))
    calls = range(0, len(items), self._rows)
    parts = [self._call(items[at : at + self._rows], width)
             for at in calls if not gone()]  # fmt: skip
    whole = lambda shape, at: np.concatenate([
      np.zeros((0, *shape)),
      *(part[at] for part in parts),
    ])[: len(tokens) - 1]
    return Reading(
      log_probs=whole((), 0),
      top_ids=whole((self._top,), 1).astype(np.int64),
      top_log_probs=whole((self._top,), 2),
      calls=len(parts),
    )

  def _call(self, items: Sequence[Item], width: int) -> Sequence[np.ndarray]:
    """Returns what one call says of each item's places, one after another."""
    rows = [*items, *[Item(tokens=())] * (self._rows - len(items))]
    found = self._read(batch_of(rows, width))
    if self._at_once:
      return [x[0, 1:] for x in found]
    return [x[: len(items), 0] for x in found]

  def _first(self, params, process, batch):
    """Returns the law of each row at its first slot that is to be read."""
    objective = self._scorer.objective
    z = jnp.where(batch.loss_mask, objective.mask_id, batch.tokens)
    t = jnp.mean(batch.loss_mask, axis=1, keepdims=True)
    at = jnp.argmax(batch.loss_mask, axis=1)[:, None]
    process = objective.unbiased(process)
    out = self._outputs(params, objective.inputs(process, z, t, batch))
    x0 = jnp.take_along_axis(batch.tokens, at, axis=1)
    return self._law(process, out, x0, t, at - objective.shift)

  def _all(self, params, process, batch):
    """Returns the law at every slot of an autoregressive network."""
    objective = self._scorer.objective
    drawn = objective.draw(process, jax.random.key(0), batch, step=0)
    inputs = objective.inputs(process, drawn.z, drawn.t, batch)
    inputs = inputs.replace(segment_ids=objective.seen(batch))
    out = self._outputs(params, inputs)
    return self._law(process, out, batch.tokens, drawn.t, None)

  def _outputs(self, params, inputs):
    return self._scorer.denoiser.apply(params["model"], inputs, None)[0]

  def _law(self, process, out, x0, t, window):
    objective = self._scorer.objective

    def read(logits, x0, t):
      masked = jnp.full_like(x0, objective.mask_id)
      law = objective.log_x0(process, logits, masked, t)
      picked = jnp.take_along_axis(law, x0[..., None], axis=-1)[..., 0]
      best, ids = lax.top_k(law, self._top)
      return picked, ids, best

    return reduce(read, out, x0, t, window=window)
