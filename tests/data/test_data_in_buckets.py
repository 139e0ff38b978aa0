"""Corpora read where they lie: every kind of reader, in both object stores."""

import pytest

from dllm_jax import data
from dllm_jax.core import paths
from dllm_jax.data import source
from tests.data import test_published as published

MAKERS = (
  "c4", "slimpajama", "fineweb", "the_stack_v2", "saved_splits", "arrow_file",
  "mds", "mds_packed", "array", "text_files",
)  # fmt: skip


def _upload(folder, address):
  for file in sorted(folder.rglob("*")):
    if file.is_file():
      at = paths.place(address) / str(file.relative_to(folder))
      at.write_bytes(file.read_bytes())


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
@pytest.mark.few(1)
def test_documents_and_text_exactly(tmp_path, bucket):
  for name in MAKERS:
    folder = tmp_path / name
    folder.mkdir()
    path, field = getattr(published, name)(folder)
    folder = folder if path.is_relative_to(folder) else path
    _upload(folder, f"{bucket}/{name}")
    form = (
      source.Format(text_field=field)
      if field
      else source.Format(document_separator="\x00")
    )
    inside = path.relative_to(folder).as_posix().removeprefix(".")
    files = source.find(f"{bucket}/{name}/{inside}".rstrip("/"))
    assert all(f.startswith(bucket) for f in files)
    pieces = source.spans(files, form, 1)
    texts = [d.text for piece in pieces for d in source.read(piece, form)]
    assert sorted(texts) == sorted(published.TEXTS), name
    assert source.size(files) == sum(
      paths.place(f).stat().length for f in files
    )


@pytest.mark.few(1)
def test_globs_training_and_bad_paths(tmp_path, bucket):
  published.slimpajama(tmp_path)
  _upload(tmp_path, f"{bucket}/pajama")
  found = source.find(f"{bucket}/pajama/train/**/*.jsonl.zst")
  assert found == source.find(f"{bucket}/pajama/train/*/*.zst")
  assert len(found) == 2
  corpus = data.load(
    data.Dataset(path=found[0], tokenizer="byte", length=8, held_out=0)
  )
  iterator = data.train_iterator(corpus, batch_size=2, seed=0)
  assert next(iterator).tokens.shape == (2, 8)
  iterator.close()
  with pytest.raises(FileNotFoundError, match="does not exist; give a file"):
    source.find(f"{bucket}/nothing.txt")
  paths.place(f"{bucket}/a.bin").write_bytes(b"\0\1" * 9)
  with pytest.raises(ValueError, match="memory map, which buckets have not"):
    data.load(data.Dataset(path=f"{bucket}/a.bin", tokenizer="byte"))
