"""Launching the sampler: compiled once for each shape, one dispatch a batch."""

import functools
import time

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
  them, or the weights lie in memory twice.
  """
  shapes = jax.eval_shape(denoiser.hold, params)
  if jax.tree.structure(shapes) == jax.tree.structure(params):
    return params
  return compilation.jit(denoiser.hold)(params)


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
      options=compilation.call_options(),
    )
    self._compiled = set()

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
    shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), args)
    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    shape = (tuple(leaves), structure)
    if shape in self._compiled:
      return 0.0
    start = time.perf_counter()
    self.lower(*args).compile()
    seconds = time.perf_counter() - start
    self._compiled.add(shape)
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
    self.compile(params, process, key, requests)
    return self._program(params, process, key, requests)

  def programs(self) -> int:
    """Returns how many programs were compiled and run."""
    return self._program._cache_size()


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
      functools.partial(law_at, sampler, denoiser)
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


def _is_shape(node) -> bool:
  return isinstance(node, tuple) and len(node) == 2 and isinstance(node[1], str)
