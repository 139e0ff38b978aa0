"""An engine's rows have the tokens of the sampling program, whoever comes and goes."""

import queue

import jax
import numpy as np
import pytest

from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.requests import text_ids
from dllm_jax.serving import engine as engine_lib
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.requests import Closed, Finished, Full, Request
from dllm_jax.serving.scheduler import canvas_of
from tests import runs
from tests.sampling.small import MASK
from tests.sampling.test_invariance import ALONE, EXACT, exact
from tests.serving.served import (
  at_random,
  Heard,
  offline,
  program,
  SEED,
  Served,
  templates,
)

SPECS = ALONE | {name: exact(name, "block") for name in EXACT}
QUICK = {"dual": (3,), "block": (3,)}


def of(name):
  """Returns a sampler and its programs."""
  spec, counts = SPECS[name], QUICK.get(name)
  timed = name == "timed"
  return spec, program(spec, counts=counts, conditioned=timed)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.all
def test_rows_that_come_and_go_have_the_tokens_of_one_batch(name):
  spec, made = of(name)
  compiled = made.programs()
  rows = templates(spec.objective, 10)
  if name != "autoregressive":  # a whole block is given inside the last
    rows[-1] = (0, 4, *[None] * 6, 7, 5, 3, 8, *[None] * 4, 7, 5, 3, 8)
  want = offline(spec, rows, conditioned=name == "timed")
  for seed, calls in ((0, 1), (1, 3)):
    served = at_random(made, rows, seed=seed, calls=calls)
    reasons = [served.heard[number].reason for number in range(len(rows))]
    assert set(reasons) == {"length"}
    assert [served.heard[n].tokens for n in range(len(rows))] == want
    assert served.scheduler.finished["cancelled"]
  assert made.programs() == compiled


def test_a_cancelled_row_is_free_at_the_next_call():
  spec, made = of("dual")
  served = Served(made)
  rows = templates(spec.objective, 8)
  first, *others, last = sorted(rows, key=lambda row: -row.count(None))[:4]
  ticket = served.ticket(first, 0)
  served.round(ticket, *(served.ticket(r, 1 + i) for i, r in enumerate(others)))
  assert not served.scheduler.free
  ticket.cancel()
  served.scheduler.cancel()
  assert served.heard[0].reason == "cancelled"
  assert served.scheduler.free == [0]
  served.round(served.ticket(last, 3))
  assert not served.scheduler.free
  served.finish()
  want = offline(spec, [first, *others, last])
  assert [served.heard[n].tokens for n in (1, 2, 3)] == want[1:]


def test_canvases_are_read_two_at_a_time():
  spec, made = of("dual")
  served = Served(made)
  rows = templates(spec.objective, 3)
  served.round(*(served.ticket(row, n) for n, row in enumerate(rows)))
  # Two and one, then a call on the blocks of all three.
  assert served.scheduler.counts["calls"] == 2 + 1
  served.finish()
  assert [served.heard[n].tokens for n in range(3)] == offline(spec, rows)


@pytest.mark.all
@pytest.mark.parametrize("name", ["block", "dual", "autoregressive"])
def test_rows_move_where_fewer_are_computed_for_fewer(name):
  spec = SPECS[name]
  made = program(spec, counts=(1, 3))
  rows = templates(spec.objective, 6, seed=3)
  short = [row[: row.index(None) + 2] for row in rows[:2]]
  served = Served(made)
  joining = [*short, rows[2]]
  served.round(*(served.ticket(row, n) for n, row in enumerate(joining)))
  plans = []
  while served.scheduler.running:
    plans.append(served.scheduler.plan([]))
    served.scheduler.tell(served.scheduler.follow(plans[-1]))
  assert plans[-1]["rows"] == 1
  assert any(plan["moved"] for plan in plans)
  want = offline(spec, joining)
  assert [served.heard[n].tokens for n in range(3)] == want


