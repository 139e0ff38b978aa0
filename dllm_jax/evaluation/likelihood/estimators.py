r"""Estimators of log p(x): what is drawn, and what a network call says of it.

A `group` of rows shares its strata: copies of one text, or the rows of a corpus.
Supervised tokens (`loss_mask`) are scored given all the others, so that a
prompt, or what stands before a window, is whatever the mask leaves out.

- "exact": nothing is drawn (autoregressive models, blocks of one token).
- "counts": exact mask counts (arXiv:2502.09992, eq. 6). Of n tokens of a block,
  l are masked, l even over 1..n, and weigh n / l:

      -log p(x) <= E_{l, z} [ n / l  sum_{i masked} -log p(x_i | z, t) ]

  A network that is told the time is told when the l-th mask came. Token i is
  masked from the rate u_i on, u uniform, so that this rate is the l-th smallest
  u, which follows Beta(l, n - l + 1) whatever the masks; and

      int_0^1 dm / m  m^l (1 - m)^(n - l) f(m) = E_Beta [ f ] / (l C(n, l))

  makes the continuous-time bound this mean, on all of [0, 1].
- "times": the objective's own bound, its times evenly spread.
- "left", "confidence", "margin", "entropy": the exact likelihood of revealing
  one token at a time, from the left or the surest one first. The order depends
  on revealed tokens only, so that this is a law over texts.
- "target": the same, with that token first which the network holds likeliest to
  be the one it is (iLLaDA). The order looks at what it hides: a score by which
  answers are compared, and no law over texts.

Pure functions; nothing here reads text or launches a program.
"""

import dataclasses
import functools
from typing import get_args, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import Batch, Denoise, Objective, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.score import score, SCORES
from dllm_jax.training.bound import even

Name = Literal[
  "auto",
  "exact",
  "counts",
  "times",
  "left",
  "confidence",
  "margin",
  "entropy",
  "target",
]
ORDERS = (*(name for name in SCORES if name != "random"), "target")


def choose(objective: Objective, name: Name) -> Name:
  """Returns the estimator of a name: the one that fits best for "auto".

  Raises:
    ValueError: the name is unknown, or the objective has no such likelihood.

  Examples:
    >>> from dllm_jax.objectives import Autoregressive, MDLM
    >>> choose(MDLM(vocab_size=5, mask_id=4), "auto")
    'counts'
    >>> choose(Autoregressive(vocab_size=5, mask_id=4), "auto")
    'exact'
  """
  if name not in get_args(Name):
    raise ValueError(
      f"unknown estimator {name!r}; legal: {', '.join(get_args(Name))}"
    )
  if name == "auto":
    if objective.exact:
      return "exact"
    return "counts" if objective.exchangeable else "times"
  needs = {
    "exact": (
      objective.exact,
      "an autoregressive model, or blocks of one token",
    ),
    "counts": (
      objective.exchangeable,
      "masking in continuous time at one rate for all tokens",
    ),
    "times": (True, ""),
  } | dict.fromkeys(
    ORDERS,
    (objective.order_agnostic, "a masked model that is not told the time"),
  )
  able, need = needs[name]
  if not able:
    legal = ", ".join(n for n, (able, _) in needs.items() if able)
    raise ValueError(
      f"{type(objective).__name__} as configured has no likelihood by {name!r}, "
      f"which needs {need}; legal: auto, {legal}"
    )
  return name


def calls(name: Name, targets: int) -> int:
  """Returns network calls for a row of at most so many supervised tokens.

  Examples:
    >>> calls("counts", 12), calls("confidence", 12)
    (1, 12)
  """
  return targets if name in ORDERS else 1


