"""The programs of an engine, compiled, and the state that they hand on."""

from collections.abc import Sequence
import functools
import time

import jax
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Denoiser, Process
from dllm_jax.parallel import compilation
from dllm_jax.sampling import requests
from dllm_jax.sampling.program import check_network
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.slots import admit, advance, empty, Model, View

_LEAST = 32  # slots of a prompt that are worth a program of their own


class Program:
  """Rows on the devices, and what can be done with them.

  Attributes:
    sampler: how it samples.
    rows: how many there are.
    widths: of prompts that are put into an exact cache, in ascending order.
    mesh: what the rows are divided over.
  """

  def __init__(
    self,
    sampler: Sampler,
    denoiser: Denoiser,
    params: PyTree,
    process: Process,
    *,
    rows: int,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
  ):
    check_network(sampler, denoiser)
    self.sampler, self.rows, self.mesh = sampler, rows, mesh
    self.widths = _widths(sampler)
    self._denoiser, self._state = denoiser, None
    with jax.set_mesh(mesh):
      made = lambda params, process, key: Model(
        sampler, denoiser, params, process, key
      )
      launch = functools.partial(compilation.jit, mesh=mesh)
      self._empty = launch(lambda held, blank: empty(made(*held), blank))
      self._admit = launch(
        lambda width, held, *rest: admit(made(*held), *rest, width=width),
        static_argnums=0,
        donate_argnums=2,
      )
      self._advance = launch(
        lambda held, *rest: advance(made(*held), *rest), donate_argnums=1
      )
      self._held = _held(denoiser, params), process, jax.random.key(seed)

  def compile(self) -> float:
    """Compiles everything, by doing everything once; returns the seconds."""
    start = time.perf_counter()
    self.reset()
    for width in (0, *self.widths):
      self.admit(self.blank, row=0, width=width)
    self.advance()
    self.reset()
    return time.perf_counter() - start

  @property
  def blank(self) -> requests.Requests:
    """A request for nothing, which frees a row."""
    return requests.blank(1, self.sampler.length)

  def reset(self) -> None:
    """Frees all rows and forgets them."""
    self._state = None
    blank = requests.blank(self.rows, self.sampler.length)
    with jax.set_mesh(self.mesh):
      self._state = self._empty(self._held, blank)

  def admit(
    self,
    request: requests.Requests,
    *,
    row: int,
    source: int | None = None,
    start: int = 0,
    width: int = 0,
  ) -> None:
    """Puts a request into a row; see `slots.admit`."""
    source = row if source is None else source
    numbers = (np.int32(n) for n in (row, source, start))
    with jax.set_mesh(self.mesh):
      self._state = self._admit(
        width, self._held, self._state, request, *numbers
      )

  def advance(self, most: int = 1) -> View:
    """Returns how all rows are after network calls; see `slots.advance`."""
    with jax.set_mesh(self.mesh):
      self._state, view = self._advance(self._held, self._state, np.int32(most))
    return jax.tree.map(np.asarray, jax.device_get(view))

  def programs(self) -> int:
    """Returns how many programs were compiled and run."""
    made = self._empty, self._admit, self._advance
    return sum(program._cache_size() for program in made)


def _held(denoiser: Denoiser, params: PyTree) -> PyTree:
  """Returns parameters as programs hold them; copies none if they do so already."""
  shapes = jax.eval_shape(denoiser.hold, params)
  if jax.tree.structure(shapes) == jax.tree.structure(params):
    return params
  return compilation.jit(denoiser.hold)(params)


def _widths(sampler: Sampler) -> Sequence[int]:
  """Returns the widths of prompts that are compiled: each twice the one before."""
  if sampler.cache != "block":
    return ()
  block, width, widths = sampler.block_length, _LEAST, []
  while width < sampler.length:
    widths.append(-(-width // block) * block)
    width *= 2
  return (*(w for w in widths if w < sampler.length), sampler.length)
