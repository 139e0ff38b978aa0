"""Splash attention on TPU: mask specs become tiles, empty tiles cost nothing.

Pallas kernels cannot be divided by the compiler, so under a mesh each device
runs its own rows, heads and queries, against the keys of all. Imported for `dllm_jax.models.attention` alone.
"""

import dataclasses

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.axes import axis_size, BATCH_AXES, CONTEXT, platform, TENSOR
from dllm_jax.core.mask import Causal, Full, MaskSpec
from dllm_jax.models.attention.context import all_keys

_TILE = 128
_LARGEST_TILE = 512


@dataclasses.dataclass(frozen=True)
class _SpecMask(kernels.splash_attention_mask.Mask):
  """A mask spec that the kernel reads tile by tile."""

  spec: MaskSpec
  size: tuple[int, int]

  @property
  def shape(self) -> tuple[int, int]:
    return self.size

  def __getitem__(self, index) -> np.ndarray:
    q, k = (np.arange(n)[i] for n, i in zip(self.size, index, strict=True))
    return self.spec.allowed(q[:, None], k[None, :])


def _mask(spec: MaskSpec, size: tuple[int, int]):
  if isinstance(spec, Full):
    return kernels.FullMask(size)
  if isinstance(spec, Causal):
    return kernels.CausalMask(size)
  return _SpecMask(spec, size)


def attention(q, k, v, spec, q_segments, k_segments, *, interpret=False):
  """Returns attention by the splash kernel; arguments as in `attention`.

  Raises:
    ValueError: where the kernel cannot run: off a TPU, or with a length on a
      device that is not a multiple of 128.
  """
  if not interpret and platform() != "tpu":
    raise ValueError(
      f"attention 'splash' needs a TPU, not {platform()}; use 'xla'"
    )
  shards = axis_size(CONTEXT)
  size = (q.shape[1], k.shape[1])
  if size[0] % (shards * _TILE) or size[1] % _TILE:
    raise ValueError(
      f"attention 'splash' needs lengths that are multiples of {_TILE} on each"
      f" device, not {size[0]} and {size[1]} over {shards}; use 'xla'"
    )
  heads = q.shape[2] // axis_size(TENSOR)
  kernel = make_kernel(spec, size, heads, shards, interpret=interpret)

  def local(kernel, q, k, v, q_segments, k_segments):
    if shards > 1:
      k, v, k_segments = all_keys(k, v, k_segments)
    q = q * q.shape[-1] ** -0.5
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.vmap(
      lambda q, k, v, a, b: kernel(
        q, k, v, segment_ids=kernels.SegmentIds(a, b)
      )
    )(q, k, v, q_segments, k_segments)
    return jnp.swapaxes(out, 1, 2)

  mesh = jax.sharding.get_abstract_mesh()
  rows = tuple(a for a in BATCH_AXES if a in mesh.shape)
  if mesh.empty or not rows:
    return local(kernel, q, k, v, q_segments, k_segments)
  tensor = TENSOR if TENSOR in mesh.shape else None
  context = CONTEXT if shards > 1 else None
  here, segments = jax.P(rows, context, tensor), jax.P(rows, context)
  tiles = jax.NamedSharding(mesh, jax.P(None, context))
  return jax.shard_map(
    local,
    in_specs=(
      kernel.manual_sharding_spec(tiles),
      *(here, here, here, segments, segments),
    ),
    out_specs=here,
    check_vma=False,
  )(kernel, q, k, v, q_segments, k_segments)


def make_kernel(
  spec: MaskSpec,
  size: tuple[int, int],
  heads: int,
  shards: int = 1,
  *,
  interpret: bool = False,
):
  """Returns the kernel of a mask, which knows the tiles that are not empty.

  Args:
    spec: the mask.
    size: queries and keys, over all devices.
    heads: query heads on a device.
    shards: devices that divide the queries.
    interpret: whether to run it step by step, for tests off a TPU.
  """
  return kernels.make_splash_mha(
    kernels.MultiHeadMask([_mask(spec, size)] * heads),
    block_sizes=_block_sizes(size[0] // shards, size[1]),
    head_shards=1,
    q_seq_shards=shards,
    interpret=interpret,
  )


def visited(spec: MaskSpec, length: int) -> float:
  """Returns the share of all places that lie in tiles which are not empty.

  Args:
    spec: the mask.
    length: queries, and keys; 1 is returned where tiles do not divide it.
  """
  if length % _TILE:
    return 1.0
  tile, k = _largest_tile(length), np.arange(length)
  found = 0
  for q in np.split(k, length // tile):
    allowed = spec.allowed(q[:, None], k[None, :])
    allowed = np.broadcast_to(allowed, (tile, length))
    found += np.count_nonzero(allowed.reshape(tile, -1, tile).any(axis=(0, 2)))
  return found / (length // tile) ** 2


def _largest_tile(length: int) -> int:
  tiles = range(_LARGEST_TILE, 0, -_TILE)
  return next(tile for tile in tiles if length % tile == 0)


def _block_sizes(q_length: int, k_length: int):
  q, k = _largest_tile(q_length), _largest_tile(k_length)
  return kernels.BlockSizes(
    block_q=q,
    block_kv=k,
    block_kv_compute=k,
    block_q_dkv=q,
    block_kv_dkv=k,
    block_kv_dkv_compute=k,
    block_q_dq=q,
    block_kv_dq=k,
  )
