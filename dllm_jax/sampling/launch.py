"""Launching the sampler: compiled once for each shape, one dispatch a batch."""

from collections.abc import Hashable
import functools
import time
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Key, PyTree

from dllm_jax.core.types import Denoiser, Process
from dllm_jax.parallel import compilation
from dllm_jax.sampling.program import generate, Generation, law_at
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.sampling.step import NoiseAt


def held(denoiser: Denoiser, params: PyTree) -> PyTree:
  """Returns parameters as programs hold them (`Denoiser.hold`), outside of any.

  Those that are held so already are the same arrays. Others are copied: let go of
  them, or the weights lie in memory twice. Of abstract parameters, abstract ones.
  """
  shapes = jax.eval_shape(denoiser.hold, params)
  if jax.tree.structure(shapes) == jax.tree.structure(params):
    return params
  program = compilation.jit(denoiser.hold)
  if not isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    return program(params)
  made = program.lower(params).compile()
  placed = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  return jax.tree.map(placed, shapes, made.output_shardings)


class Launcher:
  """A sampler that is ready to run.

  Calling it returns as soon as the program is dispatched; wait for the tokens
  to measure it. The first call of a shape compiles, which `compile_seconds`
  counts apart.

  Attributes:
    sampler: how it samples.
    compile_seconds: time spent on tracing and compiling so far.
  """

  def __init__(
    self,
    sampler: Sampler,
    denoiser: Denoiser,
    *,
    trace: bool = False,
    noise: NoiseAt | None = None,
  ):
    self.sampler = sampler
    self.compile_seconds = 0.0
    self._program = compilation.jit(
      functools.partial(generate, sampler, denoiser, trace=trace, noise=noise),
      dtype=denoiser.dtype,
      options=compilation.call_options(),
    )
    self._compiled: dict[Any, jax.stages.Compiled] = {}

  def lower(
    self,
    params: PyTree,
    process: Process,
    key: Key[Array, ""],
    requests: Requests,
  ) -> jax.stages.Lowered:
    """Returns the program of some shapes, not yet compiled."""
    return self._program.lower(params, process, key, requests)

  def compile(
    self,
    params: PyTree,
    process: Process,
    key: Key[Array, ""],
    requests: Requests,
  ) -> float:
    """Compiles for the shapes of the arguments; returns the seconds it took.

    Raises:
      ValueError: the requests do not fit the sampler.
    """
    args = (params, process, key, requests)
    shapes = _shapes(args)
    if shapes in self._compiled:
      return 0.0
    start = time.perf_counter()
    self._compiled[shapes] = self.lower(*args).compile()
    seconds = time.perf_counter() - start
    self.compile_seconds += seconds
    return seconds

  def __call__(
    self,
    params: PyTree,
    process: Process,
    key: Key[Array, ""],
    requests: Requests,
  ) -> Generation:
    """Returns samples of a batch of requests; see `program.generate`."""
    args = (params, process, key, requests)
    self.compile(*args)
    return self._compiled[_shapes(args)](*args)

  def programs(self) -> int:
    """Returns how many programs were compiled."""
    return len(self._compiled)


class Looker:
  """A network that is asked what tokens it holds likely at some slots.

  One call on whole canvases, at time 1 where it is told the time: everything
  that is free is masked, or drawn from the prior where nothing masks.

  Attributes:
    sampler: of the canvas; its policy takes no step.
  """

  def __init__(self, sampler: Sampler, denoiser: Denoiser):
    self.sampler = sampler
    self._program = compilation.jit(
      functools.partial(law_at, sampler, denoiser), dtype=denoiser.dtype
    )

  def __call__(
    self,
    params: PyTree,
    process: Process,
    requests: Requests,
    slots: Int[Array, "B Q"],
    ids: Int[Array, "B Q N"],
  ) -> Float[Array, "B Q N"]:
    """Returns the log-probability of tokens at slots, nats."""
    return self._program(
      params, process, jax.random.key(0), requests, slots, ids
    )


def _shapes(args: PyTree) -> Hashable:
  """Returns what a program is compiled for, of arrays or abstract ones."""

  def of(x):
    free = not getattr(x, "committed", True)
    return x.shape, str(x.dtype), None if free else getattr(x, "sharding", None)

  leaves, structure = jax.tree.flatten(args)
  return tuple(map(of, leaves)), structure