def nats(
  name: Name,
  objective: Objective,
  process: Process,
  denoise: Denoise,
  keys: Key[Array, "G"],
  batch: Batch,
) -> Float[Array, "B"]:
  """Returns one estimate of -log p(supervised tokens | the others) a row, nats.

  Args:
    name: the estimator, as `choose` returns it.
    objective: how the network was trained.
    process: its arrays.
    denoise: the network with its parameters.
    keys: a key for each group of rows; group g holds rows `g, g + G, ...`.
    batch: the rows.

  Examples:
    A network that finds 4 tokens equally likely needs log 4 nats for each:

    >>> import jax, jax.numpy as jnp
    >>> from dllm_jax.core import Batch, ModelOutputs
    >>> from dllm_jax.objectives import MDLM
    >>> mdlm, one = MDLM(vocab_size=5, mask_id=4), jnp.ones((1, 3), int)
    >>> rows = Batch(
    ...   tokens=one, loss_mask=one > 0, segment_ids=one, positions=one
    ... )
    >>> even = lambda inputs: ModelOutputs(hidden=jnp.zeros((1, 3, 5)))
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> process = mdlm.init(jax.random.key(0))
    >>> score = lambda rows: nats("counts", mdlm, process, even, keys, rows)
    >>> round(float(jax.jit(score)(rows)[0]), 4)  # 3 log 4
    4.1589
  """
  process = objective.unbiased(process)
  if name in ORDERS:
    return _in_order(name, objective, process, denoise, batch)
  if name == "counts":
    z, weight, rate = mask_counts(objective, keys, batch)
    found = weight * objective.restore(process, denoise, z, batch, rate)
    return jnp.sum(jnp.where(batch.loss_mask, found, 0.0), axis=1)
  objective = even(objective)
  step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
  draw = lambda key, rows: objective.draw(process, key, rows, step=step)
  drawn = _grouped(draw, keys, batch)
  loss = objective.loss(process, denoise, drawn, batch, step=step)
  return jnp.sum(loss.bound, axis=1)


