"""The training loop: batches in, checkpoints and metrics out.

The device never waits for the host: the next batch is transferred while a step
runs, and the metrics of a step are read only after the next one was started. The
loop is handed `evaluate` and `sample` as callables and knows neither.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar
from dllm_jax.core.types import Batch
from dllm_jax.data import merge_states
from dllm_jax.parallel import distributed
from dllm_jax.parallel.sharding import global_batch
from dllm_jax.parallel.watch import Watch
from dllm_jax.training.checkpoint import Checkpoints
from dllm_jax.training.metrics import Logging, MetricWriter
from dllm_jax.training.program import Program
from dllm_jax.training.step import TrainState
from dllm_jax.training.step_log import Profile, StepLog


class LostDataError(RuntimeError):
  """Files that were there when the run began cannot be read any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
  """What the loop calls besides the train step.

  Attributes:
    evaluate: state -> metrics by name, or None.
    evaluate_every: steps between evaluations; 0 for only at the end.
    adapt: state -> state whose process fits held-out text, or None; after each
      evaluation but the last.
    collect: state -> figures for the log, or None; called before each batch is
      read, which may be made with the state.
    sample: state -> texts, or None.
    sample_every: steps between sample texts; 0 for never.
  """

  evaluate: Callable[[TrainState], dict[str, float]] | None = None
  evaluate_every: int = 0
  adapt: Callable[[TrainState], TrainState] | None = None
  collect: Callable[[TrainState], dict[str, float]] | None = None
  sample: Callable[[TrainState], list[str]] | None = None
  sample_every: int = 0


class _Stop:
  """Turns SIGTERM and the first Ctrl-C into a request to stop after a step.

  In a job of several processes, one that is asked is enough: jax's preemption
  service, which catches SIGTERM itself, makes all agree on the step.
  """

  def __init__(self):
    self.requested = False
    self._several = distributed.store() is not None
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      handlers = {signal.SIGTERM: self._request, signal.SIGINT: self._request}
      if self._several:
        handlers = {signal.SIGINT: self._terminate}
      for number, handler in handlers.items():
        self._previous[number] = signal.signal(number, handler)
    return self

  def after(self, step: int) -> bool:
    """Returns whether to stop after a step, the same on every process."""
    if self._several:
      self.requested = multihost_utils.reached_preemption_sync_point(step)
    return self.requested

  def _terminate(self, number, frame):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def _request(self, number, frame):
    self.requested = True
    # A second Ctrl-C interrupts at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def __exit__(self, *exc):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


