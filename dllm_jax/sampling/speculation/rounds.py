"""The loop of self-speculation: rows at their own pointers, drafts tested.

A row's pointer is at its last token. A call reads, on the kept keys and values
of all before it,

    source "masks"      [last, drafts, masks]   causally; tests the drafts, and
                                                has those that come after them
    source "quadratic"  the same, with masks of their own behind the last token
                        and behind each draft, which see no later draft: those
                        behind what was taken have the next drafts
    source "block"      [last, masks]           both ways: the drafts
                        [last, drafts]          causally: tests them

and the pointer moves over what was taken and the token behind it. What was
written for others is written again before anything sees it. Texts are those of
autoregressive decoding: token for token without temperature, and with it in law
(`policies.speculation`). A token that is given behind the pointer is its own
draft, and always taken.
"""

import functools
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import KVCache
from dllm_jax.sampling.forward import outputs_of
from dllm_jax.sampling.loop import prefilled
from dllm_jax.sampling.step import Canvas, noted, Run
from dllm_jax.sampling.traces.trace import Frame
from dllm_jax.sampling.window import gather, put, Tree, Window


@struct.dataclass
class Drafted:
  """What a row has drafted.

  Attributes:
    at: the slot of its last token.
    count: how many drafts follow: all or none.
    tokens: the drafts.
    hidden: what predicted them, of which their law is made.
  """

  at: Int[Array, "B"]
  count: Int[Array, "B"]
  tokens: Int[Array, "B n"]
  hidden: Float[Array, "B n D"]


class _Call(NamedTuple):
  """A call's hidden states at the row's window, and the cache."""

  hidden: Float[Array, "B W D"]
  cache: KVCache


def speculate(run: Run, canvas: Canvas) -> tuple[Canvas, Frame | None]:
  """Samples all free slots behind each row's prompt.

  Raises:
    ValueError: there is guidance.
  """
  policy = run.sampler.policy
  if run.network.guidance is not None:
    raise ValueError(
      "speculation has no guidance: leave cfg_scale 0, or use another preset"
    )
  canvas = prefilled(run, canvas)
  rows, n = canvas.step.shape[0], policy.drafts
  width = run.head.hidden.shape[-1]
  zeros = jnp.zeros((rows,), jnp.int32)
  drafted = Drafted(
    at=jnp.maximum(run.first(canvas.block) - 1, 0),
    count=zeros,
    tokens=jnp.zeros((rows, n), jnp.int32),
    hidden=jnp.zeros((rows, n, width), run.head.hidden.dtype),
  )
  body = lambda carry, _: _round(run, *carry)
  carry = canvas, drafted
  if run.trace:
    (canvas, _), frames = lax.scan(body, carry, length=run.sampler.length)
    return canvas, jax.tree.map(lambda x: x[None], frames)  # one block
  more = lambda carry: jnp.any(_running(run, *carry))
  return lax.while_loop(more, lambda c: body(c, None)[0], carry)[0], None


def _running(run: Run, canvas: Canvas, drafted: Drafted) -> Bool[Array, "B"]:
  """Returns the rows that have a free slot behind their pointer."""
  slots = run.network.batch.positions
  ahead = jnp.any(run.free & (slots > drafted.at[:, None]), axis=1)
  return ahead & ~canvas.stopped


