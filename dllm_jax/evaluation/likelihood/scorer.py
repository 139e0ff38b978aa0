"""Launching likelihoods: one compiled program for each canvas.

A scorer holds a network and an estimator. Texts of any length, ragged, become
rows on few canvases; what a text is given depends on the seed and on the text
alone, never on its neighbours in a batch.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree
import numpy as np

from dllm_jax.core.axes import BATCH_AXES
from dllm_jax.core.types import Batch, Denoiser, Objective, Process
from dllm_jax.evaluation.likelihood import estimators
from dllm_jax.parallel import compilation, global_batch
from dllm_jax.run.run import Run
from dllm_jax.sampling.requests import bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """A text to score, and what it is given.

  Attributes:
    tokens: token ids.
    given: how many of the first are not scored.
    after: how many of the last are not scored.
  """

  tokens: tuple[int, ...]
  given: int = 0
  after: int = 0

  @property
  def targets(self) -> int:
    """How many tokens are scored."""
    return len(self.tokens) - self.given - self.after

  @property
  def number(self) -> int:
    """A number that depends on the item alone, for its randomness."""
    data = np.asarray([self.given, self.after, *self.tokens], "<i4").tobytes()
    return zlib.crc32(data)


class Scorer:
  """A network whose likelihoods are wanted.

  Attributes:
    objective: how it was trained, with the blocks that were asked for.
    denoiser: the network itself.
    estimator: how log p(x) is estimated.
    forward_tokens: slots that the network has seen so far, padding included.

  Args:
    objective: how the network was trained.
    denoiser: the network.
    params: its parameters, the process's included.
    process: the arrays of the corruption.
    mesh: the device mesh.
    estimator: a name of `estimators.Name`.
    block_size: tokens of a block, of block diffusion; 0 for the trained one.
    cfg_scale: guidance of the given part; 0 for none.

  Raises:
    ValueError: the objective has no such likelihood.
  """

  def __init__(
    self,
    *,
    objective: Objective,
    denoiser: Denoiser,
    params: PyTree,
    process: Process,
    mesh: jax.sharding.Mesh,
    estimator: estimators.Name = "auto",
    block_size: int = 0,
    cfg_scale: float = 0.0,
  ):
    if block_size:
      objective = objective.with_blocks(block_size)
    self.objective, self.denoiser = objective, denoiser
    self.estimator = estimators.choose(objective, estimator)
    if cfg_scale and self.estimator != "counts":
      raise ValueError(
        "guidance is defined for the estimator 'counts' of masked models; "
        f"leave cfg_scale 0 for {self.estimator!r}"
      )
    self._params, self._process, self._mesh = params, process, mesh
    self._scale, self.forward_tokens = cfg_scale, 0
    self._program = compilation.jit(self._nats, mesh=mesh, dtype=denoiser.dtype)

  @classmethod
  def of(cls, run: Run, *, use_ema: bool = True, **fields) -> "Scorer":
    """Returns the scorer of a run's newest checkpoint."""
    state = run.state
    return cls(
      objective=run.objective,
      denoiser=run.denoiser,
      params=state.eval_params if use_ema else state.params,
      process=state.process,
      mesh=run.mesh,
      **fields,
    )

  def _nats(self, params, process, keys, batch):
    """Returns nats of each row, and the tokens of the row with most to score."""
    denoise = lambda inputs: self.denoiser.apply(params["model"], inputs, None)[
      0
    ]
    if self._scale:
      prompt = ~batch.loss_mask & (batch.segment_ids > 0)
      mask_id = self.objective.mask_id
      denoise = estimators.Guided(
        denoise=denoise, scale=self._scale, prompt=prompt, mask_id=mask_id
      )
    process = process.replace(params=params["process"])
    found = estimators.nats(
      self.estimator, self.objective, process, denoise, keys, batch
    )
    most = jnp.max(jnp.sum(batch.loss_mask, axis=1))
    return jax.lax.with_sharding_constraint((found, most), jax.P())

  def nats(self, keys: Key[Array, "G"], batch: Batch) -> Float[np.ndarray, "B"]:
    """Returns one estimate of each row, nats.

    Args:
      keys: one for each group of rows (`estimators.nats`).
      batch: rows on the host: this process's share.
    """
    rows, length = batch.tokens.shape
    with jax.set_mesh(self._mesh):
      placed = global_batch(batch, self._mesh)
      found, most = self._program(self._params, self._process, keys, placed)
    rows *= jax.process_count()
    self.forward_tokens += self.cost(rows, length, int(most))
    return np.asarray(found, np.float64)

  def compiled(
    self, fn: Callable[[PyTree, Process, Batch], PyTree]
  ) -> Callable[[Batch], PyTree]:
    """Returns a function of rows under this network, as one program."""
    program = compilation.jit(
      lambda params, process, batch: fn(
        params, process.replace(params=params["process"]), batch
      ),
      mesh=self._mesh,
      dtype=self.denoiser.dtype,
    )

    def run(batch: Batch) -> np.ndarray:
      with jax.set_mesh(self._mesh):
        placed = global_batch(batch, self._mesh)
        found = program(self._params, self._process, placed)
      return jax.tree.map(np.asarray, found)

    return run

  def cost(self, rows: int, length: int, targets: int) -> int:
    """Returns the slots that the network sees for some rows.

    Args:
      rows: of the batch.
      length: slots of a row.
      targets: tokens to score in the row that has most.
    """
    calls = estimators.calls(self.estimator, targets)
    streams = 2 if self._two_streams else 1
    return rows * length * calls * streams * (2 if self._scale else 1)

  @functools.cached_property
  def _two_streams(self) -> bool:
    """Whether a loss sees a clean copy of each row beside the noisy one."""
    if self.estimator in estimators.ORDERS:
      return False
    return _seen(self.objective, self._process, self._params) == 2

  def score(
    self,
    items: Sequence[Item],
    *,
    samples: int,
    key: Key[Array, ""],
    rows: int,
  ) -> Float[np.ndarray, "n"]:
    """Returns the nats of each item: the mean over evenly spread samples.

    Args:
      items: what to score, all on one canvas (`canvas`).
      samples: copies of each, whose counts or times are spread evenly.
      key: randomness; an item's depends on it and the item alone.
      rows: of a call, about.
    """
    at_once = min(max(rows // samples, 1), len(items))
    at_once = self.whole(at_once, samples)
    width = self.canvas(max(len(item.tokens) for item in items))
    found = []
    for start in range(0, len(items), at_once):
      part = list(items[start : start + at_once])
      part += [Item(tokens=())] * (at_once - len(part))
      numbers = np.asarray([item.number for item in part], np.uint32)
      keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
      nats = self.nats(keys, _share(batch_of(part * samples, width)))
      found.append(nats.reshape(samples, at_once).mean(axis=0))
    return np.concatenate(found)[: len(items)]

  def whole(self, count: int, copies: int = 1) -> int:
    """Returns the items of a call whose copies the mesh's rows divide."""
    parts = math.prod(self._mesh.shape[axis] for axis in BATCH_AXES)
    step = parts // math.gcd(parts, copies)
    return -(-count // step) * step

  def canvas(self, tokens: int) -> int:
    """Returns the slots of the canvas for a number of tokens."""
    block = self.objective.block_length or 1
    size = bucket(max(tokens, 1))
    return -(-size // block) * block


def _seen(objective: Objective, process: Process, params: PyTree) -> int:
  """Returns how many slots a loss shows the network for each slot of a row."""
  from dllm_jax.core.types import ModelOutputs

  length = objective.block_length or 1
  batch = batch_of([Item(tokens=(0,) * length)], length)
  shapes = []

  def denoise(inputs):
    rows, slots = inputs.positions.shape
    shapes.append(slots)
    logits = jnp.zeros((rows, slots, objective.vocab_size))
    return ModelOutputs(hidden=logits)

  def loss(process):
    step = jnp.int32(0)
    drawn = objective.draw(process, jax.random.key(0), batch, step=step)
    return objective.loss(process, denoise, drawn, batch, step=step).total

  jax.eval_shape(loss, process.replace(params=params["process"]))
  return sum(shapes) // length


def batch_of(items: Sequence[Item], length: int) -> Batch:
  """Returns rows of items, unused slots at their tails."""
  shape = (len(items), length)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  scored: Bool[np.ndarray, "B L"] = np.zeros(shape, bool)
  for i, item in enumerate(items):
    tokens[i, : len(item.tokens)] = item.tokens
    segments[i, : len(item.tokens)] = 1
    scored[i, item.given : item.given + item.targets] = True
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
  return Batch(
    tokens=tokens,
    loss_mask=scored,
    segment_ids=segments,
    positions=np.where(segments > 0, positions, 0).astype(np.int32),
  )


def _share(batch: Batch) -> Batch:
  """Returns this process's rows."""
  count = batch.tokens.shape[0] // jax.process_count()
  start = count * jax.process_index()
  return jax.tree.map(lambda x: x[start : start + count], batch)
