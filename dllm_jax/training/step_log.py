"""What a run tells of itself while it trains: losses, speed, use of the machine.

Metrics are read one step late, so that the device never waits for the log. All
times are of the host's clock, between the ends of consecutive steps.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import resource
import sys
import time
from typing import Any
import warnings

import jax
import numpy as np
from tqdm import tqdm

from dllm_jax.core.files import local_folder
from dllm_jax.core.paths import Path
from dllm_jax.parallel.hardware import peak_flops
from dllm_jax.training.metrics import MetricWriter

_WINDOW = 200  # steps of which percentiles are told

_LOST = 0.5  # share of updates


class NonFiniteLossError(RuntimeError):
  """The loss or its gradient is not a number any more."""


@dataclasses.dataclass(kw_only=True)
class StepLog:
  """Reads metrics one step late and reports them at a cadence.

  Besides what the step returns, each report has

  - `tokens_per_second`, supervised tokens since the start, evaluation, sampling
    and compilation apart, and `tokens_per_second_per_device`;
  - `step_milliseconds_p50`, `_p90`, `_p99`: percentiles of the last 200 steps;
  - `mfu`: model FLOPs a second over the devices' published peak (appendix B of
    arXiv:2204.02311: no recomputation, median step); left out where the peak is
    not known;
  - `goodput`: steps that lasted x their median time / all the time that the run
    was up, over every start of it: compilation, evaluation, waiting for data or
    a disk and steps lost to a failure count against it; the time between the
    end of a process and the next start is not known and does not count;
  - `peak_bytes`: the most memory that was in use on this host's fullest device,
    or, where devices do not tell (CPU), by this process.

  Attributes:
    writer: takes the reports.
    bar: the progress bar.
    due: step -> whether to report it.
    learning_rate: step -> learning rate.
    devices: the devices of the mesh.
    model_flops: () -> FLOPs of a step over all devices.
    summary: what the run's last line says of its speed.
  """

  writer: MetricWriter
  bar: tqdm
  due: Callable[[int], bool]
  learning_rate: Callable[[int], Any]
  devices: Sequence[jax.Device]
  model_flops: Callable[[], int]
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self._pending: tuple[int, dict[str, Any]] | None = None
    self._began = time.perf_counter()
    self._last: float | None = None  # end of the step before
    self._steps: list[float] = []  # seconds of each step but the first
    self._tokens = 0.0
    peak = peak_flops(self.devices[0].device_kind)
    # Seconds of a step at the peak.
    self._ideal = peak and self.model_flops() / (peak * len(self.devices))

  def push(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step that may still run; reports the one before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Reports the pending step, waiting for it.

    Raises:
      NonFiniteLossError: its loss or gradient is not finite.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    loss, norm = metrics["loss_nats_per_token"], metrics["gradient_norm"]
    if not np.isfinite(loss) or not np.isfinite(norm):
      raise NonFiniteLossError(
        f"the loss is not finite at step {step} (loss {loss}, gradient norm "
        f"{norm}); the last checkpoint before it is kept: lower "
        "optimizer.learning_rate or set optimizer.clip_norm, then run again"
      )
    now = time.perf_counter()
    if self._last is not None:  # The first step's time is compilation.
      self._steps.append(now - self._last)
      self._tokens += metrics["tokens"]
    if self._last is None:
      _warn_of_lost(metrics.get("lost_updates", 0.0))
    self._last = now
    rate = self._tokens / max(sum(self._steps), 1e-9)
    bits = metrics["bound_nats_per_token"] / np.log(2.0)
    self.bar.set_postfix_str(
      f"{bits:.3f} bits/token, {rate:,.0f} token/s", refresh=False
    )
    self.bar.update(1)
    self.summary = {"loss_nats_per_token": loss, "tokens_per_second": rate}
    if self.due(step):
      speed = self._speed(rate)
      self.summary |= speed
      rates = {"learning_rate": float(self.learning_rate(step - 1))}
      self.writer.write(step, {**metrics, **rates, **speed})

  def _speed(self, rate: float) -> dict[str, float]:
    """Returns the figures of the class's docstring."""
    spent = self.writer.spent
    wall = spent.wall_seconds + time.perf_counter() - self._began
    speed = {
      "tokens_per_second": rate,
      "tokens_per_second_per_device": rate / len(self.devices),
      "peak_bytes": _peak_bytes(self.devices),
      "wall_seconds": wall,
    }
    if not self._steps:
      return speed
    median = float(np.median(self._steps))
    useful = spent.useful_seconds + (1 + len(self._steps)) * median
    percentiles = np.percentile(self._steps[-_WINDOW:], (50, 90, 99))
    for name, seconds in zip(("p50", "p90", "p99"), percentiles, strict=True):
      speed[f"step_milliseconds_{name}"] = 1000 * float(seconds)
    if self._ideal:
      speed["mfu"] = self._ideal / median
    return speed | {"useful_seconds": useful, "goodput": useful / wall}

  @contextlib.contextmanager
  def paused(self):
    """Leaves the time of a block out of the steps' times."""
    start = time.perf_counter()
    yield
    if self._last is not None:
      self._last += time.perf_counter() - start

  def show(self, values: dict[str, Any]) -> None:
    """Prints an evaluation above the bar."""
    text = ", ".join(
      f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)
    )
    self._print(f"evaluation: {text}")

  def text(self, step: int, texts: list[str]) -> None:
    """Prints samples above the bar."""
    self._print(f"samples at step {step}:\n" + "\n---\n".join(texts))

  def _print(self, line: str) -> None:
    if not self.bar.disable:
      self.bar.write(line, file=self.bar.fp)


def _warn_of_lost(share: float) -> None:
  """Says after the first step that parameters do not move."""
  if share > _LOST:
    warnings.warn(
      f"{share:.0%} of the first updates are lost, being smaller than bfloat16"
      " can add: set optimizer.rounding to none (float32 masters) or stochastic",
      stacklevel=2,
    )


def _peak_bytes(devices: Sequence[jax.Device]) -> int:
  local = [d for d in devices if d.process_index == jax.process_index()]
  stats = [device.memory_stats() for device in local]
  known = [s["peak_bytes_in_use"] for s in stats if s]
  if known:
    return max(known)
  # Linux tells kibibytes, macOS bytes.
  unit = 1 if sys.platform == "darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Profile:
  """A profiler trace of some steps, which Perfetto and XProf open.

  Written under `directory`, one trace for each process; `perfetto_trace.json.gz`
  inside opens at ui.perfetto.dev.
  """

  def __init__(self, directory: Path, steps: tuple[int, int] | None):
    """Traces steps[0] to steps[1], both of them included; None for never."""
    self._directory = directory
    self._first, self._last = steps or (0, -1)
    self._running = False
    self._open = contextlib.ExitStack()

  def before(self, step: int) -> None:
    """Starts where this step is the first."""
    if self._first <= step <= self._last and not self._running:
      folder = self._open.enter_context(local_folder(self._directory))
      jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
      self._running = True

  def after(self, step: int, metrics: Any) -> None:
    """Stops after the last step, once the device has done it."""
    if self._running and step >= self._last:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Writes the trace if one is under way."""
    if self._running:
      jax.profiler.stop_trace()
      self._open.close()
      self._running = False
