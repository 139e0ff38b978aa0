"""Log-probabilities of prompts: texts that are read, one at a time.

In a thread of its own, beside the engine's: a text of a masked model takes as many
rows of the network as it has tokens. Programs are compiled when a canvas is first
asked for.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
import functools
import threading
from typing import Any

from dllm_jax.evaluation.likelihood import estimators
from dllm_jax.evaluation.likelihood.reading import estimator, Reader, Reading
from dllm_jax.evaluation.likelihood.scorer import Scorer
from dllm_jax.parallel import distributed
from dllm_jax.run.run import Run
from dllm_jax.serving.http.limits import Refusal

_WAITING = 64  # requests whose prompts wait, at most
_LOOK_SECONDS = 0.5  # between two looks at whether a client is there


class Readings:
  """Reads the prompts of requests, those that came first.

  Args:
    run: whose network.
    rows: of a call, about.
    top: how many of the likeliest tokens are told beside each.
    state: whose parameters; by default the newest checkpoint's.
    use_ema: whether to use averaged parameters where there are any.
  """

  def __init__(
    self,
    run: Run,
    *,
    rows: int,
    top: int,
    state: Any = None,
    use_ema: bool = True,
  ):
    self._run, self._rows, self._top = run, rows, top
    self._state, self._use_ema = state, use_ema
    self._thread = futures.ThreadPoolExecutor(1, "readings")
    self._waiting = 0

  def check(self) -> None:
    """Raises Refusal unless prompts can be read."""
    if distributed.store() is not None:
      raise Refusal(
        "prompts are not read on several hosts: leave out echo or logprobs",
        param="logprobs",
      )
    try:
      estimators.choose(self._run.objective, estimator(self._run.objective))
    except ValueError as error:
      raise Refusal(
        f"echo with logprobs: {error}. `dllm harness` estimates likelihoods of "
        "such a model",
        param="logprobs",
      ) from error

  async def __call__(
    self,
    prompts: Sequence[Sequence[int]],
    look: Callable[[], Awaitable[None]],
  ) -> list[Reading]:
    """Returns what the network holds of prompts.

    Where the caller is cancelled or `look` raises, nobody wants them any more:
    the next call of the network is not made.

    Args:
      prompts: token ids.
      look: called now and then, to see whether their client has left.

    Raises:
      Refusal: too many wait.
    """
    if self._waiting >= _WAITING:
      raise Refusal(
        f"{self._waiting} requests wait for their prompts to be read: try again "
        "later",
        status=429,
        code="queue_full",
        headers={"Retry-After": "5"},
      )
    gone = threading.Event()
    read = functools.partial(self._read, prompts, gone.is_set)
    self._waiting += 1
    loop = asyncio.get_running_loop()
    reading = loop.run_in_executor(self._thread, read)
    reading.add_done_callback(self._over)
    try:
      while not reading.done():
        await asyncio.wait([reading], timeout=_LOOK_SECONDS)
        await look()
      return reading.result()
    finally:
      gone.set()

  def _over(self, reading: asyncio.Future) -> None:
    self._waiting -= 1
    if not reading.cancelled():
      reading.exception()  # it may be nobody's any more

  def _read(
    self, prompts: Sequence[Sequence[int]], gone: Callable[[], bool]
  ) -> list[Reading]:
    return [self._reader(prompt, gone=gone) for prompt in prompts]

  @functools.cached_property
  def _reader(self) -> Reader:
    run = self._run
    state = run.state if self._state is None else self._state
    scorer = Scorer(
      objective=run.objective,
      denoiser=run.denoiser,
      params=state.eval_params if self._use_ema else state.params,
      process=state.process,
      mesh=run.mesh,
      estimator=estimator(run.objective),
    )
    return Reader(scorer, rows=self._rows, top=self._top)
