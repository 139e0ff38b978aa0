"""Alignment with preferences: a run that begins with another one.

The reference is asked first, once; then the loop trains on pairs and on what it
said of them.
"""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.data.conversations import load_preferences, Preferences
from dllm_jax.parallel import distributed, row_share
from dllm_jax.posttraining import likelihood, preferences, reference
from dllm_jax.posttraining.preferences import HELD_OUT, PairBatches
from dllm_jax.posttraining.train import train
from dllm_jax.posttraining.vrpo import accuracy, Preference, VRPO
from dllm_jax.run.begin import begin
from dllm_jax.run.run import Run
from dllm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
  """A run that preferences train, and what they are measured against.

  Attributes:
    run: the run, as `begin` returns it.
    method: the loss.
    pairs: preferences, `train` and `held_out`.
    reference: what the reference says of them.
    reference_run: the reference.
  """

  run: Run
  method: VRPO
  pairs: Preferences
  reference: reference.Reference
  reference_run: Run

  @classmethod
  def create(
    cls,
    source: Run,
    output: str | os.PathLike,
    resolved: ConfigDict,
    method: VRPO,
    *,
    reference_run: Run | None = None,
  ) -> "Alignment":
    """Returns an alignment, new or already begun.

    Args:
      source: the run to begin with.
      output: the directory of the new one.
      resolved: its configuration; `data` names the preferences.
      method: the loss.
      reference_run: the reference; by default the source.

    Raises:
      ValueError: what was given does not fit; nothing is written then.
      FileNotFoundError: there are no preferences, or no checkpoint.
    """
    reference_run = reference_run or source
    _check(source, reference_run)
    config = configs.parse(resolved)
    with distributed.together():
      pairs = load_preferences(config.data, source.tokenizer)
    run = begin(source, output, resolved, method)
    training = config.training
    epochs = -(-training.steps * training.batch_size // len(pairs.train))
    noises = range(min(method.noise_sets, epochs))
    told = {
      "reference": os.fspath(paths.absolute(reference_run.workdir)),
      "pairs": preferences.checksum([*pairs.train, *pairs.held_out]),
    }
    return cls(
      run=run,
      method=method,
      pairs=pairs,
      reference=reference.Reference(
        run.workdir,
        told,
        dict.fromkeys(noises, pairs.train) | {HELD_OUT: pairs.held_out},
        method.samples,
      ),
      reference_run=reference_run,
    )

  def describe(self) -> str:
    """Returns one line on what is to be done."""
    training, n = self.run.config.training, len(self.pairs.train)
    return (
      f"{self.run.resolved.objective.name} on {self.run.resolved.data.path}: "
      f"{n} pairs, {len(self.pairs.held_out)} held out, {training.steps} steps"
      f" of {training.batch_size} ({training.steps * training.batch_size / n:.1f}"
      f" epochs), {self.method.samples} samples an answer"
    )

  @property
  def loss(self) -> Preference:
    """What is trained with."""
    seed = self.run.config.training.seed
    return Preference(
      objective=self.run.objective, method=self.method, seed=seed
    )

  def ask_reference(self) -> None:
    """Asks the reference for what it has not said yet, and keeps it."""
    if all(distributed.exchange(self.reference.complete)):
      return
    run = self.reference_run
    state = run.load()
    ask = reference.asker(
      self.loss, run.objective, run.denoiser, self.run.mesh, reference=True
    )
    self.reference.ask(
      int(state.step),
      lambda batch: ask(state.eval_params, state.process, batch),
      self._parts,
    )

  def train(self) -> dict[str, Any]:
    """Trains, or continues, to the configured step; returns a summary."""
    self.ask_reference()
    run, training = self.run, self.run.config.training
    length = run.config.data.length
    batches = PairBatches(
      self.pairs.train,
      self.reference.table(),
      batch_size=training.batch_size,
      length=length,
      seed=training.seed,
      share=row_share(run.mesh),
    )
    return train(
      run,
      self.loss,
      batches=batches,
      blank=preferences.blank_pairs(
        training.batch_size, length, self.method.samples
      ),
      evaluate=self._evaluate() if self.pairs.held_out else None,
    )

  def _evaluate(self):
    """Returns state -> figures of the held-out pairs."""
    run = self.run
    ask = reference.asker(
      self.loss, run.objective, run.denoiser, run.mesh, reference=False
    )

    table = self.reference.table(HELD_OUT)
    tokens = preferences.answer_tokens(self.pairs.held_out)

    def evaluate(state: TrainState) -> dict[str, float]:
      nats = [
        ask(state.eval_params, state.process, batch)[:count]
        for _, count, batch in self._parts(self.pairs.held_out, HELD_OUT)
      ]
      scores = self.method.scores(np.concatenate(nats) - table, tokens)
      score = np.mean(scores, axis=-1)
      losses = self.method.pair_losses(score)
      return {
        "eval_accuracy": float(accuracy(score)),
        "eval_score": float(np.mean(score)),
        "eval_pair_loss": float(np.mean(losses)),
      }

    return evaluate

  def _parts(self, pairs, noise):
    """Returns `reference.parts`, as many pairs at once as a train step has."""
    training = self.run.config.training
    return reference.parts(
      pairs,
      noise,
      self.method.samples,
      self.run.mesh,
      size=training.batch_size // training.microbatches,
      length=self.run.config.data.length,
    )


def _check(source: Run, reference_run: Run) -> None:
  """Checks that a reference can be asked of what the policy is.

  Raises:
    ValueError: it cannot.
  """
  for run in (source, reference_run):
    likelihood.check_objective(run.objective)
  if source.tokenizer != reference_run.tokenizer:
    raise ValueError(
      f"the reference {reference_run.workdir} has another vocabulary"
      f" ({reference_run.tokenizer.vocab_size} tokens) than {source.workdir}"
      f" ({source.tokenizer.vocab_size}): take one that began with the same"
      " tokenizer"
    )
