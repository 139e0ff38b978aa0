r"""The likelihood bound of held-out text, with its Monte-Carlo standard error.

A pass over the text draws one corruption a row, with times spread evenly over
the rows of a batch, and averages the objective's `bound` over supervised tokens.
Passes are independent, so their spread gives the standard error of their mean:
it is the error of the Monte-Carlo estimate on this text, not that of the text as
a sample of the language.
"""

from collections.abc import Callable, Iterable
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree
import numpy as np

from dllm_jax.core.progress import progress_bar
from dllm_jax.core.types import Batch, Denoiser, Objective, Process


def even(objective: Objective) -> Objective:
  """Returns the objective with times that suit rows in a fixed order.

  Under "stratified" a row always has the times of its own stratum: over passes
  the mean of a fixed text tends to another number than its bound. One offset,
  shared, makes the time of every row uniform.
  """
  if not hasattr(objective, "time_rule"):
    return objective
  return dataclasses.replace(objective, time_rule="shared_offset")


def bound_sums(
  objective: Objective,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  batch: Batch,
) -> Float[Array, "2"]:
  """Returns (nats, tokens) of one batch: a pure function, to be jitted."""
  process = objective.unbiased(process.replace(params=params["process"]))
  objective = even(objective)
  step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)  # annealing is over
  drawn = objective.draw(process, key, batch, step=step)

  def denoise(inputs):
    return denoiser.apply(params["model"], inputs, None)[0]

  loss = objective.loss(process, denoise, drawn, batch, step=step)
  tokens = jnp.sum(batch.loss_mask, dtype=jnp.float32)
  return jnp.stack([jnp.sum(loss.bound), tokens])


def held_out_bound(
  sums: Callable[[Key[Array, ""], Batch], Float[Array, "2"]],
  batches: Iterable[Batch],
  *,
  passes: int,
  seed: int,
  characters_per_token: float,
  progress: bool = False,
) -> dict[str, float]:
  """Returns the bound over all batches and its standard error.

  Args:
    sums: `(key, batch) -> (nats, tokens)`, compiled.
    batches: re-iterable held-out batches.
    passes: independent passes, at least 2.
    seed: the seed of the corruption.
    characters_per_token: mean characters that a token stands for.
    progress: whether to draw a progress bar on standard error.

  Returns:
    `bits_per_token`, `bits_per_char`, `perplexity` (per token), `standard_error`
    (of bits_per_token), `tokens` (held-out tokens scored in one pass), `passes`.

  Raises:
    ValueError: the held-out text has no tokens.
  """
  key = jax.random.key(seed)
  means, tokens = [], 0.0
  bar = progress_bar(passes, "pass", shown=progress)
  with bar:
    for i in range(passes):
      # Sums stay on the device until the pass ends: nothing waits.
      parts = [
        sums(jax.random.fold_in(jax.random.fold_in(key, i), j), batch)
        for j, batch in enumerate(batches)
      ]
      if not parts:
        raise ValueError("the held-out text is empty: raise data.held_out")
      nats, tokens = np.sum(jax.device_get(parts), axis=0, dtype=np.float64)
      if tokens == 0:
        raise ValueError("the held-out text has no tokens to score")
      means.append(nats / tokens)
      bar.update(1)
  bits = np.asarray(means) / math.log(2.0)
  error = float(np.std(bits, ddof=1) / math.sqrt(passes))
  mean = float(np.mean(bits))
  return {
    "bits_per_token": mean,
    "bits_per_char": mean / characters_per_token,
    "perplexity": float(2.0**mean),
    "standard_error": error,
    "tokens": int(tokens),
    "passes": passes,
  }
