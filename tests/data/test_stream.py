"""Text packed on the fly: what each shard reads, and its limits."""

import dataclasses
import gzip
import json

import pytest

from dllm_jax import data
from dllm_jax.data import source
from dllm_jax.data.streams import stream


def _corpus(folder, texts, *, files=1, shards=4, **settings):
  for i in range(files):
    lines = [json.dumps({"text": text}) for text in texts[i::files]]
    (folder / f"{i}.jsonl").write_text("\n".join(lines))
  return data.load(
    data.Dataset(
      path=str(folder),
      tokenizer="byte",
      length=32,
      packing="packed",
      in_memory_bytes=0,
      virtual_shards=shards,
      **settings,
    )
  )


def _epoch(corpus, shards):
  """Returns the texts of each shard's first epoch."""
  train = corpus.train
  units = stream._units(train.files, train.form, shards)
  read = []
  for shard in range(shards):
    documents = iter(
      stream._Documents(train, units[shard::shards], seed=(0, shard))
    )
    texts = []
    while True:
      before = documents.get_state()["epoch"]
      ids = next(documents)["tokens"]
      if documents.get_state()["epoch"] != before:
        break
      texts.append(corpus.tokenizer.decode(ids))
    read.append(texts)
  return read


@pytest.mark.parametrize("files", [1, 3, 9])
def test_shards_read_every_document_once(tmp_path, monkeypatch, files):
  # Pieces of 500 bytes: some shards own several.
  monkeypatch.setattr(stream, "_MIN_PIECE_BYTES", 500)
  texts = [f"text {i}" for i in range(300)]
  corpus = _corpus(tmp_path, texts, files=files, held_out=0.0)
  read = _epoch(corpus, 4)
  assert sorted(sum(read, [])) == sorted(texts)
  assert min(map(len, read)) > 0
  assert read[0] != [t for t in texts if t in read[0]]


def test_few_pieces_are_shared_by_document(tmp_path):
  texts = [f"text {i}" for i in range(30)]
  corpus = _corpus(tmp_path, texts, held_out=0.0)
  assert len(source.spans(corpus.train.files, corpus.train.form, 2**16)) == 1
  read = _epoch(corpus, 4)
  assert sorted(sum(read, [])) == sorted(texts)


def test_no_process_reads_everything(tmp_path, monkeypatch):
  texts = [f"text {i}" for i in range(300)]
  corpus = _corpus(tmp_path, texts, files=8, held_out=0.0)
  read, seen = source.read, set()

  def spy(span, form):
    seen.add(span)
    return read(span, form)

  monkeypatch.setattr(source, "read", spy)
  iterator = data.train_iterator(
    corpus, batch_size=4, seed=0, process_index=1, process_count=4
  )
  for _ in range(40):
    next(iterator)
  iterator.close()
  assert {span.path[-7:] for span in seen} == {"1.jsonl", "5.jsonl"}


def test_epochs_are_shuffled_anew(tmp_path):
  texts = [f"{i:03d}" for i in range(40)]
  corpus = _corpus(tmp_path, texts, held_out=0.0)
  units = stream._units(corpus.train.files, corpus.train.form, 1)
  documents = iter(stream._Documents(corpus.train, units, seed=(0, 0)))
  epochs = [
    [corpus.tokenizer.decode(next(documents)["tokens"]) for _ in texts]
    for _ in range(2)
  ]
  assert sorted(epochs[0]) == sorted(epochs[1]) == texts
  assert epochs[0] != epochs[1]


def test_limits_of_shards(tmp_path):
  corpus = _corpus(tmp_path, ["one", "two"], held_out=0.0)
  iterator = data.train_iterator(corpus, batch_size=8, seed=0)
  few = "too few documents for virtual shard 2"
  with pytest.raises(ValueError, match=few) as error:
    next(iterator)
  assert "\n" not in str(error.value)
  iterator.close()
  with pytest.raises(ValueError, match="3 processes cannot share 4 virtual"):
    data.train_iterator(corpus, batch_size=12, seed=0, process_count=3)
  # The number of shards follows the batch size where it must.
  assert corpus.train.shards(6) == 2


def test_missing_shard_in_a_state(tmp_path):
  corpus = _corpus(tmp_path, [f"text {i}" for i in range(30)], held_out=0.0)
  half = data.train_iterator(
    corpus, batch_size=4, seed=0, process_index=0, process_count=2
  )
  whole = data.train_iterator(corpus, batch_size=4, seed=0)
  with pytest.raises(ValueError, match="no virtual shard 2; merge the states"):
    whole.set_state(half.get_state())
  half.close()
  whole.close()


@pytest.mark.parametrize("files", [1, 5])
def test_windows_of_packed_files(tmp_path, monkeypatch, files):
  """A packed file is read window by window, and every document once."""
  monkeypatch.setattr(stream, "_WINDOW_CHARACTERS", 40)
  monkeypatch.setattr(stream, "_READ_CHARACTERS", 100)
  texts = [f"text {i}" for i in range(200)]
  corpus = _corpus(tmp_path, texts, files=files, held_out=0.0)
  for path in tmp_path.glob("*.jsonl"):
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
  files = tuple(source.find(str(tmp_path)))
  corpus = dataclasses.replace(
    corpus, train=dataclasses.replace(corpus.train, files=files)
  )
  read = _epoch(corpus, 4)
  assert sorted(sum(read, [])) == sorted(texts)
  units = stream._units(files, corpus.train.form, 4)[1::4]
  documents = iter(stream._Documents(corpus.train, units, seed=(0, 1)))
  states, ids = [], []
  for _ in range(120):
    states.append(documents.get_state())
    ids.append(next(documents)["tokens"].tolist())
  assert len({state["window"] for state in states}) > 3
  for at in (0, 7, 33, 119):
    again = iter(stream._Documents(corpus.train, units, seed=(0, 1)))
    again.set_state(states[at])
    assert [next(again)["tokens"].tolist() for _ in ids[at:]] == ids[at:]


def test_the_first_batch_reads_the_beginnings_alone(tmp_path, monkeypatch):
  monkeypatch.setattr(stream, "_WINDOW_CHARACTERS", 1000)
  texts = [f"text {i} " * 10 for i in range(4000)]
  lines = [json.dumps({"text": text}) for text in texts]
  for i in range(4):
    plain = "\n".join(lines[i::4]).encode()
    (tmp_path / f"{i}.jsonl.gz").write_bytes(gzip.compress(plain))
  seen = []
  read = source.read

  def spy(span, form):
    for document in read(span, form):
      seen.append(document)
      yield document

  monkeypatch.setattr(source, "read", spy)
  for packing in ("slices", "packed"):
    corpus = data.load(
      data.Dataset(
        path=str(tmp_path),
        tokenizer="byte",
        packing=packing,
        held_out=0.0,
        in_memory_bytes=0,
        virtual_shards=4,
      )
    )
    iterator = data.train_iterator(corpus, batch_size=4, seed=0)
    batch = next(iterator)
    iterator.close()
    assert (packing == "packed") == (batch.segment_ids.max() > 1)
    assert 0 < len(seen) < 400
    seen.clear()


def test_characters_are_not_collected_from_what_is_not_read(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 100)
  dataset = data.Dataset(path=str(tmp_path), in_memory_bytes=10)
  with pytest.raises(ValueError, match="only when all of it has been read"):
    data.load(dataset)
