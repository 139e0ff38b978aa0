"""The programs of an engine, compiled, and the state that they hand on."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import time

import jax
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.axes import BATCH_AXES
from dllm_jax.core.mask import Full
from dllm_jax.core.types import Denoiser, Process
from dllm_jax.parallel import compilation
from dllm_jax.sampling import requests
from dllm_jax.sampling.constraints.arrays import Followed, placed, Room
from dllm_jax.sampling.launch import held
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.policies.rows import Options
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.program import check_network
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.slots import (
  admit,
  advance,
  empty,
  Model,
  move,
  renew,
  View,
)

_LEAST = 32  # slots of a prompt that are worth a program of their own


def check_served(sampler: Sampler) -> None:
  """Raises ValueError unless rows can come and go under a sampler."""
  if isinstance(sampler.policy, Speculation):
    raise ValueError(
      "drafts are not served: use sampler.preset 'autoregressive', which has the"
      " same texts, or `dllm sample`"
    )
  both_ways = isinstance(sampler.objective.mask_spec, Full)
  both_ways &= not (sampler.objective.opens or sampler.objective.two_passes)
  if sampler.slides or (sampler.cache == "block" and both_ways):
    raise ValueError(
      "what is kept behind a sliding window, or of blocks that are read both"
      " ways, is not served: use sampler.cache 'none'"
    )
  if sampler.objective.opens:
    raise ValueError(
      "blocks that open with a token of their own (Fast-dLLM v2, Nemotron) are"
      " not served: use `dllm sample`"
    )


Progress = Callable[[int, int], None]
"""Is told the number of a program that compiles next, and how many there are."""


class Program:
  """Rows on the devices, and what can be done with them.

  Attributes:
    sampler: how it samples.
    rows: how many there are.
    widths: of prompts that are put into an exact cache, in ascending order.
    counts: of rows that take part in network calls, in ascending order.
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
    defaults: RowOptions = RowOptions(),
    end_ids: Sequence[int] = (),
    counts: Sequence[int] | None = None,
    room: Room | None = None,
  ):
    """Makes the programs, which compile when `compile` is called.

    Args:
      sampler: how to sample.
      denoiser: the network.
      params: its parameters.
      process: the arrays of the objective.
      rows: how many run at once.
      mesh: what they are divided over.
      defaults: what rows choose that say nothing else, `SamplerConfig.options`.
      end_ids: what ends the texts of rows that name no ends, also where the
        sampler would write on behind it.
      counts: of rows that programs are compiled for; by default 1, a quarter, half
        and all of them, where the first rows lie together.
      room: of the languages that rows may choose; None for none.

    Raises:
      ValueError: the network cannot fill the sampler's cache, the sampler's rows
        cannot come and go, or there is no row.
    """
    if rows < 1:
      raise ValueError(f"an engine needs at least 1 slot, not {rows}")
    check_served(sampler)
    check_network(sampler, denoiser)
    if room is not None:
      sampler.check_languages()
    self._room = room
    self.sampler, self.rows, self.mesh = sampler, rows, mesh
    self.widths = _widths(sampler)
    self.counts = counts or _counts(sampler, rows, mesh)
    self._defaults, self._end_ids, self._state = defaults, end_ids, None
    with jax.set_mesh(mesh):
      made = functools.partial(Model, sampler, denoiser)
      launch = functools.partial(
        compilation.jit, mesh=mesh, dtype=denoiser.dtype
      )
      self._empty = launch(lambda held, blank: empty(made(*held), blank))
      self._admit = launch(
        lambda width, held, *rest: admit(made(*held), *rest, width=width),
        static_argnums=0,
        donate_argnums=2,
      )
      self._renew = launch(
        lambda held, slots: renew(made(*held), slots), donate_argnums=1
      )
      self._advance = launch(
        lambda rows, held, *rest: advance(made(*held), *rest, rows=rows),
        static_argnums=0,
        donate_argnums=2,
        options=compilation.call_options(mesh),
      )
      self._move = launch(move, donate_argnums=0)
      self._held = held(denoiser, params), process

  def compile(self, before: Progress = lambda number, count: None) -> float:
    """Compiles everything, by doing everything once; returns the seconds.

    Args:
      before: called before each program with its number, from 1, and how many
        there are; what it raises ends this.
    """
    start = time.perf_counter()
    self.reset()
    admit = functools.partial(self.admit, self.blank, row=0)
    programs = [
      *(functools.partial(admit, width=width) for width in (0, *self.widths)),
      *(functools.partial(self._first, count) for count in self.counts),
      functools.partial(self.move, 0, self.rows - 1),
    ]
    for number, program in enumerate(programs, 1):
      before(number, len(programs))
      program()
    self.reset()
    return time.perf_counter() - start

  def _first(self, count: int) -> None:
    """Runs a call that makes what an approximate cache keeps."""
    self._due = self._approximate
    self.advance(count)

  @property
  def _approximate(self) -> bool:
    return self.sampler.cache in ("prefix", "dual")

  @property
  def blank(self) -> requests.Requests:
    """A request for nothing, which frees a row."""
    return self._blank(1)

  def _blank(self, rows: int) -> requests.Requests:
    options = self._stacked([RowOptions()] * rows)
    length = self.sampler.length
    languages = self._languages([[]] * rows, [RowOptions()] * rows)
    return requests.blank(rows, length, options=options, languages=languages)

  def _languages(
    self, rows: Sequence[requests.Template], options: Sequence[RowOptions]
  ) -> Followed | None:
    """Returns what the texts of rows have to be in."""
    chosen = [row.language for row in options]
    if self._room is None and any(chosen):
      raise ValueError(
        "this server follows no language, which its sampler cannot or which it"
        " was started without (--languages=0)"
      )
    return placed(
      rows,
      chosen,
      spans=[row.span for row in options],
      vocab=self.sampler.objective.vocab_size,
      length=self.sampler.length,
      room=self._room,
    )

  def _stacked(self, rows: Sequence[RowOptions]) -> Options:
    """Returns what rows chose, each with a seed."""
    seeded = [dataclasses.replace(row, seed=row.seed or 0) for row in rows]
    objective = self.sampler.objective
    return stack(
      seeded,
      defaults=self._defaults,
      objective=objective,
      steps=self.sampler.row_steps,
    )

  def ends(self, options: RowOptions) -> Sequence[int]:
    """Returns what ends a row."""
    ends = options.end_ids
    ends = (self._defaults.end_ids or self._end_ids) if ends is None else ends
    return ends or (options.language.end_ids if options.language else ())

  def arrays(
    self, canvas: requests.Template, number: int, options: RowOptions
  ) -> requests.Requests:
    """Returns a request as the arrays of one row.

    Args:
      canvas: token ids, None at each slot to be sampled.
      number: of the request under its seed.
      options: what it chose.

    Raises:
      ValueError: a token is not in the vocabulary, or is the mask, or what was
        chosen cannot be.
    """
    return requests.build(
      [requests.whole(canvas, self.sampler.objective)],
      objective=self.sampler.objective,
      length=self.sampler.length,
      request=[number],
      options=self._stacked([options]),
      languages=self._languages([canvas], [options]),
    )

  def reset(self) -> None:
    """Frees all rows and forgets them."""
    self._state = None
    self._due = False
    with jax.set_mesh(self.mesh):
      self._state = self._empty(self._held, self._blank(self.rows))

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
    self._due = self._approximate

  def move(self, source: int, row: int) -> None:
    """Puts what is in a row into another one too; see `slots.move`."""
    with jax.set_mesh(self.mesh):
      self._state = self._move(self._state, np.int32(source), np.int32(row))

  def advance(self, rows: int, most: int = 1) -> View:
    """Returns how all rows are after network calls.

    Args:
      rows: how many take part, from the first: one of `counts`.
      most: calls on blocks, at most; see `slots.advance`.
    """
    with jax.set_mesh(self.mesh):
      if self._due:
        self._state = self._renew(self._held, self._state)
      self._state, view = self._advance(
        rows, self._held, self._state, np.int32(most)
      )
    view = jax.tree.map(np.asarray, jax.device_get(view))
    self._due = bool(view.due.any())
    return view

  def programs(self) -> int:
    """Returns how many programs were compiled and run."""
    made = self._empty, self._admit, self._renew, self._advance, self._move
    return sum(program._cache_size() for program in made)


def _widths(sampler: Sampler) -> Sequence[int]:
  """Returns the widths of prompts that are compiled: each twice the one before."""
  if sampler.cache != "block":
    return ()
  block, width, widths = sampler.block_length, _LEAST, []
  while width < sampler.length:
    widths.append(-(-width // block) * block)
    width *= 2
  return (*(w for w in widths if w < sampler.length), sampler.length)


def _counts(
  sampler: Sampler, rows: int, mesh: jax.sharding.Mesh
) -> Sequence[int]:
  """Returns numbers of rows that are compiled for.

  A lone request is not to pay for a batch; each number takes as long to compile as
  the sampler. All rows alone where they are divided over devices, or stand twice, as with
  guidance: the first ones of them would not lie together.
  """
  guided = sampler.guidance is not None and sampler.guidance.scale
  if guided or any(mesh.shape[axis] > 1 for axis in BATCH_AXES):
    return (rows,)
  return tuple(sorted({1, (rows + 3) // 4, (rows + 1) // 2, rows}))