@pytest.mark.all
def test_a_prompt_that_is_there_is_not_computed_again():
  spec, made = of("block")
  row = (3, 1, 4, 1, 5, 9, 2, 6, 5, None, None, None)
  other = (3, 1, 4, 1, 8, 9, 2, 6, 5, None, None)
  served = Served(made)
  served.round(served.ticket(row, 0))
  served.round(served.ticket(row, 1), served.ticket(other, 2))
  served.finish()
  served.round(served.ticket(row, 3))
  served.finish()
  cached = [served.heard[n][-1].usage.cached for n in range(4)]
  assert cached == [0, 8, 4, 8]  # in whole blocks of 4
  want = offline(spec, [row, row, other, row])
  assert [served.heard[n].tokens for n in range(4)] == want


@pytest.mark.all
def test_a_row_whose_network_fails_is_alone_in_it(monkeypatch):
  spec, made = of("block")
  good, others = templates(spec.objective, 1)[0], templates(spec.objective, 6)
  bad = (7, 7, 7, 7, 18, None, None, None)
  params, *held = made._held
  broken = jax.tree.map(np.array, params)
  broken["embed"]["embedding"][18] = np.nan
  rows = [row for row in (good, *others) if 18 not in row][:3]
  want = offline(spec, rows)
  monkeypatch.setattr(made, "_held", (broken, *held))
  served = Served(made)
  served.round(served.ticket(bad, 7), served.ticket(rows[0], 0))
  served.finish()
  assert served.heard[7].reason == "failed"
  assert served.heard[7][-1].usage.completion == 0
  served.round(*(served.ticket(rows[n], n) for n in (1, 2)))
  served.finish()
  for n in range(3):  # in the failed row, too
    expected = [t for t in served.heard[n].tokens]
    if 18 not in expected:
      assert served.heard[n].reason == "length"
  assert served.scheduler.finished == {"failed": 1, "length": 3}
  assert served.heard[0].tokens == want[0]


@pytest.mark.all
def test_ends_drafts_and_what_text_is():
  spec, made = of("block")
  rows = templates(spec.objective, 3)
  want = offline(spec, rows)
  served = Served(made)
  served.round(*(served.ticket(r, n, drafts=True) for n, r in enumerate(rows)))
  served.finish()
  for number, row in enumerate(rows):
    heard, free = served.heard[number], row.count(None)
    assert heard.drafts[-1].tokens == tuple(want[number][row.index(None) :])
    calls = [draft.call for draft in heard.drafts]
    assert calls == sorted(calls) and calls[-1] == heard[-1].usage.calls
    shown = [sum(t is not None for t in d.tokens) for d in heard.drafts]
    assert shown == sorted(shown)  # nothing is masked again by this policy
    assert heard[-1].usage.prompt == len(row) - free
    assert heard[-1].usage.completion == free
    assert heard.tokens == text_ids(want[number], row)


@pytest.mark.all
def test_a_text_ends_where_the_sampler_writes_on(monkeypatch):
  spec = SPECS["dual"]
  made = program(spec, counts=QUICK["dual"])
  rows = templates(spec.objective, 3)
  want = offline(spec, rows)
  end = want[0][rows[0].index(None) + 1]
  monkeypatch.setattr(made, "_end_ids", (end,))
  served = Served(made)
  served.round(*(served.ticket(row, n) for n, row in enumerate(rows)))
  served.finish()
  for number, row in enumerate(rows):
    heard, text = served.heard[number], text_ids(want[number], row, (end,))
    assert [t for t in heard.tokens if t is not None] == text
    cut = len(text) < len(want[number])
    assert heard[-1].reason == ("stop" if cut else "length")
  assert served.heard[0][-1].reason == "stop"


def test_the_tokenizers_ends_are_those_of_texts(tmp_path, monkeypatch):
  run = runs.run(tmp_path / "run")
  run.start()
  monkeypatch.setattr(type(run.tokenizer), "end_ids", (3,))
  made = {}

  def program_of(*_, **fields):
    made.update(fields)
    raise InterruptedError

  monkeypatch.setattr(engine_lib, "Program", program_of)
  with pytest.raises(InterruptedError):
    Engine.of(run, slots=1)
  assert made["end_ids"] == (3,)
  assert not made["defaults"].end_ids  # this sampler fills its canvas


