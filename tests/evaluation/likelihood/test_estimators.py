"""Estimators against exact sums, their intervals, and a recorded likelihood."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Denoiser
from dllm_jax.evaluation.likelihood import documents, estimators
from dllm_jax.evaluation.likelihood.scorer import batch_of, Item, Scorer
from dllm_jax.evaluation.tasks.partial_results import Ledger
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.parallel import make_mesh, MeshConfig
from tests import golden_cases
from tests.objectives import toy
from tests.sampling import published

_LENGTH, _VOCAB, _MASK = 4, 4, 3
_X0 = np.array([2, 0, 1, 1])
_SPACE = {"vocab_size": _VOCAB, "mask_id": _MASK}
_KEY = jax.random.key(0)
_FAST = {  # These programs run once.
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@pytest.fixture(scope="module")
def table():
  return toy.Table.random(1, tokens=_VOCAB, length=_LENGTH)


def _estimate(
  name, objective, network, *, groups, copies, given=0, after=0, key=0
):
  """Returns the nats of each group's copies of x0, `[copies, groups]`."""
  item = Item(tokens=tuple(_X0.tolist()), given=given, after=after)
  batch = batch_of([item] * (groups * copies), _LENGTH)
  process = objective.init(_KEY)

  @functools.partial(jax.jit, compiler_options=_FAST)
  def run(keys, batch):
    return estimators.nats(name, objective, process, network, keys, batch)

  keys = jax.random.split(jax.random.key(key), groups)
  return np.asarray(run(keys, batch)).reshape(copies, groups)


def _by_counts(table, given=0, after=0):
  """Returns sum over masked sets of n / l (their nats), each count as likely."""
  terms, n = toy.masked_terms(table, _X0, _MASK), _LENGTH - given - after
  total = 0.0
  for masked, cost in terms.items():
    if masked and min(masked) >= given and max(masked) < _LENGTH - after:
      total += cost / len(masked) / math.comb(n, len(masked))
  return total


def _by_times(table, objective):
  terms = toy.masked_terms(table, _X0, _MASK)
  low = objective.time_epsilon
  return _LENGTH * toy.bound(terms, _LENGTH, objective.schedule, low=low)


def _in_order(table, order):
  """Returns the nats of revealing x0 in a fixed order."""
  log_p, z, total = toy.log_p_x0(table, _MASK), np.full(_LENGTH, _MASK), 0.0
  for i in order:
    total -= log_p[int(toy.index(z, _VOCAB)), i, _X0[i]]
    z[i] = _X0[i]
  return total


def _heated(table, rate):
  """Returns the table as it is when told that tokens are masked at a rate."""
  return toy.Table(logits=table.logits * (1.2 - rate), tokens=table.tokens)


def _told(table, objective):
  """Returns a network that is told the time; its outputs depend on it."""

  def network(inputs):
    if isinstance(objective, MD4):
      rate = objective.masked(inputs.conditioning / 1000.0)
    else:
      rate = -jnp.expm1(-inputs.conditioning)
    out = table(inputs)
    return out.replace(hidden=out.hidden * (1.2 - rate)[..., None])

  return network


def _over_rates(table):
  """Returns the continuous-time bound of `_told`, rates from 0 to 1."""
  nodes, mass = np.polynomial.legendre.leggauss(16)
  total = 0.0
  for m, weight in zip((nodes + 1) / 2, mass / 2, strict=True):
    for masked, cost in toy.masked_terms(_heated(table, m), _X0, _MASK).items():
      n = len(masked)
      total += weight * cost * m ** (n - 1) * (1 - m) ** (_LENGTH - n)
  return total


@pytest.mark.parametrize(
  "system", [MDLM, pytest.param(MD4, marks=pytest.mark.all)]
)
def test_counts_of_a_network_that_is_told_the_time(table, system):
  objective = system(**_SPACE, time_conditioning=True)
  network = _told(table, objective)
  found = _estimate("counts", objective, network, groups=2000, copies=4)
  mean, error, _ = documents.mean(found.mean(axis=0))
  exact = _over_rates(table)
  # Schedules end at 1e-3 and 1e-4: what is told beyond is their end.
  assert abs(mean - exact) < 3 * error + 1e-3 * exact and error < 0.02 * exact


def test_counts_need_no_end_terms(table):
  blind = MD4(**_SPACE, time_conditioning=False)
  same = MDLM(**_SPACE)
  run = lambda x: _estimate("counts", x, table, groups=2, copies=4)
  np.testing.assert_allclose(run(blind), run(same), rtol=1e-5)


