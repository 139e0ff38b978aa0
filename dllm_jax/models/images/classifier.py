"""A small classifier of pictures, whose features compare distributions.

Three convolutions that halve the picture twice, `width` features, a logit for
each class. Parameter paths: `conv{0,1,2}/{kernel,bias}`, `features/...`,
`classes/...`.
"""

import dataclasses

from flax import linen as nn
import jax
from jaxtyping import Array, Float, Key, PyTree

from dllm_jax.core import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
  """A classifier as pure functions.

  Attributes:
    classes: how many there are.
    channels: of the convolutions.
    width: features of a picture.
  """

  classes: int
  channels: tuple[int, ...] = (16, 32, 32)
  width: int = 64

  def __post_init__(self):
    check.at_least(self, 2, "classes")

  def init(
    self, key: Key[Array, ""], pixels: Float[Array, "B H W 3"]
  ) -> PyTree:
    """Returns fresh parameters for pictures of a size."""
    return _Network(self).init({"params": key}, pixels)["params"]

  def apply(
    self, params: PyTree, pixels: Float[Array, "B H W 3"]
  ) -> tuple[Float[Array, "B classes"], Float[Array, "B width"]]:
    """Returns the logits and the features of pictures in [-1, 1]."""
    return _Network(self).apply({"params": params}, pixels)


class _Network(nn.Module):
  config: Classifier

  @nn.compact
  def __call__(self, x):
    for i, channels in enumerate(self.config.channels):
      stride = 1 if i == 0 else 2
      x = nn.Conv(channels, (3, 3), strides=stride, name=f"conv{i}")(x)
      x = jax.nn.swish(x)
    x = x.reshape(x.shape[0], -1)
    features = jax.nn.swish(nn.Dense(self.config.width, name="features")(x))
    return nn.Dense(self.config.classes, name="classes")(features), features
