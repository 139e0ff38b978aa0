"""Prepared data: a corpus tokenised once, into ArrayRecord files.

For random access: one record a row, with its tokens and their segment ids. The
files of a directory and their counts stand in `manifest.json`, which is written
last: without it the directory is not whole.

    manifest.json                        tokenizer, types, counts
    train-00000-of-00002.array_record
    held_out-00000-of-00002.array_record
"""

import concurrent.futures
import itertools
import json
import os
import random
import shutil
from typing import Any, Literal
import uuid

import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.progress import progress_bar
from dllm_jax.data import conversations, source
from dllm_jax.data import packing as packing_lib
from dllm_jax.data import tokenizer as tokenizer_lib
from dllm_jax.data.prepared import plan as plans
from dllm_jax.data.prepared import progress as progress_lib
from dllm_jax.data.prepared.duplicates import repeated
from dllm_jax.data.prepared.plan import cut, Plan, Share, VERSION
from dllm_jax.data.prepared.progress import MANIFEST, Progress, SIDES
from dllm_jax.data.prepared.workers import processors, Workers

_AT_ONCE = 8  # files that are copied at the same time


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
  dedup: Literal["exact"] | None = None,
  shard: Share | str | None = None,
  workers: int | None = None,
  piece_bytes: int | None = None,
) -> dict[str, int]:
  """Writes a corpus as token records; resumes what was interrupted.

  Args:
    input: the corpus, see `source.find`.
    tokenizer: "char", "byte", "bpe:N" or the path of a tokenizer.json, see
      `tokenizer.make_tokenizer`.
    output: the directory to fill, in a bucket or not.
    length: tokens a record; training may use any divisor of it.
    packing: "slices" or "packed".
    held_out: the fraction held out, see `source.split`.
    mask_token: the mask token of a tokenizer.json, see `tokenizer.huggingface`.
    text_field: the field or column of the text in JSONL and Parquet.
    document_separator: what stands between documents of a text file.
    dedup: "exact" leaves out documents whose text was there before.
    shard: the share of the work to do, such as "3/64", from 0; None for all of
      it that is not done. Whoever finishes the last one makes them one corpus.
    workers: processes; None for one a processor.
    piece_bytes: bytes of input a piece, which is what is lost at a kill; None
      for 16 to 256 MiB.

  Returns:
    The numbers of `documents`, `empty_documents` and `duplicate_documents`
    (both left out), `tokens` and `files` (of records) of what is done, and of
    `missing_pieces`, which others have yet to make.

  Raises:
    FileNotFoundError: the input or the tokenizer does not exist.
    ValueError: bad input, or `output` holds something else.
  """
  packing_lib.check(packing, length, held_out)
  if workers is not None and workers < 1:
    raise ValueError(f"workers is {workers}; at least one process is needed")
  if dedup not in (None, "exact"):
    raise ValueError(f"dedup {dedup!r} is unknown; legal are 'exact' and None")
  share = Share.parse(shard) if isinstance(shard, str) else shard or Share()
  form = source.Format(
    text_field=text_field, document_separator=document_separator
  )
  files = source.find(input)
  if source.are_tokens(files):
    raise ValueError(
      f"{input} holds tokens already; train on it as it is, with "
      f"--config.data.path={input}"
    )
  conversations.check_text(input, files, text_field)
  sizes = plans.sizes(files)
  folder = paths.place(output)
  made = _tokenizer(folder, input, files, form, tokenizer, held_out, mask_token)
  plan = Plan(
    tokenizer=made.to_json(),
    length=length,
    packing=packing,
    held_out=held_out,
    dedup=dedup,
    token_type="uint16" if made.vocab_size <= 2**16 else "uint32",
    segment_type="uint16" if length < 2**16 else "uint32",
    form=form,
    pieces=cut(sizes, form, piece_bytes),
    sizes=tuple(sizes.values()),
  )
  if not plan.pieces:
    raise source.empty(input)
  if progress_lib.is_whole(folder):
    manifest = read_manifest(output)
    if manifest["fingerprint"] != plan.fingerprint:
      raise progress_lib.different(folder, manifest, plan)
    return merge(output)
  return _execute(Progress(folder, plan), share, workers or processors())