@pytest.mark.parametrize(
  "name, given, after, copies",
  # Five copies do not divide the two tokens' counts.
  [("counts", 0, 0, 16), ("counts", 1, 1, 5), ("times", 0, 0, 16)],
)
@pytest.mark.few(1)
def test_agrees_with_the_exact_value_and_its_interval_covers(
  table, name, given, after, copies
):
  # Weights 1 / t over rows of four tokens have a tail that no interval of few
  # passes knows: it is cut here, in the exact value too.
  objective, repetitions, passes = MDLM(**_SPACE, time_epsilon=0.05), 500, 8
  exact = (
    _by_counts(table, given, after)
    if name == "counts"
    else _by_times(table, objective)
  )
  found = _estimate(
    name,
    objective,
    table,
    groups=repetitions * passes,
    copies=copies,
    given=given,
    after=after,
  )
  # Also of one row alone: in a corpus each has but one place among the strata.
  for each in (found.mean(axis=0), found[0], found[-1]):
    mean, error, _ = documents.mean(each)
    assert abs(mean - exact) < 3 * error and error < 0.02 * exact
  covered = 0
  for part in found.mean(axis=0).reshape(repetitions, passes):
    mean, _, half = documents.mean(part)
    covered += abs(mean - exact) <= half
  assert 0.92 <= covered / repetitions <= 0.98, covered


def test_orders_are_exact(table):
  objective = MDLM(**_SPACE)
  left = _estimate("left", objective, table, groups=1, copies=1)
  np.testing.assert_allclose(left, _in_order(table, range(4)), rtol=1e-5)
  given = _estimate("left", objective, table, groups=1, copies=1, given=2)
  z = np.array([*_X0[:2], _MASK, _MASK])
  log_p = toy.log_p_x0(table, _MASK)
  first = -log_p[int(toy.index(z, _VOCAB)), 2, _X0[2]]
  z[2] = _X0[2]
  both = first - log_p[int(toy.index(z, _VOCAB)), 3, _X0[3]]
  np.testing.assert_allclose(given, both, rtol=1e-5)


def _surest(p, name, x0):
  """Returns the nats of revealing x0 where the network is surest first."""
  z, total = np.full(_LENGTH, _MASK), 0.0
  for _ in range(_LENGTH):
    here = p[int(z @ _VOCAB ** np.arange(_LENGTH)[::-1])]
    best = np.sort(here, axis=1)
    rank = {
      "confidence": best[:, -1],
      "margin": best[:, -1] - best[:, -2],
      "entropy": np.sum(here * np.log(np.maximum(here, 1e-99)), axis=1),
      "target": here[np.arange(_LENGTH), x0],
    }[name]
    i = int(np.argmax(np.where(z == _MASK, rank, -np.inf)))
    total -= np.log(here[i, x0[i]])
    z[i] = x0[i]
  return total


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "target"])
@pytest.mark.few(2)
def test_an_order_by_policy_is_a_law(table, name):
  rows = toy.states(_MASK, _LENGTH)
  objective = MDLM(**_SPACE)
  batch = batch_of([Item(tokens=tuple(r)) for r in rows.tolist()], _LENGTH)
  nats = jax.jit(
    lambda: estimators.nats(
      name,
      objective,
      objective.init(_KEY),
      table,
      _KEY[None],
      batch,
    )
  )()
  # The order depends on what is revealed only: probabilities sum to one.
  total = np.exp(-np.asarray(nats)).sum()
  if name == "target":  # which looks at what is hidden
    assert total > 1.01
  else:
    np.testing.assert_allclose(total, 1.0, rtol=1e-4)
  p = np.exp(toy.log_p_x0(table, _MASK))
  expected = [_surest(p, name, x0) for x0 in rows]
  np.testing.assert_allclose(nats, expected, rtol=1e-4)


def _chain(network, objective):
  """Returns the exact nats of x0 under a block of one, slot by slot."""
  total = 0.0
  for i in range(_LENGTH):
    z = np.where(np.arange(_LENGTH) < i, _X0, _MASK)[None]
    inputs = objective.inputs(None, jnp.asarray(z), None, toy.batch(_X0[None]))
    logits = np.asarray(network(inputs).hidden[0, i], np.float64)
    logits[_MASK] = -np.inf
    total -= logits[_X0[i]] - np.logaddexp.reduce(logits)
  return total