def asked(template, number=0):
  return Request(
    template=template, number=number, options=RowOptions(seed=SEED)
  )


class Client:
  """A listener with a queue of what it heard."""

  def __init__(self, template):
    self.heard, self.over = Heard(template), queue.Queue()

  def __call__(self, event):
    self.heard.append(event)
    if isinstance(event, Finished):
      self.over.put(event.reason)

  def wait(self):
    return self.over.get(timeout=60)


@pytest.fixture
def engine():
  made = program(SPECS["dual"], counts=QUICK["dual"])
  made.reset()
  engine = Engine(made, queue=4)
  yield engine
  engine.stop()


def test_an_engine_serves_drains_and_closes(engine):
  spec = SPECS["dual"]
  rows = templates(spec.objective, 5)
  clients = [Client(row) for row in rows]
  submit = lambda n: engine.submit(asked(rows[n], n), clients[n])
  with pytest.raises(Closed):
    submit(0)
  assert not engine.ready
  engine.start()
  assert engine.ready
  for n in range(5):
    submit(n)
  engine.stop(deadline=60.0)
  want = offline(spec, rows)
  assert [client.wait() for client in clients] == ["length"] * 5
  assert [client.heard.tokens for client in clients] == want
  stats = engine.stats
  assert stats.running == stats.waiting == 0
  assert stats.finished == {"length": 5}
  assert stats.tokens == sum(row.count(None) for row in rows)
  assert stats.row_calls >= stats.calls > 0
  with pytest.raises(Closed):
    submit(0)
  with pytest.raises(ValueError, match="started before"):
    engine.start()


def test_a_full_queue_and_a_deadline(engine):
  row = templates(SPECS["dual"].objective, 1)[0]
  clients, blocked = [Client(row) for _ in range(8)], queue.Queue()
  first = Client(row)

  def stuck(event):
    blocked.get(timeout=60)  # holds the thread, so that nobody is let in
    first(event)

  engine.start()
  engine.submit(asked(row), stuck)
  taken = 0
  with pytest.raises(Full, match="wait already"):
    for client in clients:
      engine.submit(asked(row), client)
      taken += 1
  assert taken >= 4
  for _ in range(50):
    blocked.put(None)
  engine.stop(deadline=0.0)
  assert {client.wait() for client in clients[:taken]} == {"cancelled"}


@pytest.mark.all
def test_a_listener_that_raises_is_alone_in_it(engine, caplog):
  rows = templates(SPECS["dual"].objective, 2)
  engine.start()

  def broken(event):
    raise KeyError("mine")

  good = Client(rows[1])
  engine.submit(asked(rows[0]), broken)
  engine.submit(asked(rows[1], 1), good)
  assert good.wait() == "length"
  assert good.heard.tokens == offline(SPECS["dual"], rows)[1]
  assert "a listener failed" in caplog.text


def test_a_call_that_fails_gives_up_its_rows_and_goes_on(engine, monkeypatch):
  row = templates(SPECS["dual"].objective, 1)[0]
  engine.start()
  real = engine._program.advance

  def once(*args):
    monkeypatch.setattr(engine._program, "advance", real)
    raise RuntimeError("out of memory")

  monkeypatch.setattr(engine._program, "advance", once)
  for expected in ("failed", "length"):
    client = Client(row)
    engine.submit(asked(row), client)
    assert client.wait() == expected


@pytest.mark.parametrize(("template", "words"), [
    ((1,) * 30, "needs 30 slots, .* 6 more than the 24"),
    ((1, 2), "nothing to sample"),
    ((1, MASK, None), "mask token 19"),
    ((1, 99, None), "outside the vocabulary"),
])  # fmt: skip
def test_requests_that_no_engine_serves(engine, template, words):
  with pytest.raises(ValueError, match=words):
    engine.check(Request(template=template))


def test_an_autoregressive_network_fills_no_gap():
  request = Request(template=(0, 1, None, 2, None))
  with pytest.raises(ValueError, match="nothing after it"):
    canvas_of(request, SPECS["autoregressive"])
  assert canvas_of(request, SPECS["block"]) == [0, 1, None, 2, None]