def _tokenizer(
  folder: paths.Path,
  path: str,
  files: list[str],
  form: source.Format,
  name: str,
  held_out: float,
  mask_token: str | None,
) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer; one that another share has learned as it is."""
  held = progress_lib.read_plan(folder)
  if held is not None and mask_token is None:
    known = tokenizer_lib.tokenizer_from_json(held.tokenizer)
    if tokenizer_lib.may_be(name, known):
      return known
  return tokenizer_lib.make_tokenizer(
    name,
    (d.text for d in source.documents(files, form)),
    training_texts=source.training_texts(files, form, held_out),
    mask_token=mask_token,
    path=path,
  )


def _execute(progress: Progress, share: Share, workers: int) -> dict[str, int]:
  """Does what is left of a share, and what it is for all others to be whole."""
  progress.begin()
  plan = progress.plan
  own = plan.share(share)
  done = progress.counts(own)
  left = [i for i in own if i not in done]
  with Workers(progress, min(workers, max(len(left), 1))) as pool:
    if plan.dedup and left:
      _hash(progress, share, pool)
    blocks = (
      repeated(progress, left) if plan.dedup else [dict.fromkeys(left, [])]
    )
    with progress_bar(len(own), "piece", done=len(done), text="prepare") as bar:
      for block in blocks:
        jobs = ({"tokenise": i, "repeated": r} for i, r in block.items())
        pool.run(jobs, bar.update)
  progress.check()
  everything = range(len(plan.pieces))
  missing = len(everything) - len(progress.counts(everything))
  if not missing or progress_lib.is_whole(progress.folder):
    return _summary([progress.finish()], 0)
  return _summary(list(progress.counts(own).values()), missing)


def _hash(progress: Progress, share: Share, pool: Workers) -> None:
  """Sees to it that all hashes are there: first the own ones.

  Those that others have not come to are made here, in an order of this share's
  own, so that nobody waits for anybody and few are made twice.
  """
  own = progress.plan.share(share)
  others = [*set(range(len(progress.plan.pieces))) - set(own)]
  random.Random(share.index).shuffle(others)
  for pieces in (own, others):
    there = progress.hashed()
    left = [i for i in pieces if i not in there]
    if left:
      with progress_bar(len(left), "piece", text="hash") as bar:
        pool.run(({"hash": i} for i in left), bar.update)


def merge(output: str) -> dict[str, int]:
  """Makes the shares of a directory one corpus, when all are done.

  Args:
    output: the directory that they were written to.

  Returns:
    What `prepare` returns.

  Raises:
    ValueError: some are missing, or there is nothing prepared.
  """
  folder = paths.place(output)
  if progress_lib.is_whole(folder):
    manifest = read_manifest(output)
    progress_lib.clean(folder)
    return _summary([manifest], 0)
  plan = progress_lib.read_plan(folder)
  if plan is None:
    raise ValueError(
      f"{output} holds no shards to merge; run dllm prepare --output={output} "
      "--shard=... first"
    )
  return _summary([Progress(folder, plan).finish()], 0)


def _summary(counts: list[dict[str, Any]], missing: int) -> dict[str, int]:
  sides = [c[s] for c, s in itertools.product(counts, SIDES)]
  return {k: sum(c[k] for c in counts) for k in progress_lib.DOCUMENTS} | {
    "tokens": sum(side["tokens"] for side in sides),
    "files": sum(len(side["files"]) for side in sides),
    "missing_pieces": missing,
  }


def read_manifest(path: str) -> dict[str, Any]:
  """Returns the manifest of a prepared directory.

  Raises:
    ValueError: it is missing, not ours, or of another version.
  """
  file = paths.place(path) / MANIFEST
  try:
    manifest = json.loads(file.read_text(encoding="utf-8"))
    version = manifest["version"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{file} is not the manifest of prepared data ({error!r}); "
      "run dllm prepare again"
    ) from error
  if version != VERSION:
    raise ValueError(
      f"{file} is of version {version}, this package reads {VERSION}; run "
      "dllm prepare again"
    )
  return manifest


def is_prepared(path: str) -> bool:
  """Returns whether a path is a directory of token records.

  Raises:
    ValueError: it is one that is not finished.
  """
  folder = paths.place(path)
  if progress_lib.begun(folder):
    raise ValueError(
      f"{path} was not finished; run the same dllm prepare again to resume it, "
      "or the shards that died"
    )
  return progress_lib.is_whole(folder)


def files(path: str, side: str, manifest: dict[str, Any]) -> list[str]:
  """Returns the record files of a side, as ArrayRecord reads them.

  It reads gs:// by itself, but not s3://: from there each machine copies them
  once, to `~/.cache/dllm_jax` or where `XDG_CACHE_HOME` says.

  Args:
    path: the prepared directory.
    side: "train" or "held_out".
    manifest: the directory's manifest.

  Raises:
    FileNotFoundError: one is missing.
  """
  folder = paths.place(path)
  names = manifest[side]["files"]
  there = {p.name for p in folder.iterdir()}
  missing = [name for name in names if name not in there]
  if missing:
    raise FileNotFoundError(
      f"{folder / missing[0]} is missing; remove {path} and run dllm prepare "
      "again"
    )
  if not paths.on_s3(folder):
    return [os.fspath(folder / name) for name in names]
  cache = paths.place(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  cache = cache / "dllm_jax" / manifest["fingerprint"]
  cache.mkdir(parents=True, exist_ok=True)
  with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
    return list(pool.map(lambda name: _copied(folder / name, cache), names))


def _copied(file: paths.Path, cache: paths.Path) -> str:
  """Returns a local copy of a file, which appears when it is whole."""
  copy = cache / file.name
  if not copy.exists():
    temporary = cache / f"{uuid.uuid4().hex}.tmp"
    with file.open("rb") as remote, temporary.open("wb") as here:
      shutil.copyfileobj(remote, here, 2**22)
    temporary.replace(copy)
  return os.fspath(copy)


def decode(data: bytes, manifest: dict[str, Any]) -> packing_lib.Row:
  """Returns the tokens and the segment ids of a record, int32."""
  length = manifest["length"]
  token_type = np.dtype(manifest["token_type"])
  end = length * token_type.itemsize
  return packing_lib.Row(
    np.frombuffer(data[:end], token_type).astype(np.int32),
    np.frombuffer(data[end:], manifest["segment_type"]).astype(np.int32),
  )