def _read(
  run: Run,
  canvas: Canvas,
  at: Int[Array, "B"],
  tokens: Int[Array, "B n"],
  spec: Causal | Full,
) -> _Call:
  """Calls the network on a row's last token, drafts and masks behind them."""
  network, policy = run.network, run.sampler.policy
  width, masks = policy.width, run.sampler.objective.mask_id
  slots = at[:, None] + jnp.arange(width)
  pad = width - 1 - tokens.shape[1]
  tokens = jnp.pad(tokens, ((0, 0), (1, pad)), constant_values=masks)
  last = gather(canvas.z, at[:, None])
  tokens = tokens.at[:, :1].set(last)
  # Behind the canvas, too: what is read there has drafts of the text before it.
  room = canvas.cache.key.shape[3] - run.sampler.length
  wide = lambda x: jnp.pad(x, ((0, 0), (0, room)))
  z = put(wide(canvas.z), Window(slots, slots >= 0, None, False), tokens)
  valid, at_slot = wide(run.requests.valid), jnp.arange(z.shape[1])
  own = (at_slot >= at[:, None]) & (at_slot < at[:, None] + width)
  visible = own | (valid & (at_slot < at[:, None]))
  t = jnp.zeros((at.shape[0], 1))
  tree = _tree(policy.drafts) if policy.source == "quadratic" else None
  out, cache = network.at(
    z, t, at, width, visible, canvas.cache, spec, tree=tree
  )
  cache = cache.replace(segment_ids=canvas.cache.segment_ids)
  return _Call(out.hidden, cache)


def _tree(drafts: int) -> Tree:
  """Returns [last, drafts], and behind each of them as many masks as drafts.

  Of one draft, [last, draft, mask, mask] stand at 0, 1, 1 and 2, and see

      1 0 0 0
      1 1 0 0
      1 0 1 0
      1 1 0 1
  """
  text, masks = np.arange(drafts + 1), np.arange(1, drafts + 1)
  none = np.full(drafts + 1, -1)
  # Behind which of the text a mask is, -1 in the text, and where all stand.
  behind = np.concatenate([none, np.repeat(text, drafts)])
  ahead = np.concatenate([text, np.add.outer(text, masks).ravel()])
  until = np.where(behind < 0, ahead, behind)
  of_text = (behind < 0) & (ahead <= until[:, None])
  of_masks = (behind >= 0) & (behind == behind[:, None])
  return Tree(ahead, of_text | of_masks)


def _round(run: Run, canvas: Canvas, drafted: Drafted):
  """Drafts where drafts come from a call of their own, tests, moves on."""
  policy, running = run.sampler.policy, _running(run, canvas, drafted)
  slots = drafted.at[:, None] + 1 + jnp.arange(policy.drafts + 1)
  window = Window(slots, slots >= 0, None, False)
  noise, rows = run.noise(canvas.step, slots), run.rows(canvas.z, window)
  calls = running.astype(jnp.int32)
  given = _given(run, slots)
  if policy.source == "block":
    drafted, cache, made = _drafts_of_block(run, canvas, drafted, noise, rows)
    canvas, calls = canvas.replace(cache=cache), calls * (1 + made)
  masks = run.sampler.objective.mask_id
  known = drafted.count[:, None] > 0
  own = gather(canvas.z, slots)
  drafts = jnp.where(given[:, :-1], own[:, :-1], drafted.tokens)
  tokens = jnp.where(known, drafts, masks)
  call = _read(run, canvas, drafted.at, tokens, Causal())
  head = functools.partial(outputs_of, run.head)
  n = policy.drafts
  ends = lambda x: jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
  tested = policy.test(
    noise,
    head(call.hidden[:, : n + 1]),
    head(ends(drafted.hidden)),
    jnp.where(given, own, ends(drafts)),
    drafted.count,
    rows,
    given,
  )
  canvas, at = _written(run, canvas, drafted, tested, slots, running)
  canvas = canvas.replace(cache=call.cache, calls=canvas.calls + calls)
  after = drafted.replace(at=at)
  if policy.source != "block":
    after = _drafts_of_masks(run, canvas, drafted, tested, call, at)
  return (canvas, after), _frame(run, canvas, running) if run.trace else None


def _given(run: Run, slots: Int[Array, "B n"]) -> Bool[Array, "B n"]:
  """Returns which slots have a token that was given."""
  return gather(run.requests.fixed, slots) & (slots < run.sampler.length)


