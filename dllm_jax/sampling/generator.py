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
from dllm_jax.sampling.launch import Launcher
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
    rows: the token ids of each text.
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

    Args:
      prompts: texts to continue.
      infills: texts with spans, instead.
      length: slots of the canvas; None for as many as `new_tokens` need.
      new_tokens: tokens after each prompt; None fills the canvas.

    Raises:
      ValueError: a prompt is longer than the canvas.
    """
    encode = lambda text: [int(i) for i in self.tokenizer.encode(text)]
    begun = lambda row: requests.begun(row, self.objective)
    if infills:
      return [begun(infill.parse(text, encode)) for text in infills]
    return [
      requests.continuation(
        begun(encode(text)), length=length, new_tokens=new_tokens
      )
      for text in prompts
    ]

  def plan(
    self,
    rows: Sequence[requests.Template],
    *,
    length: int | None,
    sampler: SamplerConfig,
    numbers: Sequence[int] | None = None,
  ) -> Plan:
    """Returns what is to be sampled, checked: before parameters are read.

    Args:
      rows: a template for each sample: token ids, None where one is wanted.
      length: slots of the canvas; None for the bucket of the longest row, so
        that rows of many lengths need a handful of programs.
      sampler: how to sample.
      numbers: a request number for each row; by default 0, 1, 2, ...

    Raises:
      ValueError: a row does not fit the canvas, or the sampler is illegal.
    """
    if length is None:
      longest = max(map(len, rows), default=1)
      length = sampler.canvas(self.objective, max(longest, 1))
    end = getattr(self.tokenizer, "eos_id", None)
    built = sampler.build(self.objective, length=length, eos_id=end)
    check_network(built, self.denoiser)
    batch = requests.build(
      rows, objective=self.objective, length=length, request=numbers
    )
    return Plan(sampler=built, rows=rows, batch=batch)

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
      seed: the seed; tokens depend on it and on the row's number.
      trace: whether to keep every step.
    """
    built, rows, batch = plan.sampler, plan.rows, plan.batch
    launcher = self._launcher(built, trace)
    args = (params, process, jax.random.key(seed), batch)
    with jax.set_mesh(self.mesh):
      compile_seconds = launcher.compile(*args)
      start = time.perf_counter()
      generation = launcher(*args)
      dispatched = time.perf_counter() - start
      jax.block_until_ready(generation)
      seconds = time.perf_counter() - start
    tokens = np.asarray(jax.device_get(generation.tokens))
    ids = [
      requests.text_ids(
        row, given, begin=self.objective.begin_id, end=built.eos_id
      )
      for row, given in zip(tokens.tolist(), rows, strict=True)
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
