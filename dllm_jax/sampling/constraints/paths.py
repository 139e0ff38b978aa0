r"""Paths of an automaton over a window of slots, some of them given.

With p_i the law of slot i alone, s_0 the state before the window and F the states
from which what follows can be completed, the law that is drawn from is

    q(x) \propto [ s_0 -x-> F ] \prod_i p_i(x_i),

the product law on the condition that the text is in the language. With w_i(a)
the mass of the tokens on arc a, log-sums go backward and forward,

    b_i(s) = \sum_{a: s -> s'} w_i(a) b_{i+1}(s'),   b_W = [F],
    f_{i+1}(s') = \sum_{a: s -> s'} f_i(s) w_i(a),   f_0 = [s_0],

a path is drawn from the left by w_i(a) b_{i+1}, and the marginal law of slot i is
p_i(v) times \sum_a f_i(s) b_{i+1}(s') over the arcs that v is on. With maxima in
place of sums the path is the most probable text (Viterbi; DINGO,
arXiv:2505.23061, alg. 1). All in logarithms; constants of a slot are taken off.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.sampling.constraints.arrays import Fan, Followed

NO = -1e30
"""The logarithm of nothing, with which sums stay finite."""


def log_sum(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
  """Returns log sum exp over an axis; about `NO` of nothing."""
  most = jnp.max(x, axis=axis, keepdims=True)
  total = jnp.sum(jnp.exp(x - most), axis=axis)
  return jnp.squeeze(most, axis) + jnp.log(total)


def _max(x):
  return jnp.max(x, axis=-1)


def _centred(x: Float[Array, "*n m"]) -> Float[Array, "*n m"]:
  """Returns logarithms of which the greatest is 0, if there is one."""
  most = jnp.max(x, axis=-1, keepdims=True)
  return jnp.maximum(x - jnp.where(most > NO / 2, most, 0.0), NO)


def _segments(x, ids, count):
  """Returns (log-sums, maxima) of rows of x by segment, `[count, ...]`."""
  most = jnp.maximum(jax.ops.segment_max(x, ids, count), NO)
  safe = jnp.minimum(ids, count - 1)
  total = jax.ops.segment_sum(jnp.exp(x - most[safe]), ids, count)
  sums = jnp.where(total > 0, most + jnp.log(jnp.maximum(total, 1e-37)), NO)
  return jnp.maximum(sums, NO), most


def weights(
  law: Float[Array, "B c V"], languages: Followed, kinds: int
) -> tuple[Float[Array, "B c C"], Float[Array, "B c C"]]:
  """Returns log-sums and maxima of a law over each class of tokens."""

  def row(law, cells, cell_class):
    # Slots last: whole vectors are gathered, and none is reduced across.
    x = jnp.take(law.T, cells, axis=0, mode="fill", fill_value=NO)  # [R, 16, c]
    x = jnp.maximum(x, NO)
    sums, _ = _segments(log_sum(x, axis=1), cell_class, kinds)
    most = jax.ops.segment_max(jnp.max(x, axis=1), cell_class, kinds)
    most = jnp.maximum(most, NO)
    return sums.T, most.T

  return jax.vmap(row)(law, languages.cells, languages.cell_class)


def _fanned(x: Float[Array, "A"], fan: Fan, plus: Callable):
  """Returns x summed over the arcs of each state."""
  one = lambda x: jnp.append(x, jnp.float32(NO))
  parts = plus(one(x)[fan.parts])
  return jnp.maximum(plus(one(parts)[fan.wholes]), NO)


def _backward(row: Followed, ways, inside, last, plus):
  """Returns b_1 ... b_W after each slot, and b_0; ways are `[W, K]`."""
  _, group, to = row.arcs.T
  real = row.arcs[:, 0] >= 0

  def body(after, slot):
    way, within = slot
    x = jnp.where(real, way[group] + after[to], NO)
    before = _fanned(x, row.out, plus)
    return jnp.where(within, _centred(before), after), after

  first, after = lax.scan(body, last, (ways, inside), reverse=True)
  return after, first


def _forward(row: Followed, ways, inside, first, plus):
  """Returns f_0 ... f_{W-1} before each slot, and f_W."""
  start, group, _ = row.arcs.T
  real = start >= 0

  def body(before, slot):
    way, within = slot
    x = jnp.where(real, way[group] + before[start], NO)
    after = _fanned(x, row.into, plus)
    return jnp.where(within, _centred(after), before), before

  last, before = lax.scan(body, first, (ways, inside))
  return before, last


def _picked(x, u, warm):
  """Returns a draw from softmax(x) by one uniform, or the best where cold."""
  p = jnp.exp(x - jnp.max(x))
  p = jnp.where(x > NO / 2, p, 0.0)
  total = jnp.cumsum(p)
  above = (total > u * total[-1]) & (p > 0.0)
  best = jnp.argmax(x)
  return jnp.where(warm & jnp.any(above), jnp.argmax(above), best)


def _path(row: Followed, ways, kinds, after, inside, start, u, warm):
  """Returns the class of each slot on a path, -1 outside."""
  source, group, to = row.arcs.T
  of, kind = row.members.T

  def body(state, slot):
    way, weight, behind, within, u = slot
    x = jnp.where(source == state, way[group] + behind[to], NO)
    arc = _picked(x, u[0], warm)
    y = jnp.where(of == group[arc], weight[kind], NO)
    chosen = kind[_picked(y, u[1], warm)]
    state = jnp.where(within, to[arc], state)
    return state, jnp.where(within, chosen, -1)

  slots = ways, kinds, after, inside, u
  return lax.scan(body, start, slots)[1]


def propose(
  languages: Followed,
  sums: Float[Array, "B W C"],
  best: Float[Array, "B W C"],
  *,
  given: Int[Array, "B W"],
  inside: Bool[Array, "B W"],
  start: Int[Array, "B"],
  last: Bool[Array, "B S"],
  warm: Bool[Array, "B"],
  u: Float[Array, "B W 2"],
) -> tuple[Int[Array, "B W"], Float[Array, "B W C"]]:
  """Returns the class of each slot of one accepted text, and marginal factors.

  Args:
    languages: of the rows.
    sums: log-sums of each class under each slot's law.
    best: maxima of the same.
    given: tokens that stand; -1 where one is to be proposed.
    inside: the slots of the language.
    start: the state before the window.
    last: the states after it from which the rest can be completed.
    warm: rows that draw a text; others take the most probable one.
    u: uniforms.

  Returns:
    The classes, -1 outside of the language, and for each class the logarithm of
    what its tokens' probabilities are multiplied by, up to a constant.
  """
  count = sums.shape[-1]

  def row(one, sums, best, given, inside, start, last, warm, u):
    sets = one.members.shape[0]
    known = one.classes[jnp.maximum(given, 0)]
    exact = jnp.where(jnp.arange(count) == known[:, None], 0.0, NO)
    held = (given >= 0)[:, None]
    sums, best = (jnp.where(held, exact, _centred(x)) for x in (sums, best))
    of, kind = one.members.T
    ways = _segments(sums[:, kind].T, of, sets)[0].T
    tops = _segments(best[:, kind].T, of, sets)[1].T
    end = jnp.where(last, 0.0, NO)
    states = jnp.arange(end.shape[0])
    begin = jnp.where(states == start, 0.0, NO)
    after, _ = _backward(one, ways, inside, end, log_sum)
    before, _ = _forward(one, ways, inside, begin, log_sum)
    chances = ways, sums, after
    cold = lambda: (tops, best, _backward(one, tops, inside, end, _max)[0])
    chances = lax.cond(warm, lambda: chances, cold)
    path = _path(one, *chances, inside, start, u, warm)
    source, group, to = one.arcs.T
    x = jnp.where(source >= 0, before[:, source] + after[:, to], NO)
    by_set = _segments(x.T, group, sets)[0]
    y = jnp.where(of[:, None] < sets, by_set[jnp.minimum(of, sets - 1)], NO)
    factor = _segments(y, kind, count)[0].T
    return path, factor

  return jax.vmap(row)(
    languages, sums, best, given, inside, start, last, warm, u
  )


def reach(
  languages: Followed, tokens: Int[Array, "B T"], free: Bool[Array, "B T"]
) -> Bool[Array, "B T+1 S"]:
  """Returns before each slot the states from which the rest can be completed.

  Args:
    languages: of the rows.
    tokens: what is given.
    free: slots at which anything may stand.
  """

  def row(one, tokens, free):
    ways = _given_ways(one, tokens, free)
    last = jnp.where(one.final, 0.0, NO)
    after, first = _backward(one, ways, one.inside, last, _max)
    return jnp.concatenate([first[None], after]) > NO / 2

  return jax.vmap(row)(languages, tokens, free)


def _given_ways(one: Followed, tokens, free):
  """Returns 0 for sets that a slot's token is in, any where it is free."""
  sets = one.members.shape[0]
  of, kind = one.members.T
  known = one.classes[tokens]
  x = jnp.where(free[:, None] | (kind == known[:, None]), 0.0, NO)
  return _segments(x.T, of, sets)[1].T


def walk(
  languages: Followed,
  state: Int[Array, "B"],
  tokens: Int[Array, "B W"],
  inside: Bool[Array, "B W"],
) -> Int[Array, "B"]:
  """Returns the state behind some tokens."""

  def row(one, state, tokens, inside):
    ways = _given_ways(one, tokens, jnp.zeros_like(inside))
    begin = jnp.where(jnp.arange(one.final.shape[0]) == state, 0.0, NO)
    _, last = _forward(one, ways, inside, begin, _max)
    return jnp.argmax(last).astype(jnp.int32)

  return jax.vmap(row)(languages, state, tokens, inside)
