"""Tokenises a corpus once, into ArrayRecord files for random access.

The corpus is cut into shards by its files alone; each is tokenised by a process
of its own, which knows no jax, and appears under its name when it is whole. So
any number of workers writes the same bytes, and what an interrupted run
finished is kept. A directory of token records:

    manifest.json                        tokenizer, types, counts; written last
    train-00000-of-00002.array_record    one record a row: tokens, segment ids
    held_out-00000-of-00002.array_record

While it is being made, plan.json says what is being made and shard-*.json which
shards are done.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.progress import progress_bar
from dllm_jax.data import packing as packing_lib
from dllm_jax.data import source
from dllm_jax.data import tokenizer as tokenizer_lib

MANIFEST = "manifest.json"
_PLAN = "plan.json"
_VERSION = 1
_SIDES = ("train", "held_out")


def prepare(
  input: str,  # The command line's own word for it.
  tokenizer: str,
  output: str,
  *,
  length: int = 1024,
  packing: packing_lib.Packing = "slices",
  held_out: float = 0.1,
  mask_token: str | None = None,
  text_field: str = "text",
  document_separator: str | None = None,
  workers: int | None = None,
  shard_bytes: int = 2**25,
) -> dict[str, int]:
  """Writes a corpus as token records; resumes what was interrupted.

  Args:
    input: the corpus, see `source.find`.
    tokenizer: "char", "byte", "bpe:N" or the path of a tokenizer.json, see
      `tokenizer.make_tokenizer`.
    output: the directory to fill.
    length: tokens a record; training may use any divisor of it.
    packing: "slices" or "packed".
    held_out: the fraction held out, see `source.split`.
    mask_token: the mask token of a tokenizer.json, see `tokenizer.huggingface`.
    text_field: the field or column of the text in JSONL and Parquet.
    document_separator: what stands between documents of a text file.
    workers: processes; None for one a processor.
    shard_bytes: bytes of input a shard.

  Returns:
    The numbers of `documents`, `empty_documents` (left out), `tokens` and
    `files` (of records).

  Raises:
    FileNotFoundError: the input or the tokenizer does not exist.
    ValueError: bad input, or `output` holds something else.
  """
  packing_lib.check(packing, length, held_out)
  if workers is not None and workers < 1:
    raise ValueError(f"workers is {workers}; at least one process is needed")
  form = source.Format(
    text_field=text_field, document_separator=document_separator
  )
  files = source.find(input)
  shards = _shards(source.spans(files, form, shard_bytes), shard_bytes)
  made = tokenizer_lib.make_tokenizer(
    tokenizer,
    (d.text for d in source.documents(files, form)),
    training_texts=source.training_texts(files, form, held_out),
    mask_token=mask_token,
    path=input,
  )
  plan = {
    "version": _VERSION,
    "tokenizer": made.to_json(),
    "length": length,
    "packing": packing,
    "held_out": held_out,
    "token_type": "uint16" if made.vocab_size <= 2**16 else "uint32",
    "segment_type": "uint16" if length < 2**16 else "uint32",
    "format": dataclasses.asdict(form),
    "shards": [[dataclasses.astuple(s) for s in spans] for spans in shards],
    "sizes": [source.size([f]) for f in files],
  }
  folder = paths.local(output)
  manifest = _execute(folder, plan, workers or os.cpu_count() or 1)
  if not manifest["documents"]:
    raise source.empty(input)
  return {
    "documents": manifest["documents"],
    "empty_documents": manifest["empty_documents"],
    "tokens": sum(manifest[s]["tokens"] for s in _SIDES),
    "files": sum(len(manifest[s]["files"]) for s in _SIDES),
  }


def _execute(
  folder: pathlib.Path, plan: dict[str, Any], workers: int
) -> dict[str, Any]:
  """Carries out what is left of a plan and returns the manifest."""
  fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
  if (folder / MANIFEST).exists():
    manifest = read_manifest(str(folder))
    _check_same(folder, manifest["fingerprint"], fingerprint)
    return manifest
  _begin(folder, plan, fingerprint)
  total = _total(_run(folder, len(plan["shards"]), workers))
  manifest = {k: v for k, v in plan.items() if k not in ("shards", "sizes")}
  manifest |= {"fingerprint": fingerprint} | total
  if not total["documents"]:
    return manifest
  write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))
  for leftover in [folder / _PLAN, *folder.glob("shard-*.json")]:
    leftover.unlink()
  return manifest


def read_manifest(path: str) -> dict[str, Any]:
  """Returns the manifest of a prepared directory.

  Raises:
    ValueError: it is missing, not ours, or of another version.
  """
  file = paths.local(path) / MANIFEST
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    version = manifest["version"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is not the manifest of prepared data ({error!r}); "
      "run dllm prepare again"
    ) from error
  if version != _VERSION:
    raise ValueError(
      f"{file} is of version {version}, this package reads {_VERSION}; run "
      "dllm prepare again"
    )
  return manifest


def is_prepared(path: str) -> bool:
  """Returns whether a path is a directory of token records.

  Raises:
    ValueError: it is one that is not finished.
  """
  folder = paths.local(path)
  if (folder / _PLAN).exists() and not (folder / MANIFEST).exists():
    raise ValueError(
      f"{path} was not finished; run the same dllm prepare again to resume it"
    )
  return (folder / MANIFEST).exists()


def decode(data: bytes, manifest: dict[str, Any]) -> packing_lib.Row:
  """Returns the tokens and the segment ids of a record, int32."""
  length = manifest["length"]
  token_type = np.dtype(manifest["token_type"])
  cut = length * token_type.itemsize
  return (
    np.frombuffer(data[:cut], token_type).astype(np.int32),
    np.frombuffer(data[cut:], manifest["segment_type"]).astype(np.int32),
  )


def _shards(
  spans: Sequence[source.Span], shard_bytes: int
) -> list[list[source.Span]]:
  """Returns pieces gathered into shards of about as many bytes."""
  shards, room = [], 0
  for span in spans:
    if room <= 0:
      shards.append([])
      room = shard_bytes
    shards[-1].append(span)
    midway = span.start or span.stop is not None
    room -= shard_bytes if midway else source.size([span.path])
  return shards


def _begin(
  folder: pathlib.Path, plan: dict[str, Any], fingerprint: str
) -> None:
  """Makes the directory, or checks that it holds the same work unfinished."""
  file = folder / _PLAN
  if file.exists():
    held = json.loads(file.read_text(encoding="utf-8"))
    _check_same(folder, held["fingerprint"], fingerprint)
    return
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"{folder} holds something else; give an empty or a new directory as "
      "output"
    )
  folder.mkdir(parents=True, exist_ok=True)
  write_whole(file, json.dumps(plan | {"fingerprint": fingerprint}))


def _check_same(folder: pathlib.Path, held: str, wanted: str) -> None:
  if held != wanted:
    raise ValueError(
      f"{folder} holds data prepared from other input or settings; give "
      "another output, or remove it"
    )


def _run(folder: pathlib.Path, shards: int, workers: int) -> list[dict]:
  """Writes the shards that are missing and returns every shard's counts."""
  missing = [i for i in range(shards) if not _done(folder, i).exists()]
  alone = workers == 1 or len(missing) == 1
  write = write_shard if alone else _write_shard_apart
  with (
    concurrent.futures.ThreadPoolExecutor(1 if alone else workers) as pool,
    progress_bar(
      shards, "shard", done=shards - len(missing), text="prepare"
    ) as bar,
  ):
    try:
      for future in concurrent.futures.as_completed([
        pool.submit(write, str(folder), i) for i in missing
      ]):
        future.result()
        bar.update()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  return [
    json.loads(_done(folder, i).read_text(encoding="utf-8"))
    for i in range(shards)
  ]


