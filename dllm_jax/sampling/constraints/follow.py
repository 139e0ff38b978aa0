"""Languages in the steps of the sampling program: where rows are, what they may.

Before the first call `begun` finds out from which states the slots of each row
can be completed. A block begins in the state that the text before it leads to
(`passed`); what is proposed in it (`proposed`) ends in one from which the rest of
the canvas can be completed. How likely that rest is, no call knows.
"""

from typing import Any

from flax import struct
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.core.noise import Tag
from dllm_jax.sampling.constraints.arrays import Followed
from dllm_jax.sampling.constraints.paths import propose, reach, walk
from dllm_jax.sampling.constraints.proposal import Proposal
from dllm_jax.sampling.policies.rows import Rows
from dllm_jax.sampling.window import gather, take, Window


@struct.dataclass
class Place:
  """Where rows are in their languages.

  Attributes:
    state: before each row's block.
    alive: before each slot, the states from which the rest can be completed.
  """

  state: Int[Array, "B"]
  alive: Bool[Array, "B T+1 S"]


def begun(run: Any, tokens: Int[Array, "B T"]) -> Place | None:
  """Returns where rows are before their first block; None without languages."""
  languages = run.requests.languages
  if languages is None:
    return None
  state = jnp.zeros(tokens.shape[:1], jnp.int32)
  slots = run.network.batch.positions
  before = languages.inside & (slots < run.first(state)[:, None])
  walked = lambda: walk(languages, state, tokens, before)
  return Place(
    state=lax.cond(jnp.any(before), walked, lambda: state),
    alive=reach(languages, run.requests.tokens, run.free),
  )


def passed(
  run: Any, place: Place, tokens: Int[Array, "B W"], window: Window, rows: Array
) -> Place:
  """Returns where rows are when some of them have left their block."""
  if window.whole:
    return place
  languages = run.requests.languages
  inside = _inside(languages.inside, window) & rows[:, None]
  walked = lambda: walk(languages, place.state, tokens, inside)
  state = lax.cond(jnp.any(inside), walked, lambda: place.state)
  return place.replace(state=state)


def proposed(
  run: Any,
  canvas: Any,
  window: Window,
  rows: Rows,
  out: Any,
  *,
  index: Int[Array, "B W"] | None,
  guide: Any,
) -> Rows:
  """Returns rows that know a text of their language for a window."""
  languages, policy = run.requests.languages, run.sampler.policy
  objective, place = run.sampler.objective, canvas.place
  kinds = languages.kinds
  z = take(canvas.z, window)
  tokens = objective.decode(run.process, z)
  inside = _inside(languages.inside, window)
  masked = gather(run.free, window.slots)
  if objective.mask_id is not None and not objective.replaces:
    masked &= tokens == objective.mask_id
  length = run.free.shape[1]
  end = jnp.minimum(window.slots[:, -1:] + 1, length)
  last = jnp.take_along_axis(place.alive, end[..., None], axis=1)[:, 0]
  cold = jnp.broadcast_to(policy.takes_best(rows), place.state.shape)
  noise = run.noise(canvas.step, window.slots)

  def some():
    sums, best = policy.weigh(
      out, z, canvas.state, languages, kinds,
      window=index, guide=guide, rows=rows,
    )  # fmt: skip
    return propose(
      languages,
      sums,
      best,
      given=jnp.where(masked, -1, tokens),
      inside=inside,
      start=place.state,
      last=last,
      warm=~cold,
      u=noise.uniform(Tag.PATH, 2),
    )

  def none():
    choice = jnp.full(inside.shape, -1, jnp.int32)
    return choice, jnp.zeros((*inside.shape, kinds))

  choice, factor = lax.cond(jnp.any(inside), some, none)
  classes = languages.classes[:, None]
  proposal = Proposal(
    choice=choice,
    factor=factor,
    barred=_barred(languages, window),
    classes=classes,
  )
  return rows.replace(proposal=proposal)


def _barred(languages: Followed, window: Window) -> Int[Array, "B W"]:
  """Returns the class of an end of text at slots before the language; else -1."""
  first = jnp.argmax(languages.inside, axis=1)[:, None]
  before = (window.slots < first) & jnp.any(languages.inside, 1, keepdims=True)
  return jnp.where(before, languages.end_kind[:, None], -1)


def _inside(inside: Bool[Array, "B T"], window: Window) -> Bool[Array, "B W"]:
  return gather(inside, window.slots) & (window.slots < inside.shape[1])
