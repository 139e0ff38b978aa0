"""A run: everything that a working directory stands for, and what it can do.

`Run.create` begins or continues one from a configuration, `Run.open` finds one on
disk. The command line and notebooks are thin layers over its methods.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax import config as configs
from dllm_jax import data
from dllm_jax.core.axes import BATCH_AXES
from dllm_jax.core.types import Batch
from dllm_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from dllm_jax.parallel import global_batch, make_mesh, RULES
from dllm_jax.sampling import infill
from dllm_jax.sampling import requests as sampling_requests
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import Generation
from dllm_jax.training import bound
from dllm_jax.training.checkpoint import Checkpoints
from dllm_jax.training.loop import compile_program, Hooks, Loop, Program
from dllm_jax.training.metrics import latest, MetricWriter
from dllm_jax.training.step import Trainer, TrainState


def enable_compilation_cache() -> None:
  """Keeps compiled programs on disk, so that a second start takes seconds.

  In `JAX_COMPILATION_CACHE_DIR` where it is set, else in the user's cache
  directory.
  """
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    directory = str(pathlib.Path(base) / "dllm_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", directory)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


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


class Run:
  """A working directory with its configuration, tokenizer and network.

  Attributes:
    workdir: the directory.
    config: the configuration as dataclasses.
    tokenizer: text to tokens.
    objective: how to corrupt and score.
    denoiser: the network.
    mesh: the device mesh; its methods set it while they run.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    resolved: ConfigDict,
    tokenizer: Tokenizer,
    *,
    corpus: Any = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    enable_compilation_cache()
    self.workdir = workdir
    self.resolved = resolved
    self.config = configs.parse(resolved)
    self.tokenizer = tokenizer
    self._corpus = corpus
    self.objective, self.denoiser = self.config.build(tokenizer)
    self.mesh = make_mesh(self.config.mesh, devices)
    self._launchers: dict[Any, Launcher] = {}

  # ---------------------------------------------------------------- opening

  @classmethod
  def create(
    cls,
    resolved: ConfigDict,
    workdir: str | pathlib.Path,
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
    workdir = pathlib.Path(workdir)
    config = configs.parse(resolved)
    if (workdir / "config.json").exists():
      old = json.loads(configs.stored(workdir).to_json())
      changed = configs.differences(old, json.loads(resolved.to_json()))
      if changed and not _only_imported(workdir):
        raise ValueError(
          f"{workdir} holds a run with another configuration ("
          + "; ".join(changed[:3])
          + "); use another --workdir, or only change mesh, logging, "
          "checkpoint and training.steps"
        )
      tokenizer = _read_tokenizer(workdir)
      corpus = data.load(config.data, tokenizer=tokenizer)
    else:
      if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(
          f"{workdir} is not empty and holds no run; use another --workdir"
        )
      corpus = data.load(config.data)
    run = cls(
      workdir, resolved, corpus.tokenizer, corpus=corpus, devices=devices
    )
    run._check_batches()
    if jax.process_index() == 0:
      workdir.mkdir(parents=True, exist_ok=True)
      _write(workdir / "tokenizer.json", corpus.tokenizer.to_json())
      _write(workdir / "config.json", resolved.to_json(indent=2))
    return run

  @classmethod
  def open(
    cls,
    workdir: str | pathlib.Path,
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
    workdir = pathlib.Path(workdir)
    given = configs.stored(workdir).to_dict()
    given["mesh"] = dict(mesh or {"data": -1})
    tokenizer = _read_tokenizer(workdir)
    return cls(workdir, configs.resolve(given), tokenizer, devices=devices)

  @property
  def network(self) -> Any:
    """The network's config."""
    return self.config.network(self.objective)

  @functools.cached_property
  def corpus(self):
    """The text of the run, read when it is first needed."""
    if self._corpus is None:
      self._corpus = data.load(self.config.data, tokenizer=self.tokenizer)
    return self._corpus

  def describe(self) -> str:
    """Returns one line on what is trained where."""
    shapes = jax.tree.leaves(self.program.abstract.params)
    parameters = sum(leaf.size for leaf in shapes)
    devices = self.mesh.devices
    kind = devices.flat[0].device_kind
    return (
      f"{self.resolved.objective.name} on {self.resolved.data.path}: "
      f"{parameters:,} parameters, vocabulary {self.objective.vocab_size}, "
      f"{devices.size} x {kind}"
    )

  # --------------------------------------------------------------- programs

  @functools.cached_property
  def trainer(self) -> Trainer:
    """What the train step is made of."""
    training, optimizer = self.config.training, self.config.optimizer
    if self.config.model.get("lora_rank") and not optimizer.train_only:
      optimizer = dataclasses.replace(optimizer, train_only=r".*/lora_[ab]")
    return Trainer(
      objective=self.objective,
      denoiser=self.denoiser,
      optimizer=optimizer.build(training.steps),
      training=training,
      trains=optimizer.trains if optimizer.train_only else None,
    )

  @functools.cached_property
  def program(self) -> Program:
    """The train step, jitted over the mesh."""
    with jax.set_mesh(self.mesh):
      return compile_program(
        self.trainer, self._empty_batch(), self.mesh, RULES
      )

  def model_flops(self) -> int:
    """Returns the model FLOPs of a train step over all devices."""
    return self.trainer.model_flops(self.program.abstract, self._empty_batch())

  def _empty_batch(self) -> Batch:
    shape = (self.config.training.batch_size, self.config.data.length)
    tokens = np.zeros(shape, np.int32)
    ones = np.ones(shape, np.int32)
    return Batch(
      tokens=tokens,
      loss_mask=ones.astype(bool),
      segment_ids=ones,
      positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    )

  def _check_batches(self) -> None:
    """Checks that the mesh divides what it has to."""
    rows = 1
    for axis in BATCH_AXES:
      rows *= self.mesh.shape[axis]
    training, evaluation = self.config.training, self.config.evaluation
    part = training.batch_size // training.microbatches
    for name, size in (
      ("training.batch_size / training.microbatches", part),
      ("evaluation.batch_size", evaluation.batch_size),
    ):
      if size % rows:
        raise ValueError(
          f"{name} = {size} is not divisible by the {rows} devices of the mesh "
          f"axes {', '.join(BATCH_AXES)}; choose a multiple of {rows}"
        )

  @functools.cached_property
  def state(self) -> TrainState:
    """The newest checkpoint's state.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    with jax.set_mesh(self.mesh):
      checkpoints = Checkpoints(self.workdir)
      try:
        restored = self.program.restore(checkpoints, to_train=False)
      finally:
        checkpoints.close()
    if restored is None:
      raise FileNotFoundError(
        f"{self.workdir} has no checkpoint yet; train it with `dllm train`"
      )
    return restored[0]

  def start(self) -> None:
    """Makes a fresh state the current one: an untrained network."""
    with jax.set_mesh(self.mesh):
      self.__dict__["state"] = self.program.init()

  # --------------------------------------------------------------- training

  def train(self) -> dict[str, Any]:
    """Trains, or continues, to the configured step; returns a summary.

    Raises:
      NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
    """
    evaluation = self.config.evaluation
    hooks = Hooks(
      evaluate=self._training_evaluation if self.corpus.held_out else None,
      evaluate_every=evaluation.every_steps,
      sample=lambda state: self.sample(state=state).texts,
      sample_every=evaluation.sample_every,
    )
    with jax.set_mesh(self.mesh):
      state, summary = self.loop(self.workdir, hooks).run()
    self.__dict__["state"] = state
    # A run that had nothing left to do, or was stopped, still says how it stands.
    logged = latest(
      self.workdir, ("loss_nats_per_token", "eval_", "tokens_per_second")
    )
    return logged | summary

  def loop(self, workdir: pathlib.Path, hooks: Hooks) -> Loop:
    """Returns the training loop of this run, writing into a directory."""
    config = self.config
    return Loop(
      program=self.program,
      batches=data.train_iterator(
        self.corpus,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
      checkpoints=Checkpoints(workdir, keep=config.checkpoint.keep),
      writer=lambda step: MetricWriter(
        workdir,
        config.logging,
        resumed_step=step,
        config=self.resolved.to_dict(),
        active=jax.process_index() == 0,
      ),
      steps=config.training.steps,
      save_every=config.checkpoint.every_steps,
      logging=config.logging,
      mesh=self.mesh,
      hooks=hooks,
      learning_rate=config.optimizer.learning_rates(config.training.steps),
      workdir=workdir,
      model_flops=self.model_flops,
      profile_steps=config.training.profiled(),
    )

  def _training_evaluation(self, state: TrainState) -> dict[str, float]:
    limit = self.config.evaluation.batches or None
    figures = self.evaluate(state=state, limit=limit)
    return {
      "eval_bits_per_token": figures["bits_per_token"],
      "eval_bits_per_char": figures["bits_per_char"],
      "eval_standard_error": figures["standard_error"],
    }

  # ------------------------------------------------------------- evaluation

  @functools.cached_property
  def _bound_sums(self):
    def sums(params, process, key, batch):
      return bound.bound_sums(
        self.objective, self.denoiser, params, process, key, batch
      )

    return jax.jit(sums)

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
      use_ema: whether to use averaged parameters where there are any.
      limit: at most so many batches; None for all.
      passes: independent passes; None for the configured number.
      progress: whether to draw a progress bar on standard error.

    Raises:
      ValueError: nothing is held out.
    """
    state = self.state if state is None else state
    evaluation = self.config.evaluation
    size = self.corpus.held_out_text
    if size is None:
      raise ValueError(
        "nothing is held out: set config.data.held_out above 0, or "
        "config.data.held_out_path"
      )
    batches = data.held_out_batches(
      self.corpus,
      batch_size=evaluation.batch_size,
      limit=limit,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    params = state.eval_params if use_ema else state.params
    with jax.set_mesh(self.mesh):
      return bound.held_out_bound(
        lambda key, batch: self._bound_sums(
          params, state.process, key, global_batch(batch, self.mesh)
        ),
        batches,
        passes=passes or evaluation.passes,
        seed=evaluation.seed,
        characters_per_token=size.characters_per_token,
        progress=progress,
      )

  # --------------------------------------------------------------- sampling

  def sample(
    self,
    prompts: Sequence[str] = ("",),
    *,
    infills: Sequence[str] = (),
    num_samples: int = 1,
    length: int | None = None,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
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
      seed: the seed; a request's tokens depend on it and the request's number.
      sampler: how to sample; by default as configured.
      state: whose parameters; by default the newest checkpoint's.
      use_ema: whether to use averaged parameters where there are any.
      trace: whether to keep every step.

    Raises:
      ValueError: a prompt is longer than the canvas, or the sampler is illegal.
    """
    length = length or self.config.data.length
    encode = lambda text: [int(i) for i in self.tokenizer.encode(text)]
    begun = lambda row: sampling_requests.begun(row, self.objective)
    if infills:
      rows = [begun(infill.parse(text, encode)) for text in infills]
    else:
      rows = [
        sampling_requests.continuation(begun(encode(text)), length=length)
        for text in prompts
      ]
    return self.sample_rows(
      [row for row in rows for _ in range(num_samples)],
      length=length,
      seed=seed,
      sampler=sampler,
      state=state,
      use_ema=use_ema,
      trace=trace,
    )

  def sample_rows(
    self,
    rows: Sequence[sampling_requests.Template],
    *,
    length: int,
    seed: int = 0,
    sampler: SamplerConfig | None = None,
    state: TrainState | None = None,
    use_ema: bool = True,
    trace: bool = False,
  ) -> Sampled:
    """Returns samples of templates: token ids, None where one is wanted.

    Args:
      rows: a template for each sample.
      length: slots of the canvas.
      seed: as in `sample`, and so on.
      sampler: how to sample.
      state: whose parameters.
      use_ema: whether to use averaged parameters.
      trace: whether to keep every step.

    Raises:
      ValueError: a row does not fit the canvas, or the sampler is illegal.
    """
    end = getattr(self.tokenizer, "eos_id", None)
    sampler = (sampler or self.config.sampler).build(
      self.objective, length=length, eos_id=end
    )
    requests = sampling_requests.build(
      rows, objective=self.objective, length=length
    )
    state = self.state if state is None else state
    params = state.eval_params if use_ema else state.params
    process = state.process.replace(params=params["process"])
    launcher = self._launcher(sampler, trace)
    args = (params["model"], process, jax.random.key(seed), requests)
    with jax.set_mesh(self.mesh):
      compile_seconds = launcher.compile(*args)
      start = time.perf_counter()
      generation = launcher(*args)
      dispatched = time.perf_counter() - start
      jax.block_until_ready(generation)
      seconds = time.perf_counter() - start
    tokens = np.asarray(jax.device_get(generation.tokens))
    ids = [
      sampling_requests.text_ids(
        row, given, begin=self.objective.begin_id, end=sampler.eos_id
      )
      for row, given in zip(tokens.tolist(), rows, strict=True)
    ]
    free = np.asarray(requests.valid) & ~np.asarray(requests.fixed)
    return Sampled(
      texts=[self.tokenizer.decode(row) for row in ids],
      generation=generation,
      new_tokens=int(free.sum()),
      seconds=seconds,
      compile_seconds=compile_seconds,
      dispatch_seconds=dispatched,
      rows=ids,
    )

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


def _only_imported(workdir: pathlib.Path) -> bool:
  """Whether a run holds imported parameters that were not yet trained."""
  checkpoints = Checkpoints(workdir)
  try:
    return checkpoints.steps() == [0]
  finally:
    checkpoints.close()


def _read_tokenizer(workdir: pathlib.Path) -> Tokenizer:
  path = workdir / "tokenizer.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing; restore it from a copy of the run"
    )
  return tokenizer_from_json(path.read_text(encoding="utf-8"))


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text + "\n", encoding="utf-8")
  temporary.replace(path)
