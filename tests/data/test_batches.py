"""The order of training and evaluation, for every kind of data."""

import collections
import json

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.data import packing
from tests.data import token_files

LENGTH, BATCH = 16, 8
DOCUMENTS = [f"<{i}:{'x' * (i * 7 % 40)}>" for i in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("corpus")
  lines = (json.dumps({"text": text}) for text in DOCUMENTS)
  (folder / "docs.jsonl").write_text("\n".join(lines))
  data.prepare(
    str(folder / "docs.jsonl"),
    "byte",
    str(folder / "prepared"),
    length=2 * LENGTH,
    packing="packed",
    workers=1,
    piece_bytes=3000,
  )
  ids = [np.frombuffer(text.encode(), np.uint8) for text in DOCUMENTS]
  token_files.megatron(folder / "megatron", ids)
  return folder


@pytest.fixture(
  scope="module",
  params=["slices", "packed", "stream", "prepared", "megatron"],
)
def corpus(request, folder):
  kind = request.param
  name = kind if kind in ("prepared", "megatron") else "docs.jsonl"
  return data.load(
    data.Dataset(
      path=str(folder / name),
      tokenizer="byte",
      length=LENGTH,
      packing="slices" if kind == "slices" else "packed",
      in_memory_bytes=0 if kind == "stream" else 2**20,
      virtual_shards=4,
    )
  )


def _run(corpus, steps, *, processes=1, seed=0, state=None):
  """Returns the global batches of some steps, and the state after them."""
  iterators = [
    data.train_iterator(
      corpus,
      batch_size=BATCH,
      seed=seed,
      process_index=i,
      process_count=processes,
    )
    for i in range(processes)
  ]
  batches = []
  try:
    for iterator in iterators:
      if state is not None:
        iterator.set_state(state)
    for _ in range(steps):
      shares = [next(iterator) for iterator in iterators]
      assert all(len(s.tokens) == BATCH // processes for s in shares)
      batches.append({
        name: np.concatenate([getattr(s, name) for s in shares])
        for name in ("tokens", "loss_mask", "segment_ids", "positions")
      })
    states = [iterator.get_state() for iterator in iterators]
  finally:
    for iterator in iterators:
      iterator.close()
  return batches, json.loads(json.dumps(data.merge_states(states)))


def _same(left, right):
  return len(left) == len(right) and all(
    (a[name] == b[name]).all()
    for a, b in zip(left, right, strict=True)
    for name in a
  )


def test_batch_is_a_function_of_seed_and_number(corpus):
  batches, _ = _run(corpus, 5)
  assert _same(batches, _run(corpus, 5)[0])
  assert not _same(batches, _run(corpus, 5, seed=1)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(corpus, processes):
  batches, state = _run(corpus, 5)
  shared, shared_state = _run(corpus, 5, processes=processes)
  assert _same(batches, shared)
  assert state == shared_state


@pytest.fixture(scope="module")
def whole(corpus):
  """Batches that nothing interrupts: several epochs of each kind."""
  return _run(corpus, 154)[0]


@pytest.fixture(scope="module", params=[1, 4])
def states(corpus, request):
  """States after some steps of so many processes."""
  return {n: _run(corpus, n, processes=request.param)[1] for n in (0, 3, 150)}


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.few(3)
def test_resumes_on_any_number_of_processes(corpus, whole, states, processes):
  for steps, state in states.items():
    rest, _ = _run(corpus, 4, processes=processes, state=state)
    assert _same(whole[steps : steps + 4], rest)


def test_an_iterator_can_go_back(corpus):
  iterator = data.train_iterator(corpus, batch_size=BATCH, seed=0)
  next(iterator)
  state = iterator.get_state()
  first = [next(iterator).tokens for _ in range(6)]
  iterator.set_state(state)
  again = [next(iterator).tokens for _ in range(6)]
  iterator.close()
  np.testing.assert_array_equal(first, again)


def test_batch_contents(corpus):
  for batch in _run(corpus, 3)[0]:
    assert batch["tokens"].shape == (BATCH, LENGTH)
    assert batch["tokens"].dtype == np.int32
    assert batch["loss_mask"].dtype == bool
    segments = batch["segment_ids"]
    np.testing.assert_array_equal(batch["loss_mask"], segments > 0)
    np.testing.assert_array_equal(segments[:, 0], 1)
    np.testing.assert_array_equal(
      batch["positions"], packing.positions(segments)
    )


def _rows(batches):
  rows = [row.tobytes() for b in batches for row in b["tokens"]]
  return collections.Counter(rows)


@pytest.mark.few(2)
def test_an_epoch_has_every_row_once(corpus):
  if not hasattr(corpus.train, "__len__"):
    pytest.skip("text packed on the fly has epochs a shard; see test_stream")
  n = len(corpus.train)
  steps = 3 * n // BATCH + 1
  rows = [row for b in _run(corpus, steps)[0] for row in b["tokens"]]
  expected = collections.Counter(corpus.train[i][0].tobytes() for i in range(n))
  epochs = [rows[i * n : (i + 1) * n] for i in range(3)]
  for epoch in epochs:
    assert collections.Counter(r.tobytes() for r in epoch) == expected
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(epochs[0], [corpus.train[i][0] for i in range(n)])


@pytest.mark.few(2)
def test_held_out_counts_every_token_once(corpus):
  tokens = []
  for processes in (1, 4):
    shares = [
      list(
        data.held_out_batches(
          corpus,
          batch_size=BATCH,
          process_index=i,
          process_count=processes,
        )
      )
      for i in range(processes)
    ]
    assert len({len(s) for s in shares}) == 1
    rows = [
      row
      for batches in zip(*shares, strict=True)
      for batch in batches
      for row in np.where(batch.loss_mask, batch.tokens, -1)
    ]
    assert len(rows) % BATCH == 0
    tokens.append(np.concatenate(rows))
  np.testing.assert_array_equal(*tokens)
  text = bytes(tokens[0][tokens[0] >= 0].astype(np.uint8)).decode()
  assert len(text) == corpus.held_out_text.tokens
  assert len(text) == corpus.held_out_text.characters
  held_out = [d for d in DOCUMENTS if d in text]
  assert text == "".join(held_out)
  assert 0 < len(held_out) < len(DOCUMENTS) / 2
  # And none of it is trained on.
  steps = 150
  train = b"".join(
    row[mask].astype(np.uint8).tobytes()
    for b in _run(corpus, steps)[0]
    for row, mask in zip(b["tokens"], b["loss_mask"], strict=True)
  )
  assert not [d for d in held_out if len(d) > 6 and d.encode() in train]


def test_held_out_can_be_repeated_and_limited(corpus):
  held_out = data.held_out_batches(corpus, batch_size=BATCH)
  first, second = ([b.tokens for b in held_out] for _ in range(2))
  np.testing.assert_array_equal(first, second)
  limited = data.held_out_batches(corpus, batch_size=BATCH, limit=2)
  np.testing.assert_array_equal([b.tokens for b in limited], first[:2])


def test_bad_sharing(corpus):
  with pytest.raises(ValueError, match="batch_size 8 is not a multiple of 3"):
    data.train_iterator(corpus, batch_size=BATCH, seed=0, process_count=3)
  with pytest.raises(ValueError, match="process_index is 2; legal are 0 to 1"):
    data.held_out_batches(
      corpus, batch_size=BATCH, process_index=2, process_count=2
    )


def test_bad_states(corpus):
  iterator = data.train_iterator(corpus, batch_size=BATCH, seed=0)
  other = {"batch": 0}
  if "shards" not in iterator.get_state():
    other["shards"] = {}
  with pytest.raises(ValueError, match="of another kind of data"):
    iterator.set_state(other)
  iterator.close()
  with pytest.raises(ValueError, match="of different batches"):
    data.merge_states([{"batch": 1}, {"batch": 2}])