@dataclasses.dataclass(kw_only=True)
class Loop:
  """One run: trains, or continues what a working directory holds.

  Attributes:
    program: the compiled step.
    batches: this process's rows of each global batch, with `get_state` and
      `set_state`.
    checkpoints: where to save and to resume from.
    writer: opens the metric files, given the step to resume from.
    steps: the step to reach.
    save_every: steps between checkpoints.
    logging: what to report.
    mesh: the device mesh.
    hooks: evaluation and sampling.
    learning_rate: step -> learning rate, for the log.
    workdir: the run's directory.
    watch: notices that this process or another gets no further.
    model_flops: () -> FLOPs of a step over all devices, for the log.
    profile_steps: the first and last step of a profiler trace under
      `workdir/profile`, or None.
  """

  program: Program
  batches: Iterator[Batch]
  checkpoints: Checkpoints
  writer: Callable[[int], MetricWriter]
  steps: int
  save_every: int
  logging: Logging
  mesh: jax.sharding.Mesh
  hooks: Hooks
  learning_rate: Callable[[int], Any]
  workdir: Path
  watch: Watch
  model_flops: Callable[[], int]
  profile_steps: tuple[int, int] | None = None

  def run(self) -> tuple[TrainState, dict[str, Any]]:
    """Returns the last state and a summary of the run.

    The summary has `step`, `loss_nats_per_token`, `tokens_per_second` and the
    other speeds of `StepLog`, what the last evaluation returned, and
    `interrupted`.

    Raises:
      NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
      LostDataError: data files have disappeared; likewise.
    """
    with self.checkpoints, self.watch:
      return self._run()

  def _run(self) -> tuple[TrainState, dict[str, Any]]:
    restored = self.program.restore(self.checkpoints)
    if restored is None:
      state = self.program.begin(self.checkpoints)
    else:
      state, data_state = restored
      if data_state:
        self.batches.set_state(data_state)
    start = int(state.step)
    writer = self.writer(start)
    shown = self.logging.progress and jax.process_index() == 0
    bar = progress_bar(self.steps, "step", done=start, shown=shown)
    with contextlib.closing(writer), bar, _Stop() as stop:
      return self._steps(state, start, writer, bar, stop)

  def _steps(self, state, start, writer, bar, stop):
    log = StepLog(
      writer=writer,
      bar=bar,
      due=lambda step: (
        step % self.logging.every_steps == 0 or step == self.steps
      ),
      learning_rate=self.learning_rate,
      devices=list(self.mesh.devices.flat),
      model_flops=self.model_flops,
    )
    summary: dict[str, Any] = {}
    step, saved, batch = start, start, None
    profile = Profile(self.workdir / "profile", self.profile_steps)
    if step < self.steps and distributed.store() is not None:
      # Collectives wait for a process that still compiles, but not for long.
      batch = self._next(state, step, log, writer)
      self.watch.at(step, "compiling")
      self.program.step.lower(state, batch).compile()
      distributed.exchange("compiled")
    while step < self.steps and not stop.after(step):
      if batch is None:
        batch = self._next(state, step, log, writer)
      state = self._adapted(state, step, log)
      self.watch.at(step, "training")
      profile.before(step + 1)
      state, metrics = self.program.step(state, batch)
      step += 1
      profile.after(step, metrics)
      # While the step runs: the state of the iterator that goes with it, then
      # the transfer of the next batch, then the metrics of the step before.
      data_state = self.batches.get_state()
      more = step < self.steps
      batch = self._next(state, step, log, writer) if more else None
      self.watch.at(step, "training")
      log.push(step, metrics)
      if step % self.save_every == 0 or step == self.steps:
        log.flush()  # raises rather than save a state that is not finite
        self._save(step, state, data_state, writer)
        saved = step
      summary.update(self._hooks(state, step, log, writer, stop))
    log.flush()
    if saved != step:
      self._save(step, state, data_state, writer)
    profile.close()
    self.watch.at(step, "saving")
    self.checkpoints.wait()
    return state, {
      "step": step,
      **log.summary,
      **summary,
      "interrupted": step < self.steps,
    }

  def _next(self, state, step, log, writer) -> Batch:
    self._collect(state, step, log, writer)
    self.watch.at(step, "reading data")
    try:
      batch = next(self.batches)
    except OSError as error:
      raise LostDataError(
        f"the data cannot be read after step {step} ({error}); the last "
        "checkpoint is kept: bring the files back and run again"
      ) from error
    return global_batch(batch, self.mesh)

  def _collect(self, state, step, log, writer) -> None:
    """Lets the next batch be made with the state."""
    if self.hooks.collect is None:
      return
    self.watch.at(step, "sampling")
    with log.paused():
      figures = self.hooks.collect(state)
    if figures:
      writer.write(step, figures)
      log.show(figures)

  def _save(self, step, state, data_state, writer) -> None:
    """Starts to save; of the data, what all processes together know."""
    self.watch.at(step, "saving")
    writer.flush()
    self.checkpoints.save(
      state,
      merge_states(distributed.exchange(data_state)),
      trains=self.program.trains,
    )

  def _adapted(self, state, step, log) -> TrainState:
    """Returns the state to take a step from.

    Before the step, not after the evaluation: the checkpoint between them is
    then the same whether the run goes on or is resumed.
    """
    every = self.hooks.evaluate_every
    if self.hooks.adapt is None or not every or not step or step % every:
      return state
    log.flush()
    self.watch.at(step, "evaluating")
    with log.paused():
      return self.hooks.adapt(state)

  def _hooks(self, state, step, log, writer, stop) -> dict[str, Any]:
    """Runs evaluation and sampling where they are due."""
    hooks, result, last = self.hooks, {}, step == self.steps
    if stop.requested:
      return result
    due = hooks.evaluate_every and step % hooks.evaluate_every == 0
    if hooks.evaluate is not None and (due or last):
      log.flush()
      self.watch.at(step, "evaluating")
      with log.paused():
        result = hooks.evaluate(state)
      writer.write(step, result)
      log.show(result)
    due = hooks.sample_every and step % hooks.sample_every == 0
    if hooks.sample is not None and due:
      log.flush()
      self.watch.at(step, "sampling")
      with log.paused():
        texts = hooks.sample(state)
      writer.write(step, {"sample": "\n---\n".join(texts)})
      log.text(step, texts)
    return result
