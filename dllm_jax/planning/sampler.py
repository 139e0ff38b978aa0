"""The sampler's program, lowered for a machine that is not here."""

from collections.abc import Mapping
import math

import jax
import numpy as np

from dllm_jax.evaluation.samples import traffic
from dllm_jax.parallel import compilation
from dllm_jax.planning import hlo
from dllm_jax.planning.facts import itemsize, state_bytes
from dllm_jax.run.run import Run
from dllm_jax.sampling.launch import held, Launcher
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler


def build(run: Run) -> Sampler:
  """Returns the sampler, on canvases as long as training rows."""
  return run.config.sampler.build(
    run.objective,
    length=run.config.data.length,
    end_ids=run.tokenizer.end_ids,
  )


def lowered(run: Run, built: Sampler, rows: int):
  """Returns the lowered sampler and bytes by kind; canvases have no prompt.

  Args:
    run: whose network.
    built: how it samples.
    rows: rows sampled together, over all devices.
  """
  state, shape = run.served.abstract, (rows, built.length)
  ones = lambda kind, dims=shape: jax.ShapeDtypeStruct(dims, kind)
  requests = Requests(
    tokens=ones(np.int32),
    fixed=ones(bool),
    valid=ones(bool),
    request=ones(np.int32, (rows,)),
  )
  params = state.eval_params
  process = state.process.replace(params=params["process"])
  key = jax.eval_shape(lambda: jax.random.key(0))
  with jax.set_mesh(run.mesh):
    with compilation.not_kept():
      model = held(run.denoiser, params["model"])
    program = Launcher(built, run.denoiser).lower(model, process, key, requests)
  kinds = state_bytes(state, run.mesh.shape)
  kinds = {"parameters": kinds.get("average", kinds["parameters"])}
  return program, kinds


def rounds(built: Sampler) -> tuple[int, ...]:
  """Returns how often its loops run: blocks, refreshing passes, calls."""
  most = max(built.steps + built.policy.extra, built.least_calls)
  blocks = () if built.blocks == 1 else (built.blocks,)
  if built.cache not in ("prefix", "dual"):
    return (*blocks, most)
  every = min(built.refresh or most, most)
  return (*blocks, -(-most // every), max(every - 1, 1))


def call(text: str, run: Run, built: Sampler, rows: int) -> dict[str, float]:
  """Returns what one call of the network moves, and what it has to, in bytes.

  That is the weights, read once, and with a cache its keys and values, read once,
  and those of the slots that the call computes, written once if they are kept. A
  row of the table of embeddings is read for each slot, and no more of it.

  Args:
    text: the optimised program.
    run: whose network.
    built: how it samples.
    rows: rows sampled together, over all devices.
  """
  found = hlo.innermost(text, rounds=rounds(built))
  least = {"weights": _bytes(traffic.weights(run))}
  copies, length = 0.0, built.length
  if built.cache != "none":
    cache = jax.eval_shape(lambda: run.denoiser.cache(rows, length))
    here = run.mesh.size // run.mesh.shape["context"]
    # Of a network with several kinds of layers, a stack of each.
    stacks = [
      x.size * x.dtype.itemsize / here for x in jax.tree.leaves(cache.key)
    ]
    whole, wide = sum(stacks), built.block_length
    if built.cache == "prefix":
      wide = built.reach or length
    least["cache"], least["block"] = 2 * whole, 2 * whole * wide / length
    if built.objective.two_passes:  # whose blocks are not written
      least["block"] = 0.0
    copies = found.whole(max(stacks))
  total = sum(least.values())
  return {
    "moved": found.moved,
    **least,
    "ratio": found.moved / total,
    "cache_copies": copies,
  }


def _bytes(params: Mapping) -> float:
  """Returns a device's share of some parameters."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * itemsize(x.dtype)
    for x in jax.tree.leaves(params)
  )
