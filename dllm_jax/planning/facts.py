"""What a train step is made of, whatever the machine: counted from its traces."""

from collections.abc import Mapping
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dllm_jax.core.flops import any_device, matmul_flops
from dllm_jax.core.paths import Path
from dllm_jax.core.types import ModelInputs
from dllm_jax.data import Tokenizer
from dllm_jax.data.batches import blank
from dllm_jax.models.attention import flash, splash
from dllm_jax.models.quantised import is_quantised
from dllm_jax.parallel import RULES, shardings
from dllm_jax.run.run import Run
from dllm_jax.training.frozen import join, split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """Counts of a train step, over all devices.

  Attributes:
    parameters: how many there are.
    trained: the share of them that trains.
    forward: FLOPs of a row's forward passes, unembedding included.
    attention: FLOPs of one of the two products of attention, a row and a call of
      the network, all layers, all places.
    tiles: share of places in the tiles that a kernel which knows the mask visits,
      by kernel.
    vocabulary: FLOPs of a row's unembedding.
    state: shapes and types of the train state.
    trains: True at the parameters that train; None if all do.
  """

  parameters: int
  trained: float
  forward: float
  attention: float
  tiles: Mapping[str, float]
  vocabulary: float
  state: object
  trains: object = None


class Reference:
  """A configuration on one device, without kernels: what can be counted.

  Args:
    resolved: the configuration.
    tokenizer: its vocabulary.
  """

  def __init__(self, resolved: ConfigDict, tokenizer: Tokenizer):
    self.resolved = plain(resolved)
    self._tokenizer = tokenizer
    self.run = self._run({})
    self.network = self.run.network

  def _run(self, model: Mapping[str, object]) -> Run:
    resolved = ConfigDict(self.resolved.to_dict())
    resolved.training.update({"batch_size": 2, "batch_tokens": 0})
    resolved.training.microbatches = 1
    for name, value in model.items():
      resolved.model[name] = value
    here = jax.devices("cpu")[:1]
    return Run(Path(), resolved, self._tokenizer, devices=here)

  @functools.cached_property
  def calls(self) -> list[ModelInputs]:
    """Shapes of what the network is called with, for two rows."""
    return self._called(2)

  def _called(self, rows: int) -> list[ModelInputs]:
    run, calls = self.run, []
    state, batch = run.program.abstract, blank(rows, run.config.data.length)

    def loss(params, process, batch):
      process = process.replace(params=params["process"])
      step = jnp.zeros((), jnp.int32)
      key = jax.random.key(0)
      drawn = run.objective.draw(process, key, batch, step=step)

      def denoise(inputs):
        calls.append(jax.tree.map(jax.typeof, inputs))
        return run.denoiser.apply(params["model"], inputs, None)[0]

      loss = run.objective.loss(process, denoise, drawn, batch, step=step)
      return loss.total

    jax.eval_shape(loss, state.params, state.process, batch)
    return calls

  @functools.cached_property
  def facts(self) -> Facts:
    """What was counted."""
    run = self.run
    state, trains = run.program.abstract, run.program.trains
    count = sum(
      map(_count, jax.tree.leaves(state.params, is_leaf=is_quantised))
    )
    trained = jax.tree.leaves(split(state.params, trains)[0])
    per_row = run.model_flops() / run.trainer.passes(state) / 2
    hidden = sum(
      matmul_flops(self._hidden(run), state.params["model"], inputs)
      for inputs in self.calls
    )
    attention, tiles = self._attention()
    return Facts(
      parameters=count,
      trained=sum(map(_count, trained)) / count,
      forward=per_row,
      attention=attention,
      tiles=tiles,
      vocabulary=per_row - hidden / 2,
      state=state,
      trains=trains,
    )

  def _attention(self) -> tuple[float, dict[str, float]]:
    """Returns the FLOPs of a product, and the share that tiles leave of them."""
    network, kernels = self.network, {"splash": splash, "flash": flash}
    wide = network.heads * network.head_dim
    whole, visited = 0.0, dict.fromkeys(kernels, 0.0)
    for inputs in self.calls:
      length = inputs.segment_ids.shape[1]
      flops = 2.0 * length**2 * wide * network.layers
      whole += flops
      for name, kernel in kernels.items():
        visited[name] += flops * kernel.visited(inputs.mask, length)
    shares = {name: flops / whole for name, flops in visited.items()}
    return whole / len(self.calls), shares

  def _hidden(self, run: Run):
    return lambda params, inputs: run.denoiser.apply(params, inputs)[0].hidden

  @functools.cache  # noqa: B019 -- lives as long as the plan
  def remat(self, policy: str) -> tuple[float, float]:
    """Returns what a remat policy costs a row.

    FLOPs of network passes forward and backward, recomputation included, and
    bytes kept for the backward pass. Kernels keep no scores, so that none count.
    """
    run = self._run({"remat": policy})
    hidden, flops, kept = self._hidden(run), 0.0, 0.0
    trains = run.program.trains
    params = run.program.abstract.params["model"]
    trained, frozen = split(params, trains and trains["model"])
    whole = lambda trained, frozen, inputs: hidden(
      join(trained, frozen), inputs
    )

    def gradient(trained, frozen, inputs):
      total = lambda trained: jnp.sum(
        whole(trained, frozen, inputs), dtype=jnp.float32
      )
      return jax.grad(total)(trained)

    for inputs, one in zip(self.calls, self._called(1), strict=True):
      length = inputs.segment_ids.shape[1]
      with any_device():
        flops += matmul_flops(gradient, trained, frozen, inputs)
        few = _residuals(whole, trained, frozen, one)
        many = _residuals(whole, trained, frozen, inputs)
      for small, large in zip(few, many, strict=True):
        size = (large.size - small.size) * large.dtype.itemsize
        streams = (length, length // 2)  # the two of block diffusion, apart
        scores = large.ndim > 4 and set(large.shape[-2:]) <= set(streams)
        kept += 0.0 if scores else size
    return flops / 2, kept


def _residuals(whole, trained, frozen, inputs):
  """Returns what is kept for the gradient of what trains."""

  def backward(trained, frozen, inputs):
    return jax.vjp(lambda x: whole(x, frozen, inputs), trained)[1]

  return jax.tree.leaves(jax.eval_shape(backward, trained, frozen, inputs))


def _count(parameter) -> int:
  """Returns how many numbers a parameter has, in however many bits."""
  return getattr(parameter, "qvalue", parameter).size


def plain(resolved: ConfigDict) -> ConfigDict:
  """Returns a configuration without kernels, on one device."""
  resolved = ConfigDict(resolved.to_dict())
  resolved.model.attention = None
  if "experts_implementation" in resolved.model:
    resolved.model.experts_implementation = "ragged"
  for axis in resolved.mesh:
    resolved.mesh[axis] = 1
  return resolved


def state_bytes(
  state, sizes: Mapping[str, int], trains=None
) -> dict[str, float]:
  """Returns a device's bytes of a train state, by kind.

  Args:
    state: shapes and types.
    sizes: the mesh.
    trains: True at the parameters that train; None if all do.

  Raises:
    ValueError: the mesh does not divide an array.
  """
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  placed = shardings(state, mesh, RULES)

  def size(tree, where):
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True)
    return float(
      sum(
        math.prod(s.shard_shape(x.shape)) * itemsize(x.dtype) for x, s in leaves
      )
    )

  own, rest = split(state.params, trains)
  own_places, places = split(placed.params, trains)
  kinds = {
    "parameters": size((own, state.process), (own_places, placed.process)),
    "optimizer": size(state.opt_state, placed.opt_state),
  }
  if trains is not None:
    kinds["frozen"] = size(rest, places)
  if state.ema_params is not None:
    kinds["average"] = size(state.ema_params, placed.ema_params)
  return kinds


def itemsize(dtype) -> float:
  """Returns the bytes of a number on an accelerator, two of 4 bits in one."""
  return jax.dtypes.itemsize_bits(dtype) / 8
