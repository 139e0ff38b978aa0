"""Several corpora with weights: shares, order, resuming, bad input."""

import json

import numpy as np
import pytest

from dllm_jax import config, data
from dllm_jax.data.streams import Mixture
from tests.data import token_files
from tests.data.test_batches import _run, _same

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mixture")
  for letter, field in (("a", "text"), ("b", "content")):
    rows = [{field: letter * (20 + i)} for i in range(200)]
    lines = "\n".join(map(json.dumps, rows))
    (folder / f"{letter}.jsonl").write_text(lines)
  ids = [[ord("c")] * (10 + i % 5) for i in range(300)]
  token_files.megatron(folder / "c", ids)
  return folder


@pytest.fixture(scope="module", params=["memory", "stream"])
def corpus(request, folder):
  return data.load(
    data.Dataset(
      mixture=(
        (f"{folder}/a.jsonl", 3),
        (f"{folder}/b.jsonl", 2.0, "content"),
        (f"{folder}/c.bin", 1),
      ),
      tokenizer="byte",
      length=LENGTH,
      packing="packed",
      virtual_shards=4,
      in_memory_bytes=0 if request.param == "stream" else 2**20,
    )
  )


def _letters(batches):
  """Returns how many rows of each batch are of each part."""
  first = np.stack([b["tokens"][:, 0] for b in batches])
  return np.stack([(first == ord(c)).sum(axis=1) for c in "abc"], axis=1)


def test_every_batch_has_the_weights_shares(corpus):
  counts = _letters(_run(corpus, 60)[0])
  assert (counts.sum(axis=1) == 8).all()  # And rows are of one part.
  np.testing.assert_allclose(
    counts.mean(axis=0) / 8, [3 / 6, 2 / 6, 1 / 6], atol=0.01
  )
  assert np.abs(counts - np.array([4, 8 / 3, 4 / 3])).max() < 2


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.few(1)
def test_order_and_resuming(corpus, processes):
  whole, _ = _run(corpus, 40)
  for steps in (0, 3, 36):
    _, state = _run(corpus, steps, processes=2)
    rest, _ = _run(corpus, 4, processes=processes, state=state)
    assert _same(whole[steps : steps + 4], rest)
  assert not _same(whole[:4], _run(corpus, 4, seed=1)[0])


def test_shards_deal_each_row_of_random_access_once():
  rows = [(np.array([i]), np.array([1])) for i in range(40)]
  mixture = Mixture(parts=(rows,), weights=(1.0,), virtual_shards=4)
  dealt = mixture.dealt(4, range(4), 0)
  for shards in (dealt, {2: dealt[2]}):
    iterators = [iter(shard) for shard in shards.values()]
    seen = [next(it)[0].item() for _ in range(10) for it in iterators]
    assert len({*seen}) == len(seen) == 10 * len(shards)


def test_held_out_text_counts_once(corpus):
  batches = list(data.held_out_batches(corpus, batch_size=8))
  tokens = np.concatenate([b.tokens[b.loss_mask] for b in batches])
  assert len(tokens) == corpus.held_out_text.tokens
  assert set(tokens.tolist()) == set(map(ord, "abc"))


def test_characters_of_all_parts(folder):
  corpus = data.load(
    data.Dataset(
      mixture=((f"{folder}/a.jsonl", 1), (f"{folder}/b.jsonl", 1, "content"))
    )
  )
  assert corpus.tokenizer.vocabulary == "ab"


def test_a_run_goes_on_with_its_mixture(folder):
  mixture = ((f"{folder}/a.jsonl", 1), (f"{folder}/b.jsonl", 0.5, "content"))
  held = json.loads(json.dumps({"data": {"mixture": mixture}}))
  assert config.config.differences(held, {"data": {"mixture": mixture}}) == []
  changed = {"data": {"mixture": mixture[:1]}}
  assert config.config.differences(held, changed)
  assert len(data.Dataset(**held["data"]).parts) == 2


@pytest.mark.parametrize(
  "part", ["path", ("path",), ("path", 0), ("path", "1"), ("path", 1, "a", "b")]
)
def test_bad_parts(part):
  with pytest.raises(ValueError, match="a part is .path, weight. or"):
    data.Dataset(mixture=(part,))
