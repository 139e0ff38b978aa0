"""The nouns that every room of the house shares.

Only containers and protocols live here: no numerics, no configuration. Time 0
is clean and 1 is noise; a time array is always `[B, 1]` or `[B, L]`. `x0` are
clean tokens, `z` is the corrupted latent (tokens, vectors for Gaussian diffusion,
or a pytree of both, every leaf beginning `[B, T]`), times are ordered `t > s`.

Shapes: B rows, L tokens a row, T positions that the network sees (L, or 2L for
two-stream training), D width, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, Self

from flax import struct
import jax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dllm_jax.core.mask import Full, MaskSpec


@struct.dataclass
class Batch:
  """A batch of token rows, as data loading makes them.

  Attributes:
    tokens: clean tokens x0.
    loss_mask: True where a token may be corrupted and counts in the loss: not in
      padding, nor in prompts.
    segment_ids: the document that a token belongs to, from 1; 0 is padding.
      Attention never crosses segments.
    positions: the position inside its segment, from 0.
    cond: class labels, one a row, or None.
    loss_weight: a weight for each row's loss, or None for one everywhere.
    texts_apart: whether an objective gives each segment its own time and share,
      as it does a row: conversations that are packed (static).
  """

  tokens: Int[Array, "B L"]
  loss_mask: Bool[Array, "B L"]
  segment_ids: Int[Array, "B L"]
  positions: Int[Array, "B L"]
  cond: Int[Array, "B"] | None = None
  loss_weight: Float[Array, "B"] | None = None
  texts_apart: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class ModelInputs:
  """What a network sees.

  Attributes:
    latent: token ids `[B, T]` or vectors `[B, T, E]`.
    conditioning: what the network is told of the time (t, sigma(t) or 1000 t, as
      the objective says), `[B, 1]` or `[B, T]`; None for time-independent ones.
    positions: rotary positions.
    segment_ids: 0 hides a position from every other one.
    cond: class labels, one a row, or None.
    mask: who attends to whom, by slot (static).
    extra_mask: a further `[B, T, S]` or `[T, S]` mask, True = may attend.
    slot: the cache slot of each row's first position; None for positions that are
      all there is, from slot 0.
    dropout_key: the key of dropout, or None for a deterministic pass.
    self_conditioning: for each position the mean embedding under what the network
      last said of it, softmax(logits) @ unembed^T; zeros, or None, for nothing.
    raised: 1 where a position is raised: scores between two of those have 1 added
      to them (MMaDA's way to tell fill from the rest); None for nowhere.
    past: text before `slot`, where positions then begin (`ModelOutputs.past`).
  """

  latent: Int[Array, "B T"] | Float[Array, "B T E"]
  positions: Int[Array, "B T"]
  segment_ids: Int[Array, "B T"]
  conditioning: Float[Array, "B #T"] | None = None
  cond: Int[Array, "B"] | None = None
  extra_mask: Bool[Array, "*B T S"] | None = None
  slot: Int[Array, "B"] | None = None
  dropout_key: Key[Array, ""] | None = None
  self_conditioning: Float[Array, "B T D"] | None = None
  raised: Float[Array, "B T"] | None = None
  past: PyTree = None
  mask: MaskSpec = struct.field(pytree_node=False, default=Full())


@struct.dataclass
class ModelOutputs:
  """What a network says, before the vocabulary: logits are never built whole.

  `logits = softcap tanh((hidden @ unembed) / softcap) + bias`, without a cap
  `hidden @ unembed + bias`, formed on chunks of positions by
  `dllm_jax.core.vocabulary`.

  Attributes:
    hidden: the last hidden states; the logits themselves if `unembed` is None.
    unembed: `[D, V_padded]`, float32 or the type of the parameters.
    bias: `[V_padded]`, or None.
    aux: extra outputs by name: load-balancing loss, router logits, captures.
    past: keys and values of text, of networks that a canvas reads it in
      (`models.diffusion_gemma`): for `ModelInputs.past`, with gradients.
    vocab_size: the real vocabulary; columns from it on are padding, sliced off
      before any consumer sees them. None: nothing is padded.
    softcap: the bound of |logits|, or None.
    tied: whether `unembed` is the transposed table of embeddings, read as stored.
  """

  hidden: Float[Array, "B T D"]
  unembed: Float[Array, "D V"] | None = None
  bias: Float[Array, "V"] | None = None
  aux: Mapping[str, Any] = struct.field(default_factory=dict)
  past: PyTree = None
  vocab_size: int | None = struct.field(pytree_node=False, default=None)
  softcap: float | None = struct.field(pytree_node=False, default=None)
  tied: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class KVCache:
  """Keys and values of slots that were already seen, all layers stacked.

  Attributes:
    key: rotated keys, `[layers, B, kv_heads, S + room, head_dim]`, as products
      read them, bfloat16 on CPUs as its bits; behind the S slots is room for
      windows that end past them. A tuple, where layers are of several kinds: one
      array for each.
    value: values, of the same shapes.
    segment_ids: the segment of each slot; 0 marks an empty slot, never attended.
    slots: of layers that keep the last R slots only, which slot is in each of
      their places, -1 for none; None where each slot has its own.
  """

  key: Float[Array, "N B H P K"] | tuple[Float[Array, "N B H P K"], ...]
  value: Float[Array, "N B H P K"] | tuple[Float[Array, "N B H P K"], ...]
  segment_ids: Int[Array, "B S"]
  slots: Int[Array, "B R"] | None = None

  def over_rows(self, fn: Callable[..., Array], *others: "KVCache") -> Self:
    """Returns the cache with fn of all but its segments, rows on axis 1."""
    slots = lambda cache: None if cache.slots is None else cache.slots[None]
    arrays = [(x.key, x.value, slots(x)) for x in (self, *others)]
    key, value, slots = jax.tree.map(fn, *arrays)
    slots = None if slots is None else slots[0]
    return self.replace(key=key, value=value, slots=slots)


class Denoiser(NamedTuple):
  """A network as two pure functions; nothing outside `models/` knows Flax.

  Attributes:
    init: `(key, inputs) -> params`.
    apply: `(params, inputs, cache) -> (outputs, cache)`. Without a cache positions
      attend to each other only and None comes back.
    cache: `(rows, slots) -> ` an empty cache; None for networks without one.
    hold: parameters as a program that calls it in a loop should hold them.
    dtype: what its products multiply, "float32" or "bfloat16".
  """

  init: Callable[[Key[Array, ""], ModelInputs], PyTree]
  apply: Callable[
    [PyTree, ModelInputs, KVCache | None],
    tuple[ModelOutputs, KVCache | None],
  ]
  cache: Callable[[int, int], KVCache] | None = None
  hold: Callable[[PyTree], PyTree] = lambda params: params
  dtype: str = "float32"


Denoise = Callable[[ModelInputs], ModelOutputs]
"""A network with parameters, dropout and rematerialisation already bound."""


@struct.dataclass
class Process:
  """The arrays of a corruption process.

  Attributes:
    params: learned with the network (embeddings, schedules).
    constants: rebuilt by `Objective.init`, never saved (transition matrices).
    state: changes without a gradient and is saved (clip bounds, router bias).
  """

  params: PyTree = struct.field(default_factory=dict)
  constants: PyTree = struct.field(default_factory=dict)
  state: PyTree = struct.field(default_factory=dict)


@struct.dataclass
class Loss:
  """The loss of one (micro)batch, in nats.

  The gradient of a step is that of sum(total) / sum(weight), both summed over
  microbatches and devices first, so that the split of a batch never matters.

  Attributes:
    total: the summed loss, differentiable.
    weight: what the sum is divided by: the number of counted tokens, of masked
      ones, or of answers, as the objective says.
    bound: nats per token of the likelihood bound, prior and reconstruction terms
      included, without a gradient; 0 where `loss_mask` is False.
    metrics: further scalars by name, already means over the batch.
  """

  total: Float[Array, ""]
  weight: Float[Array, ""]
  bound: Float[Array, "B L"]
  metrics: Mapping[str, Float[Array, ""]] = struct.field(default_factory=dict)


class Noise(Protocol):
  """Where randomness comes from (`core.noise`); leaves are `[B, T, ...]`."""

  def uniform(self, tag: int, n: int) -> Float[Array, "B T n"]:
    """Returns n uniforms in (0, 1) a position."""

  def categorical(
    self, tag: int, logits: Float[Array, "B T V"]
  ) -> Int[Array, "B T"]:
    """Returns one draw a position from softmax(logits)."""


Guide = Callable[..., Float[Array, "B T V"]]
"""`(logits, z, t) -> logits` on a chunk of positions.

`logits` is one array, or a tuple of them where the network's outputs are a tuple.
"""


class Reading(NamedTuple):
  """What a policy makes of logits that an objective draws from, and of draws.

  Attributes:
    rows: what it knows of the rows, cut like the logits.
    logits: `(logits, z, t, rows) -> logits` to draw from, on a chunk.
    note: `(logits, z, rows, log_q, token) -> mapping` of what is known of a draw
      from log_q, given the network's logits.
  """

  rows: PyTree
  logits: Callable[..., Float[Array, "B T V"]]
  note: Callable[..., Mapping[str, Array]]


class Objective(Protocol):
  """How one published system corrupts, scores and reverses.

  A frozen dataclass: hashable and static under jit. Arrays that it needs are in
  its `Process`. What most have in common is here: a class that inherits the
  protocol states only where it differs.

  Attributes:
    vocab_size: real tokens, the mask included if there is one.
    mask_id: the mask token, or None for processes without one.
    image_id: the token of pictures, which the network does not read; or None.
    shift: 1 if the output at slot i predicts the token of slot i + 1.
    block_length: slots that a sampler has to fill together, left to right; None
      for as many as it likes.
    reads_time: whether the network is told the time.
    exact: whether `Loss.bound` is the negative log-likelihood itself.
    exchangeable: whether all tokens are masked at one rate in continuous time,
      so that the bound is a mean over how many are masked. There is then
      `restore(process, denoise, z, batch, rate)`, -log p(x0 | z) at the masked
      positions of z, nats, of a network that is told the time of that rate.
    replaces: whether noise replaces tokens, so that reversing it may as well.
    opens: whether a block's first token is that of the pass that stores the last.
    two_passes: whether the network reads what lies before a block by a causal
      pass of its own, of `text_inputs`; a block reads it and is not written.
    self_conditioned: whether the network is told what it last said of a block.
    adapts: whether `adapt` changes the process at evaluations while training.
    hidden_id: a token that fills rows on the left, hidden in sampling, or None.
  """

  vocab_size: int
  mask_id: int | None
  image_id: int | None = None
  shift: Literal[0, 1] = 0
  block_length: int | None = None
  reads_time: bool
  exact: bool = False
  exchangeable: bool = False
  replaces: bool = False
  opens: bool = False
  two_passes: bool = False
  self_conditioned: bool = False
  adapts: bool = False
  hidden_id: int | None = None

  @property
  def order_agnostic(self) -> bool:
    """Whether, besides, the bound is an average over orders of unmasking."""
    return self.exchangeable and not self.reads_time

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns fresh arrays of the process."""
    return Process()

  def unbiased(self, process: Process) -> Process:
    """Returns the process under which `Loss.bound` is a likelihood bound.

    What evaluation uses: training may clip times or shorten rows.
    """
    return process

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> PyTree:
    """Returns all the randomness of a loss: times, corrupted rows, coins.

    Of the whole global batch, microbatches later: every leaf begins with rows.
    """

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: PyTree,
    batch: Batch,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the training loss, a deterministic function of what was drawn."""

  def measure(
    self,
    process: Process,
    denoise: Denoise,
    key: Key[Array, ""],
    batch: Batch,
  ) -> PyTree:
    """Returns what `adapt` asks of one held-out batch; batches are summed."""
    return ()

  def adapt(self, process: Process, measured: PyTree) -> Process:
    """Returns the process as held-out text would have it, in `state` alone."""
    return process

  def corruption(
    self, process: Process, x0: Int[Array, "B L"], t: Float[Array, "B #L"]
  ) -> Float[Array, "B L"] | None:
    """Returns the probability that a token of z_t differs from x0's.

    None where tokens are not corrupted one by one: there is nothing to count.
    """
    return None

  def inputs(
    self, process: Process, z: PyTree, t: Float[Array, "B #T"], batch: Batch
  ) -> ModelInputs:
    """Returns what the network sees for the latent z at time t."""

  def text_inputs(
    self, process: Process, tokens: Int[Array, "B T"], batch: Batch
  ) -> ModelInputs:
    """Returns what the causal pass over clean tokens sees, of `two_passes`."""

  def log_x0(
    self, process: Process, logits: Array, z: PyTree, t: Array
  ) -> Float[Array, "B T V"]:
    """Returns log p(x0 | z_t) on a chunk of positions."""

  def posterior(
    self, process: Process, logits: Array, z: PyTree, t: Array, s: Array
  ) -> Float[Array, "B T V"]:
    """Returns log p(z_s | z_t) on a chunk: the primitive of every sampler."""

  def prior(self, noise: Noise, shape: tuple[int, int]) -> PyTree:
    """Returns a draw of z at time 1."""

  def clean(self, process: Process, tokens: Int[Array, "B T"]) -> PyTree:
    """Returns the latent of known tokens (prompts, infilled spans)."""
    return tokens

  def decode(self, process: Process, z: PyTree) -> Int[Array, "B T"]:
    """Returns the tokens of a finished latent."""
    return z

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns the sampling times, from 1 down, noise removal last."""

  def reverse(
    self,
    process: Process,
    noise: Noise,
    out: ModelOutputs | tuple[ModelOutputs, ...],
    z: PyTree,
    t: Array,
    s: Array,
    *,
    reading: Reading | None = None,
    window: Int[Array, "B W"] | None = None,
  ) -> Any:
    """Returns z_s given z_t; by default a draw from `posterior`.

    With a reading, returns (z_s, what it notes of the draws). `window` names,
    for each row, the slots of `out` that predict z, as in
    `core.vocabulary.reduce`.
    """
