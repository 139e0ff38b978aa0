"""What a sampler computes and moves: FLOPs, and bytes from and to memory.

Counted from shapes, not measured. FLOPs are those of the matrix products of the
network and the unembedding at the slots that a call recomputes. Bytes are the
weights, read once a call whatever the rows, and with a cache its keys and values,
read whole and written where the call recomputes; activations are taken to stay
on the chip. Their quotient is what decides whether a machine computes or waits.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp

from dllm_jax.core.flops import any_device, matmul_flops
from dllm_jax.core.types import Batch
from dllm_jax.parallel.hardware import Chip
from dllm_jax.run.run import Run
from dllm_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
  """The cost of a generation, all rows together.

  Attributes:
    flops: of matrix products.
    bytes: moved from and to memory.
  """

  flops: float
  bytes: float

  def __add__(self, other: "Traffic") -> "Traffic":
    return Traffic(
      flops=self.flops + other.flops, bytes=self.bytes + other.bytes
    )

  def __sub__(self, other: "Traffic") -> "Traffic":
    return self + other * -1

  def __mul__(self, times: float) -> "Traffic":
    return Traffic(flops=self.flops * times, bytes=self.bytes * times)

  def seconds(self, chip: Chip) -> float:
    """Returns the least time of it, in seconds: of products or of memory.

    max(FLOPs / (e F), bytes / (e_m R)) for the peaks F and R of a chip and the
    shares e and e_m of them that are taken to be reached (`parallel.hardware`).
    """
    return max(
      self.flops / (chip.flops * chip.matmul_efficiency),
      self.bytes / (chip.memory_rate * chip.memory_efficiency),
    )


def weights(run: Run) -> Mapping:
  """Returns the parameters that a call reads whole.

  Of a table of embeddings that is nothing else, rows are looked up.
  """
  params = dict(run.served.abstract.params["model"])
  if not run.network.tied and run.network.latent_dim is None:
    params.pop("embed")
  return params


def call(run: Run, *, rows: int, slots: int, cached: int = 0) -> Traffic:
  """Returns the cost of one call of the network.

  Args:
    run: whose network.
    rows: rows of the batch.
    slots: slots of a row that are computed.
    cached: slots of the cache; 0 for none.
  """
  params = run.served.abstract.params["model"]
  cache = kept(run, rows=rows, slots=cached) if cached else None
  shape = (rows, slots)
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
  process = run.served.abstract.process

  def logits(params, process, tokens, cache):
    batch = Batch(
      tokens=tokens,
      loss_mask=jnp.ones(shape, bool),
      segment_ids=jnp.ones(shape, jnp.int32),
      positions=jnp.zeros(shape, jnp.int32),
    )
    z = run.objective.clean(process, tokens)
    inputs = run.objective.inputs(process, z, jnp.zeros((rows, 1)), batch)
    if cache is not None:
      inputs = inputs.replace(slot=jnp.zeros((rows,), jnp.int32))
    out = run.denoiser.apply(params, inputs, cache)[0]
    return out.hidden if out.unembed is None else out.hidden @ out.unembed

  moved = size(weights(run))
  if cache is not None:
    moved += size((cache.key, cache.value)) * (1 + slots / cached)
  with any_device():
    flops = matmul_flops(logits, params, process, tokens, cache)
  return Traffic(flops=flops, bytes=moved)


def kept(run: Run, *, rows: int, slots: int):
  """Returns the shapes of a cache."""
  return jax.eval_shape(lambda: run.denoiser.cache(rows, slots))


def size(tree) -> int:
  """Returns the bytes of some arrays."""
  return sum(
    x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)
  )


def generation(
  run: Run, sampler: Sampler, *, rows: int, calls: float
) -> Traffic:
  """Returns the cost of a generation from an empty canvas.

  Args:
    run: whose network.
    sampler: how it was sampled.
    rows: rows of the batch.
    calls: network calls, as `Generation.function_evaluations` counts them.
  """
  canvas = sampler.length
  whole = call(run, rows=rows, slots=canvas)
  if sampler.cache == "none":
    return whole * calls
  width = sampler.block_length or canvas
  part = call(run, rows=rows, slots=width, cached=canvas)
  if sampler.cache == "block":
    return part * calls
  # Approximate caches: the canvas is passed over when a block is entered, and
  # every `refresh` calls. The prefix cache recomputes what follows as well, half
  # of the canvas on average.
  if sampler.cache == "prefix":
    part = call(run, rows=rows, slots=(canvas + width) // 2, cached=canvas)
  blocks = -(-canvas // width)
  fresh = calls / sampler.refresh if sampler.refresh else blocks
  fresh = max(min(fresh, calls), min(blocks, calls))
  full = call(run, rows=rows, slots=canvas, cached=canvas)
  return full * fresh + part * (calls - fresh)
