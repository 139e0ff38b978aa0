"""Held-out text: its bound under a state, and what a process learns of it."""

from collections.abc import Callable, Iterable
import dataclasses
import functools

import jax

from dllm_jax import data
from dllm_jax.core import check
from dllm_jax.core.types import Batch, Denoiser, Objective
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import global_batch, row_share
from dllm_jax.training import adaptation, bound
from dllm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """How held-out text is evaluated while training and after.

  Attributes:
    every_steps: training steps between evaluations; 0 for only at the end.
    batch_size: rows in a batch.
    batches: held-out batches that evaluations while training read; 0 for all.
    passes: passes over the text, each with its own corruption; at least 2, for
      the standard error.
    seed: the seed of the corruption, the same for every evaluation.
    sample_every: training steps between sample texts; 0 for never.
  """

  every_steps: int = 0
  batch_size: int = 32
  batches: int = 0
  passes: int = 4
  seed: int = 0
  sample_every: int = 0

  def __post_init__(self):
    if self.passes < 2:
      raise ValueError(
        "evaluation.passes must be at least 2 (the standard error needs two), "
        f"not {self.passes}"
      )
    check.at_least(self, 1, "batch_size", prefix="evaluation.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """The held-out text of a run; its methods want the mesh to be set.

  Attributes:
    corpus: the text.
    objective: how to corrupt and score.
    denoiser: the network.
    evaluation: batches, passes and seed.
    mesh: the device mesh.
  """

  corpus: "data.Corpus"
  objective: Objective
  denoiser: Denoiser
  evaluation: Evaluation
  mesh: jax.sharding.Mesh

  def bound(
    self,
    state: TrainState,
    *,
    use_ema: bool = True,
    limit: int | None = None,
    passes: int | None = None,
    progress: bool = False,
  ) -> dict[str, float]:
    """Returns the likelihood bound (`bound.held_out_bound`).

    Of conversations it is that of the answers, by their own tokens and
    characters: what fills rows and counts is predicted too, and adds its nats,
    since it tells where an answer ends, but no tokens.

    Args:
      state: whose parameters.
      use_ema: whether to use averaged parameters where there are any.
      limit: at most so many batches; None for all.
      passes: independent passes; None for the configured number.
      progress: whether to draw a progress bar on standard error.

    Raises:
      ValueError: nothing is held out.
    """
    size = self.corpus.held_out_text
    if size is None:
      raise ValueError(
        "nothing is held out: set config.data.held_out above 0, or "
        "config.data.held_out_path"
      )
    params = state.eval_params if use_ema else state.params
    figures = bound.held_out_bound(
      lambda key, batch: self._sums(
        params, state.process, key, global_batch(batch, self.mesh)
      ),
      self._batches(limit),
      passes=passes or self.evaluation.passes,
      seed=self.evaluation.seed,
      characters_per_token=size.characters_per_token,
      progress=progress,
    )
    return _of_text(figures, self.corpus.text_share)

  def while_training(self, state: TrainState) -> dict[str, float]:
    """Returns what the metrics log has of an evaluation."""
    figures = self.bound(state, limit=self.evaluation.batches or None)
    names = ("bits_per_token", "bits_per_char", "standard_error")
    return {f"eval_{name}": figures[name] for name in names}

  def adapt(self, state: TrainState) -> TrainState:
    """Returns the state with its process adapted to the text."""
    measured = adaptation.summed(
      lambda key, batch: self._measures(
        state.eval_params, state.process, key, global_batch(batch, self.mesh)
      ),
      self._batches(self.evaluation.batches or None),
      seed=self.evaluation.seed,
    )
    return adaptation.adapted(self.objective, state, measured)

  @functools.cached_property
  def _sums(self):
    def sums(params, process, key, batch):
      return bound.bound_sums(
        self.objective, self.denoiser, params, process, key, batch
      )

    return self._program(sums)

  @functools.cached_property
  def _measures(self):
    measures = adaptation.measures(self.objective, self.denoiser)
    return self._program(measures)

  def _program(self, fn: Callable) -> Callable:
    return compilation.jit(fn, mesh=self.mesh, dtype=self.denoiser.dtype)

  def _batches(self, limit: int | None) -> Iterable[Batch]:
    share = row_share(self.mesh)
    return data.held_out_batches(
      self.corpus,
      batch_size=self.evaluation.batch_size,
      limit=limit,
      process_index=share.index,
      process_count=share.count,
    )


def _of_text(figures: dict[str, float], share: float) -> dict[str, float]:
  """Returns a bound by token of text, where so many of the tokens are text."""
  if share == 1.0:
    return figures
  bits = figures["bits_per_token"] / share
  return figures | {
    "bits_per_token": bits,
    "bits_per_char": figures["bits_per_char"] / share,
    "perplexity": 2.0**bits,
    "standard_error": figures["standard_error"] / share,
    "tokens": round(figures["tokens"] * share),
  }