def _done(folder: pathlib.Path, shard: int) -> pathlib.Path:
  return folder / f"shard-{shard:05d}.json"


def _write_shard_apart(folder: str, shard: int) -> None:
  """Runs `write_shard` in a fresh process.

  Not multiprocessing: its children run the caller's main module first, and with
  it jax; and they outlive a caller that is killed.
  """
  root = str(pathlib.Path(__file__).parents[2])
  path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
  done = subprocess.run(
    [sys.executable, "-m", "dllm_jax.data.record", folder, str(shard)],
    env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode == 2:
    raise ValueError(done.stdout.strip())
  if done.returncode == errno.ENOSPC:
    raise OSError(errno.ENOSPC, done.stdout.strip())
  if done.returncode:
    raise RuntimeError(
      f"tokenising shard {shard} ended with status {done.returncode}: "
      f"{done.stderr.strip()[-1000:]}"
    )


def write_shard(folder: str, shard: int) -> None:
  """Tokenises one shard of the plan in `folder`."""
  root = pathlib.Path(folder)
  plan = json.loads((root / _PLAN).read_text(encoding="utf-8"))
  tokenizer = tokenizer_lib.tokenizer_from_json(plan["tokenizer"])
  count = packing_lib.Counter(tokenizer, plan["held_out"])
  form = source.Format(**plan["format"])
  sides = [], []
  for span in plan["shards"][shard]:
    for document in source.read(source.Span(*span), form):
      for side, ids in zip(sides, count(document), strict=True):
        if ids is not None:
          side.append(ids)
  counts = {"documents": count.documents, "empty_documents": count.empty}
  for name, side in zip(_SIDES, sides, strict=True):
    rows = packing_lib.Rows(
      side, length=plan["length"], packing=plan["packing"]
    )
    file = f"{name}-{shard:05d}-of-{len(plan['shards']):05d}.array_record"
    if len(rows):
      _write_records(root / file, _records(rows, plan), len(rows))
    size = getattr(count, name)
    counts[name] = {
      "files": [file] if len(rows) else [],
      "records": len(rows),
      **dataclasses.asdict(size),
    }
  write_whole(_done(root, shard), json.dumps(counts))


def _records(rows: packing_lib.Rows, plan: dict[str, Any]) -> Iterator[bytes]:
  for i in range(len(rows)):
    tokens, segments = rows[i]
    yield (
      tokens.astype(plan["token_type"]).tobytes()
      + segments.astype(plan["segment_type"]).tobytes()
    )


def _write_records(
  path: pathlib.Path, records: Iterator[bytes], expected: int
) -> None:
  from array_record.python import array_record_module  # noqa: PLC0415

  temporary = path.with_suffix(f".{os.getpid()}.tmp")
  try:
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), "group_size:1"
    )
    for record in records:
      writer.write(record)
    writer.close()
    reader = array_record_module.ArrayRecordReader(str(temporary))
    written = reader.num_records()
    reader.close()
    if written != expected:
      raise OSError(f"{path}: {written} of {expected} records were written")
    temporary.replace(path)
  except RuntimeError as error:
    if "No space left" in str(error):
      raise OSError(
        errno.ENOSPC, "the disk is full; make room and run again", str(path)
      ) from error
    raise
  finally:
    temporary.unlink(missing_ok=True)


def _total(counts: Sequence[dict]) -> dict[str, Any]:
  """Returns the counts of all shards together."""
  total = {
    k: sum(c[k] for c in counts) for k in ("documents", "empty_documents")
  }
  for side in _SIDES:
    total[side] = {
      "files": [f for c in counts for f in c[side]["files"]],
      "file_tokens": [c[side]["tokens"] for c in counts if c[side]["files"]],
    } | {
      k: sum(c[side][k] for c in counts)
      for k in ("records", "tokens", "characters", "bytes")
    }
  return total


def main(folder: str, shard: str) -> int:
  """Runs `write_shard` as a process: status 2 and one line for bad input."""
  try:
    write_shard(folder, int(shard))
  except (ValueError, ImportError) as error:
    print(error)
    return 2
  except OSError as error:
    if error.errno == errno.ENOSPC:
      print(error.strerror)
      return errno.ENOSPC
    raise
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