@pytest.mark.all
def test_blocks_of_one_are_exact_and_larger_ones_bound():
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  # Times that training leaves out belong to the bound.
  clip = {"clip_low": 0.8, "clip_high": 0.9}
  one = BD3LM(**_SPACE, length=_LENGTH, block_size=2, **clip).with_blocks(1)
  assert estimators.choose(one, "auto") == "exact"
  run = lambda name, objective, **sizes: _estimate(
    name, objective, network, **sizes
  )
  exact = run("exact", one, groups=1, copies=1)[0, 0]
  np.testing.assert_allclose(exact, _chain(network, one), rtol=1e-5)
  surest = run("confidence", one, groups=1, copies=1)  # blocks come in order
  np.testing.assert_allclose(surest, exact, rtol=1e-5)
  counts = run("counts", one, groups=2, copies=1)
  np.testing.assert_allclose(counts, exact, rtol=1e-5)
  # Blocks of two: counts and times tend to one bound, up to time_epsilon.
  two = one.with_blocks(2)
  found = [
    documents.mean(run(name, two, groups=1000, copies=4).mean(axis=0))
    for name in ("counts", "times")
  ]
  gap = abs(found[0][0] - found[1][0])
  assert gap < 3 * math.hypot(found[0][1], found[1][1]) + 1e-3 * found[0][0]


def _counted(network, seen):
  """Returns the toy as a denoiser that counts the slots it really sees."""

  def apply(params, inputs, cache):
    del params
    slots = inputs.latent.size
    jax.debug.callback(lambda: seen.append(slots))
    return network(inputs), cache

  return Denoiser(init=lambda key, inputs: {}, apply=apply)


def _scorer(objective, network, seen, **fields):
  return Scorer(
    objective=objective,
    denoiser=_counted(network, seen),
    params={"model": {}, "process": {}},
    process=objective.init(_KEY),
    mesh=make_mesh(MeshConfig(data=1), jax.devices()[:1]),
    **fields,
  )


@pytest.mark.parametrize(
  "objective, estimator, slots",
  [
    pytest.param(MDLM(**_SPACE), "counts", 8 * 4 * 3, marks=pytest.mark.all),
    (MDLM(**_SPACE), "left", 8 * 3 * 6),  # as many calls as tokens to score
    (BD3LM(**_SPACE, length=8, block_size=2), "counts", 2 * 8 * 4 * 3),
  ],
)
@pytest.mark.few(1)
def test_costs_as_many_tokens_as_the_protocol_says(
  objective, estimator, slots, monkeypatch
):
  monkeypatch.setattr(
    "dllm_jax.evaluation.likelihood.scorer.bucket", lambda n: 8
  )
  network, seen = toy.Attention(length=8, tokens=_VOCAB), []
  scorer = _scorer(objective, network, seen)
  if estimator != scorer.estimator:
    scorer = _scorer(objective, network, seen, estimator=estimator)
  items = [
    Item(tokens=(0, 1, 2, 0, 1, 2, 0, 1), given=given) for given in (2, 3, 5)
  ]
  free = estimator in documents.FREE
  found = scorer.score(items, samples=1 if free else 4, key=_KEY, rows=12)
  jax.effects_barrier()
  assert sum(seen) == scorer.forward_tokens == slots
  assert found.shape == (3,) and np.all(found > 0)
  # A text's figure is its own, whatever stands beside it.
  alone = scorer.score(items[1:2], samples=1 if free else 4, key=_KEY, rows=12)
  np.testing.assert_allclose(alone, found[1:2], rtol=1e-5)


def test_what_an_objective_has_no_likelihood_for():
  mdlm, ar = MDLM(**_SPACE), Autoregressive(**_SPACE)
  told = MDLM(**_SPACE, time_conditioning=True)
  assert estimators.choose(mdlm, "auto") == "counts"
  assert estimators.choose(told, "auto") == "counts"
  assert estimators.choose(MDLM(**_SPACE, steps=8), "auto") == "times"
  assert estimators.choose(ar, "auto") == "exact"
  with pytest.raises(
    ValueError, match="not told the time; legal: auto, counts"
  ):
    estimators.choose(told, "left")
  with pytest.raises(ValueError, match="at one rate .* legal: auto, times$"):
    estimators.choose(SEDD(**_SPACE), "counts")
  with pytest.raises(ValueError, match="an autoregressive model, or blocks"):
    estimators.choose(mdlm, "exact")
  with pytest.raises(ValueError, match="unknown estimator 'best'; legal: auto"):
    estimators.choose(mdlm, "best")
  with pytest.raises(ValueError, match="has no blocks"):
    mdlm.with_blocks(2)


def test_windows_score_every_token_once():
  ids = list(range(1, 24))
  whole = documents.windows(ids, length=23, overlap=5)
  assert whole == [Item(tokens=tuple(ids))]  # it fits: the document itself
  for length, overlap in itertools.product((5, 8), (0, 1, 4)):
    parts = documents.windows(ids, length=length, overlap=overlap)
    scored = []
    for part in parts:
      before = scored[len(scored) - part.given :] if part.given else []
      assert list(part.tokens[: part.given]) == before
      scored += part.tokens[part.given :]
    assert scored == ids
    assert all(len(part.tokens) <= length for part in parts)
    assert {part.given for part in parts[1:]} == {overlap}
  with pytest.raises(ValueError, match="empty document"):
    documents.windows([], length=8)
  with pytest.raises(ValueError, match=r"must lie in \[0, 8\)"):
    documents.windows(ids, length=8, overlap=8)
  with pytest.raises(ValueError, match="does not fit the canvas of 8"):
    documents.answer([1] * 5, [2] * 4, canvas=8)
  with pytest.raises(ValueError, match="empty answer"):
    documents.answer([1], [], canvas=8)


