r"""Control by gradients: a classifier of noisy latents steers a Gaussian process.

The classifier p(y | z_t) is trained by the ordinary train step, as the objective
`LatentClassifier`. In sampling, `Controlled` moves the mean m of each reverse step
by a few Adagrad steps up

    log p(y | z) - pull |z - m|^2 / variance

and then adds the step's noise (arXiv:2205.14217, sec. 5.1). Its parameters and
labels travel in the process, so that another label compiles nothing.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dllm_jax.core import check
from dllm_jax.core.types import (
  Batch,
  Denoise,
  Loss,
  ModelInputs,
  Noise,
  Process,
)
from dllm_jax.sampling.policies.ancestral import Outputs, Stepwise
from dllm_jax.sampling.policies.selection import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentClassifier:
  """Learns which of `classes` a row's `Batch.cond` is, from its noisy latents.

  The latents are those of a trained diffusion: put its process under
  `constants["diffusion"]` of the train state's process before the first step.
  The network maps latents to `classes` features a position, which are averaged.

  Attributes:
    diffusion: the objective whose latents are read; a Gaussian one.
    classes: the number of labels.
  """

  diffusion: Any
  classes: int

  def __post_init__(self):
    check.at_least(self, 2, "classes")
    if not hasattr(self.diffusion, "step_law"):
      raise ValueError(
        "control by gradients needs a Gaussian process such as diffusion_lm, "
        f"not {type(self.diffusion).__name__}"
      )

  def network_fields(self) -> dict[str, Any]:
    """Returns what the classifier needs of a network."""
    return self.diffusion.network_fields() | {"output_dim": self.classes}

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns the arrays of a fresh diffusion, to be replaced by trained ones."""
    return Process(constants={"diffusion": self.diffusion.init(key)})

  def clean(self, process: Process, tokens: Int[Array, "B T"]) -> PyTree:
    """Returns the latent of known tokens."""
    return self.diffusion.clean(process.constants["diffusion"], tokens)

  def inputs(
    self, process: Process, z: PyTree, t: Float[Array, "B #T"], batch: Batch
  ) -> ModelInputs:
    """Returns what the network sees, the label left out."""
    process = process.constants["diffusion"]
    inputs = self.diffusion.inputs(process, z, t, batch)
    return inputs.replace(cond=None)

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> PyTree:
    """Returns the randomness of the diffusion's own loss."""
    process = process.constants["diffusion"]
    return self.diffusion.draw(process, key, batch, step=step)

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: PyTree,
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the cross-entropy of rows' labels, in nats per row."""
    latent = process.constants["diffusion"]
    z = self.diffusion.noisy(latent, drawn, batch)
    inputs = self.inputs(process, z, drawn.t, batch)
    log_p = log_labels(denoise, inputs)
    nats = -jnp.take_along_axis(log_p, batch.cond[:, None], axis=1)[:, 0]
    right = jnp.argmax(log_p, axis=1) == batch.cond
    return Loss(
      total=jnp.sum(nats),
      weight=jnp.float32(nats.shape[0]),
      bound=jnp.zeros(batch.tokens.shape),
      metrics={"accuracy": jnp.mean(right)},
    )


def log_labels(
  denoise: Denoise, inputs: ModelInputs
) -> Float[Array, "B classes"]:
  """Returns log p(y | z) of rows: the mean over visible positions, normalised."""
  features = denoise(inputs).hidden.astype(jnp.float32)
  visible = (inputs.segment_ids > 0)[..., None]
  count = jnp.maximum(jnp.sum(visible, axis=1), 1)
  mean = jnp.sum(jnp.where(visible, features, 0.0), axis=1) / count
  return jax.nn.log_softmax(mean)


def steered(
  process: Process, params: PyTree, labels: Int[Array, "B"]
) -> Process:
  """Returns the process with a classifier's parameters and the labels wanted."""
  control = {"params": params, "label": jnp.asarray(labels, jnp.int32)}
  return process.replace(constants={**process.constants, "control": control})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controlled(Stepwise):
  """Draws z_s around a mean that a classifier has moved; whole canvases only.

  Attributes:
    classify: the classifier's network, `Denoiser.apply`.
    updates: Adagrad steps at each reverse step.
    rate: their learning rate.
    pull: how strongly the process's own mean holds.
    until: times s at or below this are left alone; there tokens are settled.
  """

  classify: Callable[..., Any]
  updates: int = 3
  rate: float = 0.1
  pull: float = 0.01
  until: float = 0.0

  proposes = False

  def __post_init__(self):
    super().__post_init__()
    LatentClassifier(diffusion=self.objective, classes=2)
    if self.updates < 0 or self.rate <= 0 or self.pull < 0:
      raise ValueError(
        "control needs updates >= 0, rate > 0 and pull >= 0, not "
        f"{self.updates}, {self.rate} and {self.pull}"
      )

  def step(
    self,
    process: Process,
    noise: Noise,
    out: Outputs,
    z: PyTree,
    state: Progress,
    active: Bool[Array, "B W"],
    *,
    window: Int[Array, "B W"] | None = None,
    **unused: Any,
  ) -> tuple[PyTree, Progress, dict[str, Array]]:
    """Returns (z, state, info) after one network evaluation.

    Raises:
      ValueError: a window was given: the classifier reads whole canvases.
    """
    if window is not None:
      raise ValueError("control needs the whole canvas: leave block_length out")
    t, s = self.times(state.step), self.times(state.step + 1)
    mean, variance = self.objective.step_law(process, out, z, t, s)
    moved = self._moved(process, mean, variance, s)
    free = active[..., None] & (s > self.until)[..., None]
    mean = jnp.where(free, moved, mean)
    z = self.objective.perturb(noise, mean, variance, s)
    return z, state.replace(step=state.step + 1), {}

  def _moved(self, process, mean, variance, s):
    """Returns the mean after its Adagrad steps."""
    control = process.constants["control"]
    shape = mean.shape[:2]
    ones = jnp.ones(shape, jnp.int32)
    canvas = Batch(
      tokens=jnp.zeros(shape, jnp.int32),
      loss_mask=ones.astype(bool),
      segment_ids=ones,
      positions=jnp.broadcast_to(jnp.arange(shape[1]), shape),
    )

    def denoise(inputs):
      return self.classify(control["params"], inputs, None)[0]

    def wanted(x):
      inputs = self.objective.inputs(process, x, s, canvas)
      log_p = log_labels(denoise, inputs)
      label = control["label"][:, None]
      gain = jnp.sum(jnp.take_along_axis(log_p, label, axis=1))
      safe = jnp.where(variance > 0, variance, 1.0)
      return gain - self.pull * jnp.sum(jnp.square(x - mean) / safe)

    def ascend(carry, _):
      x, squares = carry
      gradient = jax.grad(wanted)(x)
      squares += jnp.square(gradient)
      # A feature without a gradient stays where it is.
      x += self.rate * gradient / (jnp.sqrt(squares) + 1e-10)
      return (x, squares), None

    start = (mean, jnp.zeros_like(mean))
    return jax.lax.scan(ascend, start, length=self.updates)[0][0]
