r"""The train step: one pure function for every objective.

    Batch -> objective.draw -> objective.loss (network) -> gradient -> optax

The gradient is that of sum(total) / sum(weight), both summed over microbatches
and devices first, and randomness is drawn for the global batch before it is
split: neither the number of microbatches nor the mesh changes what is learned.
"""

from collections.abc import Callable
import dataclasses

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
import optax

from dllm_jax.core import check
from dllm_jax.core.flops import matmul_flops
from dllm_jax.core.rounding import stochastic_tree, widened
from dllm_jax.core.types import Batch, Denoiser, Objective, Process
from dllm_jax.training.frozen import join, split
from dllm_jax.training.optimizer import Rounding


@struct.dataclass
class TrainState:
  """Everything that changes while training.

  Attributes:
    step: steps taken.
    params: `{"model": ..., "process": process.params}`: masters, float32 unless
      `Trainer.rounding` leaves them in the network's own type.
    process: constants and state of the corruption process (its learned part is
      in `params`).
    ema_params: an exponential moving average, in float32, of those that train;
      or None.
    opt_state: optax's state of those that train.
  """

  step: Int[Array, ""]
  params: PyTree
  process: Process
  ema_params: PyTree | None
  opt_state: PyTree

  @property
  def eval_params(self) -> PyTree:
    """The parameters to evaluate and sample with: averaged where there are."""
    if self.ema_params is None:
      return self.params
    return join(self.ema_params, self.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
  """How long and on how much to train.

  Attributes:
    steps: optimiser steps.
    batch_size: rows in a global batch, over all devices and microbatches.
    batch_tokens: tokens in a global batch instead, a multiple of a row's; 0:
      `batch_size` rows.
    microbatches: parts that a batch is split into, to save memory; a divisor.
    seed: the seed of initialisation, corruption and data order.
    ema_decay: decay of the parameter average a step; 0 keeps none.
    hang_seconds: the run ends, to be started again, when it gets no further for
      so long; longer than compiling, evaluating and saving take.
    heartbeat_seconds: how long a process of several may be silent.
    profile_steps: "first:last" writes a profiler trace of those steps, both
      included, under `workdir/profile`; "" none.
  """

  steps: int = 1000
  batch_size: int = 32
  batch_tokens: int = 0
  microbatches: int = 1
  seed: int = 0
  ema_decay: float = 0.0
  hang_seconds: float = 1800.0
  heartbeat_seconds: float = 60.0
  profile_steps: str = ""

  def __post_init__(self):
    if self.steps < 1 or self.batch_size < 1:
      raise ValueError(
        "training.steps and training.batch_size must be at least 1, not "
        f"{self.steps} and {self.batch_size}"
      )
    check.at_least(self, 0, "batch_tokens", prefix="training.")
    rows_are_known = not self.batch_tokens
    if self.microbatches < 1 or (
      rows_are_known and self.batch_size % self.microbatches
    ):
      raise ValueError(
        f"training.microbatches {self.microbatches} must divide "
        f"training.batch_size {self.batch_size}"
      )
    check.within("training.ema_decay", self.ema_decay, "[0, 1)")
    if self.hang_seconds <= 0 or self.heartbeat_seconds <= 0:
      raise ValueError(
        "training.hang_seconds and training.heartbeat_seconds must be above 0, "
        f"not {self.hang_seconds} and {self.heartbeat_seconds}"
      )
    self.profiled()

  def of_rows(self, length: int) -> "Training":
    """Returns the settings with `batch_size` filled in, for rows of a length.

    Raises:
      ValueError: rows of so many tokens do not make a batch of `batch_tokens`.
    """
    if not self.batch_tokens:
      return self
    rows, rest = divmod(self.batch_tokens, length)
    if rows < 1 or rest:
      raise ValueError(
        f"training.batch_tokens {self.batch_tokens} must be a multiple of "
        f"data.length {length}, the tokens of a row"
      )
    return dataclasses.replace(self, batch_size=rows, batch_tokens=0)

  def profiled(self) -> tuple[int, int] | None:
    """Returns the first and last step of the profiler trace, None for none."""
    if not self.profile_steps:
      return None
    first, colon, last = self.profile_steps.partition(":")
    legal = colon and first.isdecimal() and last.isdecimal()
    if not legal or not 1 <= int(first) <= int(last):
      raise ValueError(
        'training.profile_steps must be "first:last" with 1 <= first <= last, '
        f"for example 10:15, not {self.profile_steps!r}"
      )
    return int(first), int(last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trainer:
  """What a train step is made of; static under jit.

  Attributes:
    objective: how to corrupt and score.
    denoiser: the network.
    optimizer: optax's transformation.
    training: batch split, averaging and seed.
    trains: `params` to a tree of booleans, False at frozen ones; None if all
      train.
    freeze: those that do not train, as they are held; None for as they are.
    rounding: of parameters that the network has in bfloat16; see
      `optimizer.Rounding`.
  """

  objective: Objective
  denoiser: Denoiser
  optimizer: optax.GradientTransformation
  training: Training
  trains: Callable[[PyTree], PyTree] | None = None
  freeze: Callable[[PyTree], PyTree] | None = None
  rounding: Rounding = "none"

  def init_process(self) -> Process:
    """Returns the process of step 0; a function of the seed only."""
    _, key_process = jax.random.split(jax.random.key(self.training.seed))
    return self.objective.init(key_process)

  def init(self, batch: Batch) -> TrainState:
    """Returns the state of step 0; a function of the seed and shapes only."""
    return self.begin(self.untrained(batch))

  def untrained(self, batch: Batch) -> TrainState:
    """Returns fresh parameters in the network's own types, and nothing else.

    Neither masters, nor an average, nor an optimiser's state: what it takes to
    evaluate and sample.
    """
    key_model, _ = jax.random.split(jax.random.key(self.training.seed))
    process = self.init_process()
    t = jnp.ones((batch.tokens.shape[0], 1), jnp.float32)
    z = self.objective.clean(process, batch.tokens)
    inputs = self.objective.inputs(process, z, t, batch)
    params = {
      "model": self.denoiser.init(key_model, inputs),
      "process": process.params,
    }
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      process=process.replace(params={}),
      ema_params=None,
      opt_state=None,
    )

  def begin(self, state: TrainState) -> TrainState:
    """Returns parameters as they train, with all else that a state of step 0 has.

    The average and the optimiser's state are float32, in whatever type
    parameters train.
    """
    trained, frozen = self.split(state.params)
    wide = widened(trained)
    if self.rounding == "none":
      trained = wide
    return state.replace(
      params=join(trained, self.frozen(frozen)),
      ema_params=wide if self.training.ema_decay else None,
      opt_state=self.optimizer.init(wide),
    )

  def split(self, params: PyTree) -> tuple[PyTree, PyTree]:
    """Returns what trains of parameters, and the rest."""
    return split(params, self.trains and self.trains(params))

  def frozen(self, params: PyTree) -> PyTree:
    """Returns what does not train, as it is held."""
    return params if self.freeze is None else self.freeze(params)

  def step(
    self, state: TrainState, batch: Batch
  ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """Returns the next state and the step's metrics.

    Metrics: `loss_nats_per_token` (total over its normalisation),
    `bound_nats_per_token` (mean over supervised tokens), `gradient_norm`, `tokens`
    (supervised ones), the objective's own and, with `rounding` "nearest",
    `lost_updates`: the share of those that should change a parameter and do not.
    """
    key = jax.random.fold_in(jax.random.key(self.training.seed), state.step + 1)
    key_draw, key_dropout, key_rounding = jax.random.split(key, 3)
    process = state.process.replace(params=state.params["process"])
    drawn = self.objective.draw(process, key_draw, batch, step=state.step)
    trained, frozen = self.split(state.params)
    gradients, sums = self._accumulate(
      state, trained, frozen, batch, drawn, key_dropout
    )
    weight = jnp.maximum(sums["weight"], 1e-9)  # a batch of padding only
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    wide = widened(trained)
    updates, opt_state = self.optimizer.update(
      widened(gradients), state.opt_state, wide
    )
    wide = optax.apply_updates(wide, updates)
    if self.rounding == "stochastic":
      params = stochastic_tree(key_rounding, wide, trained)
    else:
      params = _cast(wide, trained)
    lost = {}
    if self.rounding == "nearest":
      lost["lost_updates"] = _lost(wide, params, trained)
    metrics = {
      "loss_nats_per_token": sums["total"] / weight,
      "bound_nats_per_token": sums["bound"] / jnp.maximum(sums["tokens"], 1),
      "gradient_norm": optax.tree.norm(gradients),
      "tokens": sums["tokens"],
      **lost,
      **{k: v / self.training.microbatches for k, v in sums["extra"].items()},
    }
    new = state.replace(
      step=state.step + 1,
      params=join(params, frozen),
      ema_params=self._average(state, params),
      opt_state=opt_state,
    )
    return new, metrics

  def model_flops(self, state: TrainState, batch: Batch) -> int:
    """Returns the FLOPs of a step: `passes` x the forward's, no recomputation.

    Counts the matrix products of the network and of the unembedding at all
    positions, as in arXiv:2204.02311, appendix B.

    Args:
      state: only its shapes and types are used.
      batch: likewise.
    """
    calls = []

    def loss(params, process, batch):
      process = process.replace(params=params["process"])
      step = jnp.zeros((), jnp.int32)
      drawn = self.objective.draw(process, jax.random.key(0), batch, step=step)

      def denoise(inputs):
        calls.append(jax.tree.map(jax.typeof, inputs))
        return self.denoiser.apply(params["model"], inputs, None)[0]

      return self.objective.loss(
        process, denoise, drawn, batch, step=step
      ).total

    jax.eval_shape(loss, state.params, state.process, batch)

    def logits(params, inputs):
      out = self.denoiser.apply(params, inputs, None)[0]
      return out.hidden if out.unembed is None else out.hidden @ out.unembed

    model = state.params["model"]
    forward = sum(matmul_flops(logits, model, inputs) for inputs in calls)
    return int(self.passes(state) * forward)

  def passes(self, state: TrainState) -> float:
    """Returns a step's FLOPs in forward passes: 3, less what is frozen.

    One of the three forms the gradients of matrices, of those that train only.
    """
    size = lambda params: sum(x.size for x in jax.tree.leaves(params))
    return 2 + size(self.split(state.params)[0]) / size(state.params)

  def _average(self, state: TrainState, params: PyTree) -> PyTree | None:
    """Returns the moving average; its first steps forget the random start."""
    if state.ema_params is None:
      return None
    n = state.step.astype(jnp.float32)
    decay = jnp.minimum(self.training.ema_decay, (1.0 + n) / (10.0 + n))
    new = optax.incremental_update(params, state.ema_params, 1.0 - decay)
    return _cast(new, state.ema_params)

  def _accumulate(
    self,
    state: TrainState,
    trained: PyTree,
    frozen: PyTree,
    batch: Batch,
    drawn: PyTree,
    key: Key[Array, ""],
  ) -> tuple[PyTree, dict]:
    """Returns the summed gradient of `total` and summed metrics."""
    parts = self.training.microbatches

    def total(trained, batch, drawn, key):
      params = join(trained, frozen)
      process = state.process.replace(params=params["process"])

      def denoise(inputs):
        inputs = inputs.replace(dropout_key=key)  # of networks that have any
        out = self.denoiser.apply(params["model"], inputs, None)[0]
        if "loss" in out.aux:
          extra.append(out.aux["loss"])
        return out

      extra = []
      loss = self.objective.loss(
        process, denoise, drawn, batch, step=state.step
      )
      # What the network adds (balance of experts) weighs as much as a mean.
      loss = loss.replace(total=loss.total + sum(extra) * loss.weight)
      sums = {
        "total": loss.total,
        "weight": loss.weight,
        "bound": jnp.sum(loss.bound),
        "tokens": jnp.sum(batch.loss_mask, dtype=jnp.float32),
        "extra": dict(loss.metrics),
      }
      return loss.total, sums

    gradient = jax.grad(total, has_aux=True)
    if parts == 1:
      return gradient(trained, batch, drawn, key)

    def split(x):
      # Rows i, i + parts, ... form part i, so that each device, which holds a
      # run of rows, has an equal share of every part.
      x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
      return jnp.moveaxis(x, 1, 0)

    def add(carry, part):
      new = gradient(trained, *part[:2], jax.random.fold_in(key, part[2]))
      return jax.tree.map(jnp.add, carry, new), None

    rows = jax.tree.map(split, (batch, drawn))
    first = jax.tree.map(lambda x: x[0], rows)
    shapes = jax.eval_shape(gradient, trained, *first, key)
    zeros, sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = widened(zeros)
    return lax.scan(add, (zeros, sums), (*rows, jnp.arange(parts)))[0]


def _cast(tree: PyTree, like: PyTree) -> PyTree:
  return jax.tree.map(lambda x, old: x.astype(old.dtype), tree, like)


def _lost(wanted: PyTree, got: PyTree, old: PyTree) -> Float[Array, ""]:
  """Returns the share of numbers that should have changed and did not."""

  def count(*masks: Bool[Array, "..."]) -> Float[Array, ""]:
    # Rows first: the elements of a large model overflow an int32.
    rows = [jnp.sum(jnp.atleast_1d(mask), -1) for mask in masks]
    return sum(jnp.sum(row, dtype=jnp.float32) for row in rows)

  leaves = [*zip(*map(jax.tree.leaves, (wanted, got, old)), strict=True)]
  moves = count(*(w != o for w, _, o in leaves))
  lost = count(*((w != o) & (g == o) for w, g, o in leaves))
  return lost / jnp.maximum(moves, 1.0)