def test_errors_are_students():
  # s^2 = 14 / 3 over four passes; t of 0.975 at 3 degrees of freedom.
  mean, error, half = documents.mean([1.0, 2.0, 3.0, 6.0])
  assert mean == 3.0 and error == pytest.approx((14 / 3) ** 0.5 / 2)
  assert half == pytest.approx(3.182446 * error, rel=1e-6)
  assert documents.mean([2.0]) == (2.0, 0.0, 0.0)


def test_passes_stop_at_the_error():
  passes = documents.Passes(least=4, most=9, error=0.5)
  wide, narrow = [0.0, 10.0, 0.0, 10.0], [5.0, 5.1, 5.0, 5.1]
  assert not passes.over(narrow[:3], 1)
  assert passes.over(narrow, 1) and not passes.over(wide, 1)
  assert passes.over(wide * 3, 1)
  assert passes.over(wide, 100)  # the error is that of a token


class _Counting:
  """A scorer without a network, which can be stopped."""

  estimator, objective = "counts", None

  def __init__(self, calls):
    self.left, self.asked = calls, []

  def canvas(self, tokens):
    return 32 if tokens <= 32 else 64

  def score(self, items, *, samples, key, rows):
    assert len({self.canvas(len(item.tokens)) for item in items}) == 1
    if not self.left:
      raise KeyboardInterrupt
    self.left -= 1
    self.asked += items
    noise = jax.random.uniform(key)
    return np.array([len(item.tokens) + float(noise) for item in items])


def test_documents_resume_where_they_were_stopped(tmp_path):
  items = [Item(tokens=(1,) * (n % 60 + 1)) for n in range(100)]
  path, passes = tmp_path / "ledger.jsonl", documents.Passes(least=2, most=2)

  def run(scorer, ledger):
    return documents.of_items(
      scorer, items, samples=4, passes=passes, seed=0, rows=8, ledger=ledger
    )[0]

  whole, first, rest = (_Counting(n) for n in (99, 4, 99))
  expected = run(whole, Ledger(None, {}))
  assert sorted(len(i.tokens) for i in whole.asked) == sorted(
    2 * [len(i.tokens) for i in items]
  )
  with pytest.raises(KeyboardInterrupt):
    run(first, Ledger(path, {}))
  assert run(rest, Ledger(path, {})) == expected
  assert len(first.asked) + len(rest.asked) == 200 and len(first.asked) > 90
  assert run(_Counting(0), Ledger(path, {})) == expected


_RUNS = golden_cases.load("llada_likelihood").config["runs"]


@pytest.mark.parametrize("i", range(len(_RUNS)))
@pytest.mark.few(1)
def test_recorded_likelihood(i):
  case, run = golden_cases.load("llada_likelihood"), _RUNS[i]
  arrays = case.arrays
  model = published.model("llada_likelihood")
  prompt, reply = arrays[f"run{i}_prompt"], arrays[f"run{i}_answer"]
  z = arrays[f"run{i}_perturbed"].reshape(-1, len(prompt) + len(reply))
  item = Item(
    tokens=tuple(np.concatenate([prompt, reply]).tolist()), given=len(prompt)
  )
  batch = batch_of([item] * len(z), z.shape[1])
  denoise = lambda inputs: model.denoiser.apply(model.params, inputs, None)[0]
  if run["cfg_scale"]:
    denoise = estimators.Guided(
      denoise=denoise,
      scale=run["cfg_scale"],
      prompt=~batch.loss_mask,
      mask_id=run["mask_id"],
    )
  process = model.objective.unbiased(model.objective.init(_KEY))
  half = jnp.full(z.shape, 0.5)  # not read: the network is told no time
  terms = jax.jit(
    lambda z: model.objective.restore(process, denoise, z, batch, half)
  )(jnp.asarray(z))
  masked = np.sum(z == run["mask_id"], axis=1, keepdims=True)
  nats = np.asarray(terms) * len(reply) / masked
  expected = arrays[f"run{i}_token_loss"].reshape(z.shape)
  np.testing.assert_allclose(nats, expected, rtol=1e-4, atol=2e-4)
  np.testing.assert_allclose(
    -nats.sum(axis=1).mean(),
    arrays[f"run{i}_log_likelihood"],
    rtol=1e-4,
    atol=2e-4,
  )
