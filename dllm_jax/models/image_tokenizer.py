"""MAGVIT-v2's image tokenizer, as Show-o and MMaDA use it (arXiv:2310.05737).

A convolutional autoencoder whose code is the signs of its features
(`core.images.lookup_free`). Pictures are `[B, H, W, 3]` in [-1, 1]; each level but the
last halves them, rounding down, so that five levels have 16 x 16 pixels a token:

    pixels -> encoder -> features [B, h, w, bits] -> signs -> decoder -> pixels

Parameter paths, `side` encoder or decoder:

    side/conv_in/{kernel,bias}            [3, 3, in, out], [out]
    side/down{i}_block{j}/...             (encoder; norm1, conv1, norm2, conv2,
                                          nin_shortcut where channels change)
    side/down{i}_downsample/{kernel,bias} (encoder, all levels but the last)
    side/mid_block{1,2}/..., side/mid_attn_1/{norm,q,k,v,proj_out}
    side/up{i}_block{j}/...               (decoder, from the last level to 0)
    side/up{i}_upsample/{kernel,bias}     (decoder, all levels but 0)
    side/{norm_out,conv_out}, encoder/quant_conv, decoder/post_quant_conv
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dllm_jax.core import check
from dllm_jax.core.images import lookup_free
from dllm_jax.core.types import Denoiser, ModelInputs, ModelOutputs
from dllm_jax.models.adapters import ADAPTERS, LoRA

_EPS = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTokenizerConfig:
  """The shape of an image tokenizer; the defaults are the published one's.

  Attributes:
    vocab_size: values of a pixel, all channels together; not of codes.
    bits: channels of a code; there are 2^bits of them.
    stem: channels of the encoder's first convolution.
    encoder_channels: of each level, from the pixels on.
    encoder_blocks: residual blocks of each level.
    decoder_channels: of each level, from the pixels on.
    decoder_blocks: residual blocks of each level.
    groups: of channels that are normalised together, a divisor of all.
    adapter: there is none.
  """

  vocab_size: int = 2**24
  bits: int = 13
  stem: int = 128
  encoder_channels: tuple[int, ...] = (128, 256, 256, 512, 512)
  encoder_blocks: tuple[int, ...] = (4, 3, 4, 3, 4)
  decoder_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
  decoder_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)
  groups: int = 32
  adapter: LoRA = dataclasses.field(
    default=LoRA(), metadata={"choices": ADAPTERS}
  )

  def __post_init__(self):
    check.at_least(self, 1, "bits", "stem", "groups")
    shapes = ("encoder_channels", "encoder_blocks")
    shapes += ("decoder_channels", "decoder_blocks")
    for name in shapes:
      object.__setattr__(self, name, tuple(getattr(self, name)))
    levels = {len(getattr(self, name)) for name in shapes}
    if len(levels) != 1 or 0 in levels:
      raise ValueError(
        f"{', '.join(shapes)} must have one number a level each, as many as"
        f" each other, not {[len(getattr(self, n)) for n in shapes]}"
      )
    wrong = [c for c in self._channels if c < 1 or c % self.groups]
    if wrong:
      raise ValueError(
        f"channels {wrong[0]} must be a multiple of groups {self.groups};"
        " change either"
      )
    if self.adapter.rank:
      raise ValueError("an image tokenizer has no adapters: leave them out")

  @property
  def _channels(self) -> tuple[int, ...]:
    return (self.stem, *self.encoder_channels, *self.decoder_channels)

  @property
  def codes(self) -> int:
    """The number of codes."""
    return 2**self.bits

  @property
  def side(self) -> int:
    """Pixels of a token's side."""
    return 2 ** (len(self.encoder_channels) - 1)


def image_tokenizer(config: ImageTokenizerConfig) -> Denoiser:
  """Returns the autoencoder as `(init, apply)`, for the trainer.

  `apply` takes square pictures as rows of pixels, `[B, H W, 3]`, and returns
  them as `hidden`, with their features in `aux`.
  """
  module = _Autoencoder(config)

  def init(key, inputs):
    return module.init({"params": key}, inputs)["params"]

  def apply(params, inputs, cache=None):
    return module.apply({"params": params}, inputs), None

  return Denoiser(init, apply)


def features(
  config: ImageTokenizerConfig,
  params: PyTree,
  pixels: Float[Array, "B H W 3"],
) -> Float[Array, "B h w bits"]:
  """Returns what codes are the signs of.

  Raises:
    ValueError: the pictures are smaller than a token.
  """
  if min(pixels.shape[1:3]) < config.side:
    raise ValueError(
      f"pictures of {pixels.shape[2]} x {pixels.shape[1]} pixels are smaller"
      f" than a token, which has {config.side} x {config.side}"
    )
  encoder = Encoder(config)
  return encoder.apply({"params": params["encoder"]}, pixels)


def encode(
  config: ImageTokenizerConfig,
  params: PyTree,
  pixels: Float[Array, "B H W 3"],
) -> Int[Array, "B h w"]:
  """Returns the code numbers of pictures in [-1, 1]."""
  return lookup_free.ids(features(config, params, pixels))


