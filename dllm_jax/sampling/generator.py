"""Texts from a network: templates in, one program, texts and their cost out."""

from collections.abc import Sequence
import dataclasses
import time
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Denoiser, Objective, Process
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.sampling import infill, requests
from dllm_jax.sampling.constraints.arrays import Followed, placed
from dllm_jax.sampling.constraints.automaton import automaton_of
from dllm_jax.sampling.constraints.language import asked, LANGUAGES
from dllm_jax.sampling.launch import held, Launcher
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import check_network, Generation
from dllm_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
  """Texts and what they cost.

  Attributes:
    texts: the samples.
    generation: tokens, network calls a row and the trace, if asked for.
    new_tokens: tokens that were sampled, over all rows.
    seconds: time of the run, compilation apart.
    compile_seconds: time of compilation.
    dispatch_seconds: of them, until the one program was under way.
    rows: the token ids of each text, from its template's first.
  """

  texts: list[str]
  generation: Generation
  new_tokens: int
  seconds: float
  compile_seconds: float
  dispatch_seconds: float
  rows: list[list[int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is to be sampled, and how: legal, and on one canvas.

  Attributes:
    sampler: how.
    rows: a template for each sample.
    batch: the same as arrays.
  """

  sampler: Sampler
  rows: Sequence[requests.Template]
  batch: requests.Requests


class Generator:
  """Samples texts; each sampler is compiled once for each shape.

  Attributes:
    objective: how text is corrupted.
    denoiser: the network.
    tokenizer: text to tokens.
    mesh: what a batch is divided over.
  """

  def __init__(
    self,
    objective: Objective,
    denoiser: Denoiser,
    tokenizer: Tokenizer,
    *,
    mesh: jax.sharding.Mesh,
  ):
    self.objective = objective
    self.denoiser = denoiser
    self.tokenizer = tokenizer
    self.mesh = mesh
    self._launchers: dict[Any, Launcher] = {}

  @property
  def launchers(self) -> list[Launcher]:
    """The samplers that were compiled so far."""
    return list(self._launchers.values())

  def _launcher(self, sampler, trace: bool) -> Launcher:
    if (sampler, trace) not in self._launchers:
      self._launchers[sampler, trace] = Launcher(
        sampler, self.denoiser, trace=trace
      )
    return self._launchers[sampler, trace]

  def templates(
    self,
    prompts: Sequence[str],
    infills: Sequence[str] = (),
    *,
    length: int | None = None,
    new_tokens: int | None = None,
  ) -> list[requests.Template]:
    """Returns the templates of texts to fill in, or else of prompts.

    They begin as the tokenizer has it; a token that the objective wants before
    them is put there by `plan`, on a slot of its own.

    Args:
      prompts: texts to continue.
      infills: texts with spans, instead.
      length: slots of the canvas; None for as many as `new_tokens` need.
      new_tokens: tokens after each prompt; None fills the canvas.

    Raises:
      ValueError: a prompt is longer than the canvas.
    """
    if infills:
      return [infill.parse(text, self.tokenizer) for text in infills]
    rows = [[int(i) for i in self.tokenizer.prompt(p)] for p in prompts]
    room = lambda row: length and length - self._before(row)
    return [
      requests.continuation(row, length=room(row), new_tokens=new_tokens)
      for row in rows
    ]

  def _before(self, row: requests.Template) -> int:
    """Returns the slots that the objective puts before a template."""
    return len(requests.begun(row, self.objective)) - len(row)

  def plan(
    self,
    rows: Sequence[requests.Template],
    *,
    length: int | None,
    sampler: SamplerConfig,
    numbers: Sequence[int] | None = None,
    options: Sequence[RowOptions] | None = None,
  ) -> Plan:
    """Returns what is to be sampled, checked: before parameters are read.

    Args:
      rows: a template for each sample: token ids, None where one is wanted.
      length: slots of the canvas; None for the bucket of the longest row, so
        that rows of many lengths need a handful of programs.
      sampler: how to sample.
      numbers: a request number for each row; by default 0, 1, 2, ...
      options: what each row chooses; None for the sampler's numbers, which are
        then constants of the program.

    Raises:
      ValueError: a row does not fit the canvas, or the sampler or what a row
        chooses is illegal.
    """
    begun = [requests.begun(row, self.objective) for row in rows]
    canvases = [requests.whole(row, self.objective) for row in begun]
    longest = max(map(len, canvases), default=1)
    if length is None:
      length = sampler.canvas(self.objective, max(longest, 1))
    else:  # what is asked for may end inside a block
      length += requests.spare(self.objective)
    ends = self.tokenizer.end_ids
    built = sampler.build(
      self.objective,
      length=length,
      end_ids=ends,
      fill_id=self.tokenizer.pad_id,
    )
    check_network(built, self.denoiser)
    chosen = None
    if options is not None:
      _check_as_many(options, rows)
      chosen = stack(
        options,
        defaults=sampler.options(ends),
        objective=self.objective,
        steps=built.row_steps,
      )
    batch = requests.build(
      canvases,
      objective=self.objective,
      length=length,
      request=numbers,
      options=chosen,
      languages=self._languages(built, rows, canvases, sampler, options),
    )
    return Plan(sampler=built, rows=rows, batch=batch)

  def _languages(
    self,
    built: Sampler,
    rows: Sequence[requests.Template],
    canvases: Sequence[requests.Template],
    sampler: SamplerConfig,
    options: Sequence[RowOptions] | None,
  ) -> Followed | None:
    """Returns what the texts of rows have to be in; None where nothing is asked."""
    options = [RowOptions()] * len(rows) if options is None else options
    of_all = asked(**{name: getattr(sampler, name) for name in LANGUAGES})
    if of_all is not None:
      of_all = automaton_of(of_all, self.tokenizer)
    languages = [of_all if o.language is None else o.language for o in options]
    if any(languages):
      built.check_languages()
    before = [self._before(row) for row in rows]
    spans = [
      o.span and (o.span[0] + n, o.span[1] + n)
      for o, n in zip(options, before, strict=True)
    ]
    return placed(
      canvases,
      languages,
      spans=spans,
      vocab=self.objective.vocab_size,
      length=built.length,
    )

  def compile(
    self, params: PyTree, process: Process, plan: Plan, *, trace: bool = False
  ) -> float:
    """Compiles what a call with the same runs; returns the seconds it took.

    Args:
      params: this and what follows as in a call, or abstract: shapes, types and
        shardings, so that it needs no weights.
    """
    launcher = self._launcher(plan.sampler, trace)
    with jax.set_mesh(self.mesh):
      own, key = held(self.denoiser, params), jax.random.key(0)
      return launcher.compile(own, process, key, plan.batch)

  def __call__(
    self,
    params: PyTree,
    process: Process,
    plan: Plan,
    *,
    seed: int,
    trace: bool = False,
  ) -> Sampled:
    """Returns samples of what was planned.

    Args:
      params: the network's parameters.
      process: the process's arrays.
      plan: what is wanted.
      seed: the seed of rows that chose none; tokens depend on it and on the
        row's number.
      trace: whether to keep every step.
    """
    built, batch = plan.sampler, plan.batch
    launcher = self._launcher(built, trace)
    with jax.set_mesh(self.mesh):
      params = jax.block_until_ready(held(self.denoiser, params))
      args = (params, process, jax.random.key(seed), batch)
      compile_seconds = launcher.compile(*args)
      start = time.perf_counter()
      generation = launcher(*args)
      dispatched = time.perf_counter() - start
      jax.block_until_ready(generation)
      seconds = time.perf_counter() - start
    tokens = np.asarray(jax.device_get(generation.tokens))
    ends = [built.end_ids] * len(tokens)
    if batch.options is not None:
      ends = np.asarray(batch.options.end_ids).tolist()
    ids = [
      requests.text_ids(tokens[self._before(row) :], row, ends)
      for tokens, row, ends in zip(
        tokens.tolist(), plan.rows, ends, strict=True
      )
    ]
    free = np.asarray(batch.valid) & ~np.asarray(batch.fixed)
    return Sampled(
      texts=[self.tokenizer.decode(row) for row in ids],
      generation=generation,
      new_tokens=int(free.sum()),
      seconds=seconds,
      compile_seconds=compile_seconds,
      dispatch_seconds=dispatched,
      rows=ids,
    )


def _check_as_many(options: Sequence, rows: Sequence) -> None:
  if len(options) != len(rows):
    raise ValueError(
      f"{len(rows)} rows want as many options, not {len(options)}: give each its "
      "own, RowOptions() for none"
    )