def _drafts_of_masks(run, canvas, drafted, tested, call, at) -> Drafted:
  """Returns the drafts of the masks behind what a test took.

  Of masks behind the last draft alone there are none after a rejection.
  """
  policy, n = run.sampler.policy, run.sampler.policy.drafts
  quadratic = policy.source == "quadratic"
  first = n + 1 + n * tested.accepted if quadratic else drafted.count + 1
  hidden = gather(call.hidden, first[:, None] + jnp.arange(n))
  slots = at[:, None] + 1 + jnp.arange(n)
  noise = run.noise(canvas.step - 1, slots)
  masks = jnp.full(slots.shape, run.sampler.objective.mask_id)
  out = outputs_of(run.head, hidden)
  rows = run.rows(canvas.z, Window(slots, slots >= 0, None, False))
  tokens, _ = policy.draft(noise, out, masks, rows)
  whole = quadratic | (tested.accepted == drafted.count)
  if policy.rule == "published":  # It drafts behind a prompt's second token.
    whole &= drafted.at >= run.first(canvas.block)
  return Drafted(at, jnp.where(whole, n, 0), tokens, hidden)


def _drafts_of_block(run, canvas, drafted, noise, rows):
  """Returns drafts of calls that read a block both ways, and how many calls."""
  policy, n = run.sampler.policy, run.sampler.policy.drafts
  masks = run.sampler.objective.mask_id
  noise = jax.tree.map(lambda x: x[:, :n], noise)
  if rows.early is not None:
    rows = rows.replace(early=rows.early[:, :n])

  def call(tokens, cache):
    made = _read(run, canvas.replace(cache=cache), drafted.at, tokens, Full())
    hidden = made.hidden[:, 1 : n + 1]
    out = outputs_of(run.head, hidden)
    return hidden, *policy.draft(noise, out, tokens, rows), made.cache

  slots = drafted.at[:, None] + 1 + jnp.arange(n)
  tokens = jnp.where(_given(run, slots), gather(canvas.z, slots), masks)
  if policy.threshold is None:
    hidden, tokens, _, cache = call(tokens, canvas.cache)
    made = jnp.ones_like(drafted.at)
  else:

    def body(carry):
      tokens, made, cache = carry
      _, token, sure, cache = call(tokens, cache)
      masked = tokens == masks
      sure = jnp.where(masked, sure, -1.0)
      best = jnp.arange(n) == jnp.argmax(sure, axis=1)[:, None]
      take = masked & ((sure >= policy.threshold) | best)
      made = made + jnp.any(masked, axis=1)
      return jnp.where(take, token, tokens), made, cache

    more = lambda carry: jnp.any(carry[0] == masks)
    carry = tokens, jnp.zeros_like(drafted.at), canvas.cache
    tokens, made, cache = lax.while_loop(more, body, carry)
    hidden = drafted.hidden  # of no use: such drafts have no law but their own
  count = jnp.full_like(drafted.at, n)
  return Drafted(drafted.at, count, tokens, hidden), cache, made


def _written(run, canvas, drafted, tested, slots, running):
  """Returns the canvas with what was taken, and the new pointers."""
  length = run.sampler.length
  taken = jnp.arange(slots.shape[1]) <= tested.accepted[:, None]
  taken &= running[:, None] & gather(run.free, slots) & (slots < length)
  window = Window(slots, taken, None, False)
  tokens = jnp.where(taken, tested.tokens, gather(canvas.z, slots))
  stopped = canvas.stopped
  if run.ends is not None:
    stopped |= jnp.any(taken & run.ended(tokens), axis=1)
  at = jnp.where(running, drafted.at + 1 + tested.accepted, drafted.at)
  canvas = canvas.replace(
    **noted(run, canvas, window, tokens, tested.info),
    z=put(canvas.z, window, tokens),
    step=canvas.step + running,
    stopped=stopped,
  )
  return canvas, at


def _frame(run: Run, canvas: Canvas, running) -> Frame:
  """Returns what a round did, for a trace."""
  committed = canvas.revealed_at == canvas.step[:, None] - 1
  committed &= running[:, None]
  no = jnp.zeros_like(committed)
  return Frame(
    tokens=canvas.z,
    confidence=committed.astype(jnp.float32),
    entropy=no.astype(jnp.float32),
    committed=committed,
    remasked=no,
    ran=running,
  )
