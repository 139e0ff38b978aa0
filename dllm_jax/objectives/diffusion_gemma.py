r"""DiffusionGemma: canvases of uniform noise behind a causally read text.

A row is a text whose answer is cut into canvases of C tokens, counted from the
answer's first. Its clean tokens are read once, causally; one canvas a row is
corrupted, each token replaced by a uniform one with probability t ~ U(e, 1 - e),
and restored at once by a second pass that sees itself both ways and what lies
before it as it was read. With k of the canvas's tokens counted,

    L = -1/k sum_i log p(x0_i | z, before) + w mean_j -log p(x0_j | x0_<j),

without a weight by time, and the mean over rows. In half of the rows the second
pass is told what it said of the canvas before (self-conditioning; the first time
has no gradient). The published weights come without a paper: after the
fine-tuning adapter of google-deepmind/gemma at 7691fd4 (`diffusion`).

The loss is no likelihood bound. What is reported is one (`untimed`), over canvases
from left to right and from the same pass: a canvas stands for all of its row.
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple, Self

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.mask import Causal
from dllm_jax.core.schedule import Linear
from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import (
  Batch,
  Denoise,
  Loss,
  ModelInputs,
  ModelOutputs,
  Process,
)
from dllm_jax.core.vocabulary import cross_entropy, mean_embedding, reduce
from dllm_jax.objectives.base import check_choice, Discrete, Drawn, TokenSpace
from dllm_jax.objectives.mixture import vocabulary_without_mask
from dllm_jax.objectives.texts import begins_segment, FillKind, unshifted
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.objectives.untimed import EarlyEnd

Without = Literal["zero", "mean"]


@struct.dataclass
class OneCanvas(Drawn):
  """The randomness of a loss.

  Attributes:
    noise: the token that replaces each slot's, -1 where it is kept.
    canvas: which of its row's canvases is trained, a share of them in [0, 1).
    conditioned: rows whose second pass is told what the first one said.
  """

  noise: Int[Array, "B L"] | None = None
  canvas: Float[Array, "B"] | None = None
  conditioned: Bool[Array, "B"] | None = None


class Canvas(NamedTuple):
  """One canvas of each row, `[B, C]`.

  Attributes:
    slots: where its tokens stand in the row; from L on past its end.
    x0: its clean tokens, end-of-text behind its answer's last.
    z: its corrupted tokens.
    seen: slots that take part.
    text: of them, those that hold the row's own tokens.
    counted: those whose cross-entropy counts.
    number: canvases of the row; 0: it has none, and nothing counts.
  """

  slots: Int[Array, "B C"]
  x0: Int[Array, "B C"]
  z: Int[Array, "B C"]
  seen: Bool[Array, "B C"]
  text: Bool[Array, "B C"]
  counted: Bool[Array, "B C"]
  number: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionGemma(Discrete):
  """Uniform diffusion of canvases behind a causal pass (DiffusionGemma).

  Attributes:
    eos_id: what fills a canvas behind its answer, or None.
    image_id: the token that stands for pictures, which no prompt may have; or
      None.
    canvas: tokens of a canvas (C).
    time_rule: how training times are drawn over the global batch.
    time_epsilon: training times lie in [time_epsilon, 1 - time_epsilon).
    self_conditioning: share of rows that are told what the first pass said.
    without: what the others are told: "zero", as in sampling, or the "mean"
      embedding, softmax of logits that are all 0, as gemma's adapter trains.
    autoregressive_weight: factor, in the loss, of the cross-entropy of each token,
      prompts too, given those before it.
    text_gradient: whether the canvas's loss reaches the causal pass through its
      keys and values.
    leave_one_out: whether logits are log p(x0_i | z without z_i), as the
      likelihood bound wants them: what z_i says enters the loss by Bayes' rule,
      log q(z_i | x0_i) added. Else they are of x0_i given all of z.
    fill: what a canvas has behind its answer's last token, if the row goes on
      there: end-of-text tokens that count, such that are only seen, or nothing.

  Examples:
    >>> gemma = DiffusionGemma(vocab_size=5, canvas=8)
    >>> gemma.block_length, gemma.network_fields()
    (8, {'two_passes': True})
  """

  eos_id: int | None = None
  image_id: int | None = None
  canvas: int = 256
  time_rule: TimeRule = "independent"
  time_epsilon: float = 1e-4
  self_conditioning: float = 0.5
  without: Without = "zero"
  autoregressive_weight: float = 1.0
  text_gradient: bool = True
  leave_one_out: bool = False
  fill: FillKind = "counted"

  replaces: ClassVar[bool] = True
  two_passes: ClassVar[bool] = True
  self_conditioned: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is not None:
      raise ValueError(
        f"diffusion_gemma replaces tokens by uniform ones: mask_id "
        f"{self.mask_id} may not lie inside its vocabulary of "
        f"{self.vocab_size}; leave mask_id out"
      )
    check.at_least(self, 1, "canvas")
    check.at_least(self, 0, "autoregressive_weight")
    check.within("time_epsilon", self.time_epsilon, "(0, 0.5)")
    check.within("self_conditioning", self.self_conditioning, "[0, 1]")
    check_choice("time rule", self.time_rule, TimeRule)
    check_choice("without", self.without, Without)
    check_choice("fill", self.fill, FillKind)

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, its mask left out."""
    return cls(
      vocab_size=vocabulary_without_mask(space, "DiffusionGemma"),
      **({"eos_id": space.eos_id} | fields),
    )

  @property
  def block_length(self) -> int:
    """Slots that are sampled together: a canvas."""
    return self.canvas

  def network_fields(self) -> dict[str, Any]:
    """Returns what the objective needs of a network."""
    return {"two_passes": True}

  @property
  def uniform(self) -> UDLM:
    """The process of a canvas: alpha(t) = 1 - t."""
    return UDLM(
      vocab_size=self.vocab_size, schedule=Linear(), time_conditioning=False
    )

  def text_inputs(
    self, process: Process, tokens: Int[Array, "B T"], batch: Batch
  ) -> ModelInputs:
    """Returns what the causal pass sees: clean tokens, what it reads into past."""
    t = jnp.zeros((tokens.shape[0], 1))
    return self.inputs(process, tokens, t, batch).replace(mask=Causal())

  def times(self, key, batch) -> Float[Array, "B 1"]:
    """Returns one time a row, of its canvas."""
    u = draw_times(key, (batch.tokens.shape[0], 1), self.time_rule)
    return (1.0 - 2.0 * self.time_epsilon) * u + self.time_epsilon

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    return self.uniform.corruption(process, x0, t)

  def draw(self, process, key, batch, *, step) -> OneCanvas:
    """Returns times, noise, the canvas and the coin of each row."""
    keys = jax.random.split(key, 5)
    rows, x0 = batch.tokens.shape[:1], batch.tokens
    t = self.times(keys[0], batch)
    replaced = jax.random.uniform(keys[1], x0.shape) < t
    token = jax.random.randint(keys[2], x0.shape, 0, self.vocab_size)
    noise = jnp.where(replaced, token.astype(jnp.int32), -1)
    coin = jax.random.uniform(keys[4], rows)
    return OneCanvas(
      t=t,
      z=jnp.where(replaced & batch.loss_mask, noise, x0),
      noise=noise,
      canvas=jax.random.uniform(keys[3], rows),
      conditioned=coin < self.self_conditioning,
    )

  def chosen(self, drawn: OneCanvas, batch: Batch) -> Canvas:
    """Returns the canvas of each row that was drawn, uniform over its canvases."""
    length = batch.tokens.shape[1]
    run = _runs(batch)
    starts = batch.loss_mask & ((jnp.arange(length) - run) % self.canvas == 0)
    number = jnp.sum(starts, axis=1, dtype=jnp.int32)
    pick = jnp.minimum((drawn.canvas * number).astype(jnp.int32), number - 1)
    ordinal = jnp.cumsum(starts, axis=1) - 1
    start = jnp.argmax(starts & (ordinal == pick[:, None]), axis=1)
    slots = start[:, None] + jnp.arange(self.canvas)
    inside = jnp.minimum(slots, length - 1)
    at = lambda x: jnp.take_along_axis(x, inside, axis=1)
    text = (at(run) == at(run)[:, :1]) & at(batch.loss_mask)
    text &= (slots < length) & (number > 0)[:, None]
    filled = (slots < length) & ~text & (number > 0)[:, None]
    filled &= self.fill != "none" and self.eos_id is not None
    x0 = jnp.where(filled, self.eos_id or 0, at(batch.tokens))
    noise = at(drawn.noise)
    return Canvas(
      slots=slots,
      x0=x0,
      z=jnp.where(noise >= 0, noise, x0),
      seen=text | filled,
      text=text,
      counted=text | (filled & (self.fill == "counted")),
      number=number,
    )

  def canvas_inputs(
    self, canvas: Canvas, text: ModelOutputs, batch: Batch
  ) -> ModelInputs:
    """Returns what the canvas's pass sees, self-conditioning aside."""
    first = canvas.slots[:, :1]
    of_first = lambda x: jnp.take_along_axis(x, first, axis=1)
    past = text.past
    if not self.text_gradient:
      past = jax.lax.stop_gradient(past)
    return ModelInputs(
      latent=canvas.z,
      positions=of_first(batch.positions) + jnp.arange(self.canvas),
      segment_ids=jnp.where(canvas.seen, of_first(batch.segment_ids), 0),
      cond=batch.cond,
      mask=self.mask_spec,
      slot=first[:, 0],
      past=past,
    )

  def outputs(
    self, process, denoise, drawn, batch
  ) -> tuple[ModelOutputs, ModelOutputs, Canvas]:
    """Returns what the causal and the canvas's pass say, and the canvas."""
    text = denoise(self.text_inputs(process, batch.tokens, batch))
    canvas = self.chosen(drawn, batch)
    inputs = self.canvas_inputs(canvas, text, batch)
    nothing = _nothing(self.without, text, canvas)
    told = lambda x: inputs.replace(self_conditioning=x)
    if self.self_conditioning == 0.0:
      return text, denoise(told(nothing)), canvas
    first = jax.lax.stop_gradient(denoise(told(nothing)).hidden)
    first = text.replace(hidden=first, past=None)
    mean = mean_embedding(first)
    said = reduce(lambda x: mean(jax.nn.softmax(x)), first, live=3)
    coin = drawn.conditioned[:, None, None]
    return text, denoise(told(jnp.where(coin, said, nothing))), canvas

  def loss(self, process, denoise: Denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of both passes; rows without an answer count as 0."""
    text, out, canvas = self.outputs(process, denoise, drawn, batch)
    row = jnp.ones(batch.tokens.shape[:1])
    row = row if batch.loss_weight is None else batch.loss_weight
    nats = self._canvas_nats(out, canvas, drawn.t, row)
    next_nats = self._next_nats(text, batch, row)
    weight = jnp.sum(row)
    share = lambda x: jax.lax.stop_gradient(x) / jnp.maximum(weight, 1e-9)
    return Loss(
      total=nats + self.autoregressive_weight * next_nats,
      weight=weight,
      bound=self._bound(process, out, canvas, drawn.t, batch),
      metrics={
        "corrupted": jnp.mean(drawn.z != batch.tokens, where=batch.loss_mask),
        "canvas_nats": share(nats),
        "next_token_nats": share(next_nats),
      },
    )

  def _canvas_nats(self, out, canvas, t, row) -> Float[Array, ""]:
    """Returns the canvases' mean cross-entropies, summed over rows."""
    weights = row[:, None] * _mean_weights(canvas.counted)
    if not self.leave_one_out:
      return cross_entropy(out, canvas.x0, weights)[0]

    def nats(logits, x0, z, t):
      log_p = jax.nn.log_softmax(self.given(logits, z, t))
      return -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]

    terms = reduce(nats, out, canvas.x0, canvas.z, t, live=2)
    return jnp.sum(weights * terms)

  def next_tokens(self, batch: Batch) -> Bool[Array, "B L"]:
    """Returns the tokens that the causal pass learns: all but a text's first."""
    return (batch.segment_ids > 0) & ~begins_segment(batch.segment_ids)

  def _next_nats(self, text, batch, row) -> Float[Array, ""]:
    """Returns rows' mean cross-entropies of next tokens, summed."""
    weights = row[:, None] * _mean_weights(self.next_tokens(batch))
    out = unshifted(text, batch.segment_ids)
    return cross_entropy(out, batch.tokens, weights)[0]

  def _bound(self, process, out, canvas, t, batch) -> Float[Array, "B L"]:
    """Returns the bound of a canvas for its row; fill counts at its first slot."""
    ending = EarlyEnd(uniform=self.uniform, epsilon=self.time_epsilon)

    def terms(logits, x0, z, t):
      given, alone = self.given(logits, z, t), self.alone(logits, z, t)
      return ending.token_bound(process, given, alone, x0, z, t)

    out = jax.lax.stop_gradient(out.replace(past=None))
    terms = reduce(terms, out, canvas.x0, canvas.z, t, live=2)
    terms = terms * canvas.number[:, None]
    behind = jnp.sum(terms, axis=1, where=canvas.counted & ~canvas.text)
    terms = jnp.where(canvas.text, terms, 0.0).at[:, 0].add(behind)
    put = lambda row, at, x: row.at[at].add(x, mode="drop")
    return jax.vmap(put)(jnp.zeros(batch.tokens.shape), canvas.slots, terms)

  def _told(self, logits, z, t, sign: float = 1.0) -> Float[Array, "B c V"]:
    """Returns logits with log q(z | x0) added, up to a constant."""
    more = sign * jnp.log1p(self.vocab_size * (1.0 - t) / t)[..., None]
    return jnp.where(jnp.arange(self.vocab_size) == z[..., None], more, 0) + (
      logits
    )

  def given(self, logits, z, t) -> Float[Array, "B c V"]:
    """Returns logits of each x0_i given all of z."""
    return self._told(logits, z, t) if self.leave_one_out else logits

  def alone(self, logits, z, t) -> Float[Array, "B c V"]:
    """Returns logits of each x0_i given the other slots of z."""
    if self.leave_one_out:
      return logits
    return self._told(logits, z, jnp.maximum(t, self.time_epsilon), -1.0)

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns the logits' log-probabilities."""
    return jax.nn.log_softmax(logits)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    """Returns log p(z_s | z_t) of uniform diffusion."""
    return self.uniform.posterior(process, self.alone(logits, z, t), z, t, s)

  def prior(self, noise, shape) -> Int[Array, "B T"]:
    """Returns uniform tokens."""
    return self.uniform.prior(noise, shape)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns the times of uniform diffusion, from 1 to 0."""
    return self.uniform.grid(steps)


def _runs(batch: Batch) -> Int[Array, "B L"]:
  """Returns where the run of supervised tokens begins that each token is in."""
  on = batch.loss_mask & (batch.segment_ids > 0)
  before = jnp.pad(on[:, :-1], ((0, 0), (1, 0)))
  begins = on & (~before | begins_segment(batch.segment_ids))
  slots = jnp.where(begins, jnp.arange(on.shape[1]), 0)
  return jax.lax.cummax(slots, axis=1)


def _mean_weights(counted: Bool[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns weights of a row's mean over what counts; 0 where nothing does."""
  number = jnp.sum(counted, axis=1, keepdims=True)
  return counted / jnp.maximum(number, 1)


def _nothing(
  without: Without, text: ModelOutputs, canvas: Canvas
) -> Float[Array, "B C D"]:
  """Returns what a canvas is told that nothing was said of."""
  table = text.unembed
  if table is None:
    table = jnp.eye(text.hidden.shape[-1])
  if without == "zero":
    embedding = jnp.zeros(table.shape[:1], jnp.float32)
  else:
    real = table[:, : text.vocab_size]
    embedding = jnp.mean(real.astype(jnp.float32), axis=1)
  return jnp.broadcast_to(embedding, (*canvas.slots.shape, *embedding.shape))
