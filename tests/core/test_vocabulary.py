"""Chunked vocabulary reductions against dense ones: values, gradients, cost."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import vocabulary
from dllm_jax.core.axes import AXES
from dllm_jax.core.noise import Keyed, Tag
from dllm_jax.core.types import ModelOutputs
from dllm_jax.core.vocabulary import (
  best,
  cross_entropy,
  forbid,
  mean_embedding,
  reduce,
)

_BATCH, _LENGTH, _WIDTH, _VOCAB, _PADDED = 3, 14, 6, 11, 16


@pytest.fixture(params=["one chunk", "chunks"])
def chunking(request, monkeypatch):
  """Runs a test with one chunk, and with chunks that do not divide."""
  if request.param == "chunks":
    monkeypatch.setattr(vocabulary, "_chunk_rows", lambda vocab: 12)


def _outputs(seed=0, *, bias=True):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return ModelOutputs(
    hidden=normal(_BATCH, _LENGTH, _WIDTH),
    unembed=normal(_WIDTH, _PADDED),
    bias=normal(_PADDED) if bias else None,
    vocab_size=_VOCAB,
  )


def _targets_and_weights():
  rng = np.random.default_rng(9)
  targets = rng.integers(0, _VOCAB, (_BATCH, _LENGTH), np.int32)
  weights = rng.uniform(size=targets.shape).astype(np.float32)
  kept = rng.uniform(size=targets.shape) < 0.6
  return jnp.asarray(targets), jnp.asarray(np.where(kept, weights, 0.0))


def _dense_logits(out):
  logits = out.hidden @ out.unembed
  logits = logits if out.bias is None else logits + out.bias
  return logits[..., : out.vocab_size]


def _dense(out, targets, weights):
  log_p = jax.nn.log_softmax(_dense_logits(out))
  terms = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  return jnp.sum(jnp.where(weights != 0, weights * terms, 0.0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.few(2)
def test_cross_entropy_equals_the_dense_one(chunking, bias):
  del chunking
  out, (targets, weights) = _outputs(bias=bias), _targets_and_weights()

  def loss(fn, hidden, unembed, bias, weights):
    found = out.replace(hidden=hidden, unembed=unembed, bias=bias)
    value = fn(found, targets, weights)
    # A factor checks that the cotangent reaches each gradient.
    return 3.0 * (value[0] if isinstance(value, tuple) else value)

  at = (0, 1, 2, 3) if bias else (0, 1, 3)
  args = (out.hidden, out.unembed, out.bias, weights)
  of = lambda fn: jax.jit(jax.value_and_grad(lambda *a: loss(fn, *a), at))
  value, grads = of(cross_entropy)(*args)
  expected, dense = of(_dense)(*args)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  # Where the weight is 0 the term is not computed, nor its weight's gradient.
  *dense, d_weights = dense
  dense.append(jnp.where(weights != 0, d_weights, 0.0))
  for found, grad in zip(grads, dense, strict=True):
    np.testing.assert_allclose(found, grad, rtol=1e-4, atol=1e-5)


def test_per_token_terms_are_unweighted_and_zero_without_weight(chunking):
  del chunking
  out, (targets, weights) = _outputs(), _targets_and_weights()
  _, terms = cross_entropy(out, targets, weights)
  log_p = jax.nn.log_softmax(_dense_logits(out))
  dense = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(
    terms, jnp.where(weights != 0, dense, 0.0), rtol=1e-4, atol=1e-5
  )


def test_given_logits_need_no_unembedding():
  out, (targets, weights) = _outputs(), _targets_and_weights()
  given = ModelOutputs(hidden=_dense_logits(out))
  np.testing.assert_allclose(
    cross_entropy(given, targets, weights)[0],
    cross_entropy(out, targets, weights)[0],
    rtol=1e-5,
  )


def test_forbidden_token_has_no_probability_and_finite_gradients(chunking):
  del chunking
  targets, weights = _targets_and_weights()
  token = 4
  # A position without a weight may well have the forbidden target.
  weights = jnp.where(targets == token, 0.0, weights)
  assert bool(jnp.any(targets == token))

  def loss(out):
    return cross_entropy(forbid(out, token), targets, weights)[0]

  def dense(out):
    logits = _dense_logits(out)
    logits = jnp.where(jnp.arange(_VOCAB) == token, -1e30, logits)
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(weights != 0, weights * picked, 0.0))

  out = _outputs()
  value, found = jax.jit(jax.value_and_grad(loss))(out)
  dense_value, expected = jax.jit(jax.value_and_grad(dense))(out)
  np.testing.assert_allclose(value, dense_value, rtol=1e-5)
  for name in ("hidden", "unembed", "bias"):
    np.testing.assert_allclose(
      getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5
    )
  assert forbid(out, None) is out


def test_reduce_equals_the_dense_function(chunking):
  del chunking
  out, (targets, weights) = _outputs(), _targets_and_weights()
  time = jnp.linspace(0.1, 0.9, _BATCH)[:, None]

  def fn(logits, chunk, time):
    assert logits.shape[-1] == _VOCAB  # Padding is sliced off.
    log_p = jax.nn.log_softmax(logits) * time[..., None]
    targets, weights = chunk
    picked = jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return {"best": jnp.argmax(logits, -1), "picked": picked * weights}

  def whole(out):
    return fn(_dense_logits(out), (targets, weights), time)

  def chunked(out):
    return reduce(fn, out, (targets, weights), time)

  def both(of, out):
    """Returns what a function gives, and a gradient through it."""
    square = lambda o: jnp.sum(of(o)["picked"] ** 2)
    return of(out), jax.grad(square)(out)

  found, grads = jax.jit(functools.partial(both, chunked))(out)
  expected, dense = jax.jit(functools.partial(both, whole))(out)
  np.testing.assert_array_equal(found["best"], expected["best"])
  np.testing.assert_allclose(found["picked"], expected["picked"], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(dense), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_reduce_reads_a_window_of_each_row(chunking):
  del chunking
  out = _outputs()
  start = jnp.array([-1, 0, 5])
  window = start[:, None] + jnp.arange(7)
  offset = jnp.arange(_BATCH * 7).reshape(_BATCH, 7)
  total = lambda logits, o: jnp.sum(logits, -1) + o
  found = jax.jit(lambda out: reduce(total, out, offset, window=window))(out)
  rows = jnp.arange(_BATCH)[:, None]
  dense = jnp.sum(_dense_logits(out), -1)[rows, jnp.maximum(window, 0)]
  np.testing.assert_allclose(found, dense + offset, rtol=1e-4, atol=1e-4)


def test_reduce_of_two_outputs_gives_both_logits(chunking):
  del chunking
  first, second = _outputs(0), _outputs(1)
  largest = lambda ls: jnp.max(2 * ls[0] - ls[1], -1)
  found = jax.jit(functools.partial(reduce, largest))((first, second))
  dense = jnp.max(2 * _dense_logits(first) - _dense_logits(second), -1)
  np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-4)


# ---- cost -------------------------------------------------------------------


def _dot_flops(text, *, unknown_trips=1):
  """Returns the FLOPs of all dots of compiled HLO, loops multiplied out.

  `unknown_trips` is used for loops whose trip count is not in the text.
  """
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
    if head:
      name = head[1]
      bodies[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif name:
      bodies[name].append(line)

  def shape(text):
    return [int(n) for n in text.split(",") if n]

  def count(name):
    total, shapes = 0, {}
    for line in bodies[name]:
      define = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line)
      if define:
        shapes[define[1]] = shape(define[2])
      dot = re.search(
        r" dot\(%?([\w.\-]+), .*lhs_contracting_dims={([\d,]+)}", line
      )
      if dot:
        inner = [shapes[dot[1]][i] for i in shape(dot[2])]
        total += 2 * math.prod(shapes[define[1]]) * math.prod(inner)
      trips = 1
      if " while(" in line:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        trips = int(known[1]) if known else unknown_trips
      for callee in re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", line):
        total += trips * count(callee)
    return total

  return count(entry)


def _mesh(*shape):
  kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.make_mesh(shape, AXES, axis_types=kinds)


def _entropy_step(hidden, unembed, targets):
  out = ModelOutputs(hidden=hidden, unembed=unembed)
  return cross_entropy(out, targets, jnp.ones(targets.shape))[0]


def _draw_step(hidden, unembed, targets):
  out = ModelOutputs(hidden=hidden, unembed=unembed)
  return reduce(lambda logits, t: jnp.argmax(logits, -1) + t, out, targets)


@pytest.mark.parametrize("step", ["cross_entropy", "reduce"])
@pytest.mark.parametrize("shape", [(8, 1, 1, 1, 1), (2, 2, 1, 2, 1)])
def test_each_device_does_its_share(monkeypatch, step, shape):
  monkeypatch.setattr(vocabulary, "_chunk_rows", lambda vocab: 16)
  batch, length, width, vocab = 16, 32, 24, 128
  fn = _draw_step
  if step == "cross_entropy":
    fn = jax.value_and_grad(_entropy_step, (0, 1))
  mesh = _mesh(*shape)
  with jax.set_mesh(mesh):
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp", "expert"), "context"))
    whole = jax.NamedSharding(mesh, jax.P())
    args = (
      jax.ShapeDtypeStruct((batch, length, width), jnp.float32, sharding=rows),
      jax.ShapeDtypeStruct((width, vocab), jnp.float32, sharding=whole),
      jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows),
    )
    text = jax.jit(fn).lower(*args).compile().as_text()
  # cross_entropy's loop runs over the chunks that have a weight: all of them.
  local = batch * length // 8
  flops = _dot_flops(text, unknown_trips=local // 16)
  products = 3 if step == "cross_entropy" else 1
  assert flops == products * 2 * batch * length * width * vocab // 8
  assert "all-gather" not in text
  assert "all-to-all" not in text and "collective-permute" not in text


def test_mesh_does_not_change_the_loss(monkeypatch):
  monkeypatch.setattr(vocabulary, "_chunk_rows", lambda vocab: 16)
  keys = jax.random.split(jax.random.key(0), 3)
  args = (
    jax.random.normal(keys[0], (16, 8, 6)),
    jax.random.normal(keys[1], (6, 20)),
    jax.random.randint(keys[2], (16, 8), 0, 20),
  )
  fn = jax.value_and_grad(_entropy_step, (0, 1))
  alone = jax.jit(fn)(*args)
  with jax.set_mesh(_mesh(4, 1, 1, 2, 1)):
    spread = jax.jit(fn)(*args)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _all_values(jaxpr):
  """Yields every value of a jaxpr and of those inside it."""
  for equation in jaxpr.eqns:
    yield from (var.aval for var in equation.outvars)
    for param in equation.params.values():
      for inner in jax.tree.leaves(
        param, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
      ):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _all_values(inner)


def test_no_value_has_positions_times_vocabulary():
  rows, length, width, vocab = 2, 1024, 64, 50_000
  args = (
    jax.ShapeDtypeStruct((rows, length, width), jnp.bfloat16),
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct((rows, length), jnp.int32),
  )

  def draw(hidden, unembed, request):
    noise = Keyed.at(
      jax.random.key(0),
      request=request[:, 0],
      step=request[:, 0],
      position=request,
    )
    out = ModelOutputs(hidden=hidden, unembed=unembed)
    return reduce(
      lambda logits, n: n.categorical(Tag.TOKEN, logits), out, noise
    )

  for fn in (jax.value_and_grad(_entropy_step, (0, 1)), draw):
    sizes = [
      math.prod(getattr(value, "shape", ()))
      for value in _all_values(jax.make_jaxpr(fn)(*args).jaxpr)
    ]
    assert len(sizes) > 50
    assert max(sizes) < rows * length * vocab
    assert max(sizes) < length * vocab  # not even of one row


def test_a_tied_table_is_read_as_it_is_stored():
  """A loop over chunks copies no table, whichever product reads it."""
  rows, length, width, vocab = 4, 256, 1024, 16_384

  def said(hidden, table, tied):
    out = ModelOutputs(hidden=hidden, unembed=table.T, tied=tied)
    mean = mean_embedding(out)
    return reduce(lambda x: mean(jax.nn.softmax(x)), out, live=4)

  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  args = array(rows, length, width), array(vocab, width)
  program = jax.jit(said, static_argnums=2).lower(*args, True).compile()
  table = 4 * vocab * width
  assert program.memory_analysis().temp_size_in_bytes < table
  x = jax.random.normal(jax.random.key(0), (1, 3, 8))
  table = jax.random.normal(jax.random.key(1), (16, 8))
  found = [jax.jit(said, static_argnums=2)(x, table, t) for t in (True, False)]
  np.testing.assert_allclose(*found, rtol=1e-5)
  p = jax.nn.softmax(x @ table.T)
  np.testing.assert_allclose(found[0], p @ table, rtol=1e-5)


@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_the_best_token_is_the_first_of_equals(vocab):
  """Other forms of `argmax` part where logits tie, or are forbidden."""
  rng = np.random.default_rng(vocab)
  logits = rng.integers(0, 4, (5, 6, vocab)).astype(np.float32)
  logits[0, 0], logits[1, :, : vocab // 2] = -np.inf, -np.inf
  found = jax.jit(best)(logits)
  assert found.dtype == jnp.int32
  expected = np.argmax(logits, axis=-1)
  np.testing.assert_array_equal(found, expected)
  bad = jax.jit(best)(np.full((2, vocab), np.nan, np.float32))
  assert ((bad >= 0) & (bad < vocab)).all()