def decode(
  config: ImageTokenizerConfig, params: PyTree, ids: Int[Array, "B h w"]
) -> Float[Array, "B H W 3"]:
  """Returns pictures, in about [-1, 1], of code numbers."""
  codes = lookup_free.code_of(ids, config.bits)
  decoder = Decoder(config)
  return decoder.apply({"params": params["decoder"]}, codes)


class _Autoencoder(nn.Module):
  config: ImageTokenizerConfig

  @nn.compact
  def __call__(self, inputs: ModelInputs) -> ModelOutputs:
    rows, pixels, channels = inputs.latent.shape
    side = round(pixels**0.5)
    if side * side != pixels or side % self.config.side:
      raise ValueError(
        f"rows of {pixels} pixels are no square of whole tokens, whose side is"
        f" {self.config.side}: change data.length"
      )
    square = inputs.latent.reshape(rows, side, side, channels)
    z = Encoder(self.config, name="encoder")(square)
    again = Decoder(self.config, name="decoder")(
      lookup_free.straight_through(z)
    )
    return ModelOutputs(
      hidden=again.reshape(rows, pixels, -1), aux={"features": z}
    )


class Encoder(nn.Module):
  """Pixels to features; see the module."""

  config: ImageTokenizerConfig

  @nn.compact
  def __call__(self, x):
    """Returns `[B, h, w, bits]`, or wider where `bits` is another number."""
    c = self.config
    x = _conv(c.stem, name="conv_in")(x)
    last = len(c.encoder_channels) - 1
    levels = zip(c.encoder_channels, c.encoder_blocks, strict=True)
    for i, (channels, blocks) in enumerate(levels):
      for j in range(blocks):
        x = Residual(channels, c.groups, name=f"down{i}_block{j}")(x)
      if i < last:
        # A row below and a column to the right, and nothing on the other sides.
        x = _halved(channels, name=f"down{i}_downsample")(x)
    x = _middle(x, c.groups)
    x = _conv(c.bits, name="conv_out")(_swish_norm(c.groups, "norm_out")(x))
    return _conv(c.bits, 1, name="quant_conv")(x)


class Decoder(nn.Module):
  """Codes to pixels; see the module."""

  config: ImageTokenizerConfig

  @nn.compact
  def __call__(self, x):
    """Returns `[B, H, W, 3]`."""
    c = self.config
    x = _conv(c.bits, 1, name="post_quant_conv")(x)
    x = _conv(c.decoder_channels[-1], name="conv_in")(x)
    x = _middle(x, c.groups)
    for i in reversed(range(len(c.decoder_channels))):
      channels = c.decoder_channels[i]
      for j in range(c.decoder_blocks[i]):
        x = Residual(channels, c.groups, name=f"up{i}_block{j}")(x)
      if i:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = _conv(channels, name=f"up{i}_upsample")(x)
    return _conv(3, name="conv_out")(_swish_norm(c.groups, "norm_out")(x))


class Residual(nn.Module):
  """x + conv(swish(norm(conv(swish(norm x))))); a 1 x 1 of x to new channels."""

  channels: int
  groups: int

  @nn.compact
  def __call__(self, x):
    """Returns the same picture, of `channels`."""
    h = _conv(self.channels, name="conv1")(_swish_norm(self.groups, "norm1")(x))
    h = _conv(self.channels, name="conv2")(_swish_norm(self.groups, "norm2")(h))
    if x.shape[-1] != self.channels:
      x = _conv(self.channels, 1, name="nin_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """x + one head of attention over all places, row by row, of norm(x)."""

  groups: int

  @nn.compact
  def __call__(self, x):
    """Returns the same picture."""
    batch, height, width, channels = x.shape
    h = _norm(self.groups, "norm")(x)
    q, k, v = (
      _conv(channels, 1, name=name)(h).reshape(batch, -1, channels)
      for name in ("q", "k", "v")
    )
    scores = jnp.einsum("bqc,bkc->bqk", q, k) * channels**-0.5
    y = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores), v)
    y = y.reshape(batch, height, width, channels)
    return x + _conv(channels, 1, name="proj_out")(y)


def _middle(x, groups):
  channels = x.shape[-1]
  x = Residual(channels, groups, name="mid_block1")(x)
  x = Attention(groups, name="mid_attn_1")(x)
  return Residual(channels, groups, name="mid_block2")(x)


def _conv(channels: int, size: int = 3, *, name: str) -> nn.Conv:
  return nn.Conv(channels, (size, size), padding=size // 2, name=name)


def _halved(channels: int, *, name: str) -> nn.Conv:
  sides = ((0, 1), (0, 1))
  return nn.Conv(channels, (3, 3), strides=2, padding=sides, name=name)


def _norm(groups: int, name: str) -> nn.GroupNorm:
  # The variance of differences from the mean: flat pictures have next to none.
  return nn.GroupNorm(groups, epsilon=_EPS, use_fast_variance=False, name=name)


def _swish_norm(groups: int, name: str):
  norm = _norm(groups, name)
  return lambda x: nn.swish(norm(x))
