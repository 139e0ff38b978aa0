"""A run: everything that a working directory stands for, and what it can do.

The command line and notebooks are thin layers over its methods.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from dllm_jax import data, training
from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.core.types import Batch
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.models.quantised import freeze
from dllm_jax.parallel import (
  check_batches,
  compilation,
  distributed,
  make_mesh,
  row_share,
  RULES,
)
from dllm_jax.run import samples
from dllm_jax.run import workdir as workdirs
from dllm_jax.run.loop import training_loop
from dllm_jax.sampling.generator import Generator, Sampled
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import Template
from dllm_jax.training.checkpoint import Checkpoints
from dllm_jax.training.served import Served, served
from dllm_jax.training.step import Trainer, TrainState


class Run:
  """A working directory with its configuration, tokenizer and network.

  Attributes:
    workdir: the directory.
    config: the configuration as dataclasses.
    tokenizer: text to tokens.
    objective: how to corrupt and score.
    denoiser: the network.
    mesh: the device mesh; its methods set it while they run.
    generator: samples texts from the network.

  Examples:
    >>> run = Run.create(resolved, workdir)  # of `config.load`, perhaps changed
    >>> run.train()["step"] == resolved.training.steps
    True
    >>> [text[:6] for text in run.sample(["ROMEO:"]).texts]
    ['ROMEO:']
  """

  def __init__(
    self,
    workdir: paths.Path,
    resolved: ConfigDict,
    tokenizer: Tokenizer,
    *,
    corpus: Any = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    compilation.enable_compilation_cache()
    self.workdir = workdir
    self.resolved = resolved
    self.config = configs.parse(resolved)
    self.tokenizer = tokenizer
    self._corpus = corpus
    self.objective, self.denoiser = made = self.config.build(tokenizer)
    self.mesh = make_mesh(self.config.mesh, devices)
    self.generator = Generator(*made, tokenizer, mesh=self.mesh)

  @classmethod
  def create(
    cls,
    resolved: ConfigDict,
    workdir: str | os.PathLike,
    *,
    devices: Sequence[jax.Device] | None = None,
  ) -> "Run":
    """Returns the run of a configuration, new or already begun.

    Args:
      resolved: a configuration as `config.load` returns it.
      workdir: its directory; made if missing.
      devices: the devices to use; by default all.

    Raises:
      ValueError: the directory holds another configuration, or a field is illegal.
      FileNotFoundError: the text does not exist.
    """
    workdir = paths.place(workdir)
    with distributed.together():
      corpus = workdirs.load_corpus(workdir, resolved)
    run = cls(
      workdir, resolved, corpus.tokenizer, corpus=corpus, devices=devices
    )
    part = run.config.training.batch_size // run.config.training.microbatches
    check_batches(
      run.mesh,
      {
        "training.batch_size / training.microbatches": part,
        "evaluation.batch_size": run.config.evaluation.batch_size,
      },
      run.config.data.length,
    )
    _ = run.program  # says where the mesh does not divide a parameter
    with distributed.together():
      if jax.process_index() == 0:
        if run.config.data.format == "images":
          from dllm_jax.run import images  # noqa: PLC0415  Few have any.

          images.keep(workdir, images.of(workdir, run.config.data))
        workdirs.begin(workdir, resolved, corpus.tokenizer)
    return run

  @classmethod
  def open(
    cls,
    workdir: str | os.PathLike,
    *,
    mesh: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
  ) -> "Run":
    """Returns the run that a directory holds.

    Args:
      workdir: the directory.
      mesh: sizes of mesh axes; by default rows are divided over all devices.
      devices: the devices to use; by default all.

    Raises:
      FileNotFoundError: there is no run.
    """
    workdir = paths.place(workdir)
    given = configs.stored(workdir).to_dict()
    given["mesh"] = dict(mesh or {"data": -1})
    tokenizer = workdirs.read_tokenizer(workdir)
    return cls(workdir, configs.resolve(given), tokenizer, devices=devices)

  @property
  def network(self) -> Any:
    """The network's config."""
    return self.config.network(self.objective)

  @functools.cached_property
  def corpus(self):
    """The text of the run, read when it is first needed."""
    if self._corpus is not None:
      return self._corpus
    return workdirs.read_corpus(self.config, self.tokenizer, self.workdir)

  def describe(self) -> str:
    """Returns one line on what is trained where."""
    shapes = jax.tree.leaves(self.program.abstract.params)
    return (
      f"{self.resolved.objective.name} on {self.resolved.data.path}: "
      f"{sum(x.size for x in shapes):,} parameters, vocabulary {self.objective.vocab_size}, "
      f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
    )

  @functools.cached_property
  def trainer(self) -> Trainer:
    """What the train step is made of."""
    optimizer, adapter = self.config.optimizer, self.network.adapter
    if adapter.rank and not optimizer.train_only:
      optimizer = dataclasses.replace(optimizer, train_only=r".*/lora_[a-z]+")
    frozen = functools.partial(freeze, base=adapter.base)
    return Trainer(
      objective=self.objective,
      denoiser=self.denoiser,
      optimizer=optimizer.build(self.config.training.steps),
      training=self.config.training,
      trains=optimizer.trains if optimizer.train_only else None,
      freeze=frozen if adapter.base != "default" else None,
      rounding=optimizer.rounding,
    )

  @functools.cached_property
  def program(self) -> "training.Program":
    """The train step, jitted over the mesh."""
    with jax.set_mesh(self.mesh):
      return training.compile_program(*self._made_of)

  @functools.cached_property
  def served(self) -> Served:
    """What is loaded to evaluate and sample, over the mesh."""
    with jax.set_mesh(self.mesh):
      return served(*self._made_of)

  @property
  def _made_of(self) -> tuple:
    return self.trainer, self._blank(), self.mesh, RULES

  def model_flops(self) -> int:
    """Returns the model FLOPs of a train step over all devices."""
    return self.trainer.model_flops(self.program.abstract, self._blank())

  def _blank(self) -> Batch:
    return data.blank(self.config.training.batch_size, self.config.data.length)

  @functools.cached_property
  def state(self) -> TrainState:
    """The newest checkpoint's state, as `load` returns it."""
    return self.load()

  def load(self, *, masters: bool = False) -> TrainState:
    """Returns the newest checkpoint's state.

    Args:
      masters: parameters in the type that they train in, not the network's own.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    checkpoints = Checkpoints(self.workdir, writes=False)
    with jax.set_mesh(self.mesh), checkpoints:
      own = served(*self._made_of, masters=True) if masters else self.served
      restored = own.restore(checkpoints)
    if restored is None:
      raise FileNotFoundError(
        f"{self.workdir} has no checkpoint yet; train it with `dllm train`"
      )
    return restored

  def start(self) -> None:
    """Makes an untrained network the current state, without an optimiser's."""
    with jax.set_mesh(self.mesh):
      self.__dict__["state"] = self.served.untrained()

  def train(self) -> dict[str, Any]:
    """Trains, or continues, to the configured step; see `follow`."""
    held_out = self.held_out if self.corpus.held_out else None
    hooks = training.Hooks(
      evaluate=held_out and held_out.while_training,
      evaluate_every=self.config.evaluation.every_steps,
      adapt=held_out.adapt if held_out and self.objective.adapts else None,
      sample=lambda state: samples.shown(self, state),
      sample_every=self.config.evaluation.sample_every,
    )
    return self.follow(self.loop(self.workdir, hooks))

  def follow(self, loop: "training.Loop") -> dict[str, Any]:
    """Runs a loop to its end, whose state is then the run's; returns a summary.

    Raises:
      NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
    """
    with jax.set_mesh(self.mesh):
      state, summary = loop.run()
    self.__dict__["state"] = state
    # A run with nothing left to do, or stopped, still says how it stands.
    says = "loss_nats_per_token", "eval_", "tokens_per_second"
    return training.latest(self.workdir, says) | summary

  def batches(self) -> "data.BatchIterator":
    """Returns this process's rows of the training batches, from the first on."""
    share = row_share(self.mesh)
    return data.train_iterator(
      self.corpus,
      batch_size=self.config.training.batch_size,
      seed=self.config.training.seed,
      process_index=share.index,
      process_count=share.count,
    )

  def loop(self, workdir: paths.Path, hooks: Any) -> "training.Loop":
    """Returns the training loop of this run, writing into a directory."""
    return training_loop(
      self,
      workdir,
      program=self.program,
      batches=self.batches(),
      hooks=hooks,
      model_flops=self.model_flops,
    )

  @functools.cached_property
  def held_out(self) -> "training.HeldOut":
    """The held-out text."""
    return training.HeldOut(
      corpus=self.corpus,
      objective=self.objective,
      denoiser=self.denoiser,
      evaluation=self.config.evaluation,
      mesh=self.mesh,
    )

  def evaluate(
    self,
    *,
    state: TrainState | None = None,
    use_ema: bool = True,
    limit: int | None = None,
    passes: int | None = None,
    progress: bool = False,
  ) -> dict[str, float]:
    """Returns the likelihood bound of the held-out text.

    Args:
      state: whose parameters; by default the newest checkpoint's.
      use_ema: this and what follows as in `HeldOut.bound`.
    """
    state = self.state if state is None else state
    with jax.set_mesh(self.mesh):
      return self.held_out.bound(
        state, use_ema=use_ema, limit=limit, passes=passes, progress=progress
      )

  def sample(
    self,
    prompts: Sequence[str] = ("",),
    *,
    infills: Sequence[str] = (),
    num_samples: int = 1,
    length: int | None = None,
    new_tokens: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
    options: Sequence[RowOptions] | None = None,
    state: TrainState | None = None,
    use_ema: bool = True,
    trace: bool = False,
  ) -> Sampled:
    """Returns sampled texts, all in one batch and one program.

    Args:
      prompts: texts to continue; "" for unconditional samples.
      infills: texts with spans such as "[MASK*8]" to fill in, instead of prompts.
      num_samples: samples of each prompt or infill.
      length: slots of the canvas; by default the training length.
      new_tokens: tokens after each prompt, on a canvas for the longest; None fills.
      seed: the seed; a request's tokens depend on it and the request's number.
      sampler: how to sample; by default as configured.
      options: what each prompt or infill chooses; None for all as the sampler.
      state: whose parameters; by default the newest checkpoint's.
      use_ema: whether to use averaged parameters where there are any.
      trace: whether to keep every step.

    Raises:
      ValueError: a prompt is longer than the canvas, or the sampler is illegal.
    """
    if new_tokens is None:
      length = length or self.config.data.length
    rows = self.generator.templates(
      prompts, infills, length=length, new_tokens=new_tokens
    )
    each = lambda values: [x for x in values for _ in range(num_samples)]
    return self.sample_rows(
      each(rows),
      length=length,
      seed=seed,
      sampler=sampler,
      state=state,
      use_ema=use_ema,
      trace=trace,
      options=None if options is None else each(options),
    )

  def sample_rows(
    self,
    rows: Sequence[Template],
    *,
    length: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
    state: TrainState | None = None,
    use_ema: bool = True,
    trace: bool = False,
    numbers: Sequence[int] | None = None,
    options: Sequence[RowOptions] | None = None,
  ) -> Sampled:
    """Returns samples of templates.

    Args:
      rows: a template for each sample: token ids, None where one is wanted.
      length: slots of the canvas; None for the bucket of the longest row.
      seed: this and what else there is, errors too, as in `sample`.
      numbers: a request number for each row; by default 0, 1, 2, ...
    """
    sampler = sampler or self.config.sampler
    plan = self.generator.plan(
      rows, length=length, sampler=sampler, numbers=numbers, options=options
    )
    return samples.sampled(
      self, plan, state=state, use_ema=use_ema, seed=seed, trace=trace
    )

  def decide(self, context: Any, questions: Sequence, **given) -> list:
    """Returns answers about a text, in one network call: `decisions.decide`."""
    from dllm_jax.run import decisions  # noqa: PLC0415  SciPy takes 0.2 s.

    return decisions.decide(self, context, questions, **given)