def mask_counts(
  objective: Objective,
  keys: Key[Array, "G"],
  batch: Batch,
  *,
  masks: int = 1,
) -> tuple[Int[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
  """Returns (z, n / l, rate): l of the n tokens of each block are masked.

  The rate of a block, the same at all of its slots, is that at which the last
  of its masks came.

  Args:
    objective: its mask and its blocks are used.
    keys: a key for each group of rows, as in `nats`.
    batch: the rows.
    masks: how many rows of a group, one after another, have the same counts; a
      divisor of their number.
  """
  keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  shares = functools.partial(_shares, masks=masks)
  share = _grouped(shares, keys[0], batch)
  group = _blocks(objective, batch)
  return _mask_counts(objective, keys[1], batch, group, share)


def _grouped(draw, keys, batch):
  """Returns draw(key, rows) of each group, in the order of the batch's rows."""
  groups = keys.shape[0]
  split = lambda x: x.reshape(x.shape[0] // groups, groups, *x.shape[1:])
  join = lambda x: x.reshape(-1, *x.shape[2:])
  drawn = jax.vmap(draw, in_axes=(0, 1), out_axes=1)(
    keys, jax.tree.map(split, batch)
  )
  return jax.tree.map(join, drawn)


def _blocks(objective: Objective, batch: Batch) -> Int[Array, "B L"]:
  """Returns the block of each slot; those that are not supervised come last."""
  length = batch.tokens.shape[1]
  slots = jnp.arange(length) // (objective.block_length or length)
  return jnp.where(batch.loss_mask, slots, length)


def _shares(
  key: Key[Array, ""], rows: Batch, masks: int
) -> Float[Array, "K L"]:
  """Returns where in [0, 1) the count of each row's block b (slot b) lies.

  Evenly spread over the group's rows from one uniform offset, so that each is
  uniform. Deviates from the published integer offsets with rounding, under
  which some counts come more often where the group does not divide n.
  """
  count, length = rows.tokens.shape
  offset = jax.random.uniform(key, (1, length))
  stratum = jnp.arange(count)[:, None] // masks * masks
  return (offset + stratum / count) % 1.0


def _mask_counts(
  objective: Objective,
  keys: Key[Array, "G"],
  batch: Batch,
  group: Int[Array, "B L"],
  share: Float[Array, "B L"],
) -> tuple[Int[Array, "B L"], Float[Array, "B L"], Float[Array, "B L"]]:
  """Returns what `mask_counts` does, given where the counts lie."""
  length = group.shape[1]
  uniform = lambda key, rows: jax.random.uniform(key, rows.tokens.shape)
  u = _grouped(uniform, keys, batch)

  def row(group, share, u):
    size = jnp.zeros((length + 1,), jnp.int32).at[group].add(1)[:length]
    masked = jnp.floor(share * size).astype(jnp.int32) + 1
    masked = jnp.minimum(masked, size)  # share * size may round up to size
    # The place of each slot among those of its block, in the order of u.
    order = jnp.lexsort((u, group))
    place = jnp.zeros((length,), jnp.int32).at[order].set(jnp.arange(length))
    block = jnp.minimum(group, length - 1)
    place -= (jnp.cumsum(size) - size)[block]
    hidden = (place < masked[block]) & (group < length)
    whole = jnp.arange(length) // (objective.block_length or length)
    rate = jnp.zeros((length,)).at[whole].max(jnp.where(hidden, u, 0.0))[whole]
    return hidden, size[block] / jnp.maximum(masked[block], 1), rate

  hidden, weight, rate = jax.vmap(row)(group, share, u)
  z = jnp.where(hidden, objective.mask_id, batch.tokens)
  return z, weight, rate


def _in_order(name, objective, process, denoise, batch):
  """Returns the exact nats of revealing supervised tokens one at a time.

  As many calls of the network as the longest row has of them.
  """
  rows, length = batch.tokens.shape
  slots = jnp.broadcast_to(jnp.arange(length), (rows, length))
  noise = Keyed.at(
    jax.random.key(0),
    request=jnp.zeros((rows,), jnp.int32),
    step=jnp.zeros((rows,), jnp.int32),
    position=slots,
  )
  block = slots // (objective.block_length or length)

  def body(carry):
    hidden, total = carry
    z = jnp.where(hidden, objective.mask_id, batch.tokens)
    t = jnp.mean(hidden, axis=1, keepdims=True)
    out = denoise(objective.inputs(process, z, t, batch))

    def read(logits, x0, z, t, noise, slots):
      log_p = objective.log_x0(process, logits, z, t)
      picked = jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
      if name == "target":
        return -picked, picked
      sure = jnp.max(log_p, axis=-1)
      return -picked, score(name, log_p, sure, noise, slots)

    window = slots - objective.shift
    cost, rank = reduce(
      read, out, batch.tokens, z, t, noise, slots, window=window
    )
    first = jnp.min(jnp.where(hidden, block, length), axis=1, keepdims=True)
    rank = jnp.where(hidden & (block == first), rank, -jnp.inf)
    now = jax.nn.one_hot(jnp.argmax(rank, axis=1), length, dtype=bool) & hidden
    total += jnp.sum(jnp.where(now, cost, 0.0), axis=1)
    return hidden & ~now, total

  start = (batch.loss_mask, jnp.zeros((rows,), jnp.float32))
  return jax.lax.while_loop(lambda carry: jnp.any(carry[0]), body, start)[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guided:
  """A network under classifier-free guidance of the prompt.

  `l = l_u + (w + 1) (l_c - l_u)`, l_u with the prompt masked. Logits are linear
  in the hidden states, so that these are joined and no logits are built.

  Attributes:
    denoise: the network.
    scale: w, 0 for none.
    prompt: the slots to hide.
    mask_id: what hides them.
  """

  denoise: Denoise
  scale: float
  prompt: Bool[Array, "B L"]
  mask_id: int

  def __call__(self, inputs):
    """Returns the guided outputs of twice the rows."""
    twice = lambda x: jnp.concatenate([x, x])
    latent = jnp.where(self.prompt, self.mask_id, inputs.latent)
    both = jax.tree.map(twice, inputs).replace(
      latent=jnp.concatenate([inputs.latent, latent])
    )
    out = self.denoise(both)
    with_, without = jnp.split(out.hidden.astype(jnp.float32), 2)
    return out.replace(hidden=without + (self.scale + 1.0) * (with_ - without))
