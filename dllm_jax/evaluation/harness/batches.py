"""The order in which requests are answered: those that are alike together."""

from collections.abc import Callable, Sequence
from typing import Any
import zlib

from lm_eval.api.instance import Instance
import numpy as np

from dllm_jax.core.progress import progress_bar
from dllm_jax.sampling.requests import Template


def number(row: Template) -> int:
  """Returns a request's number, which decides its noise: of what it says."""
  ids = np.asarray([-1 if token is None else token for token in row])
  return zlib.crc32(ids.tobytes()) & 0x7FFFFFFF


def each(
  kind: str,
  requests: Sequence[Instance] | Sequence[Any],
  alike: Sequence[Any],
  answer: Callable[[Sequence[int]], Sequence[Any]],
  *,
  rows: int,
  quiet: bool,
  keep: Callable[[str, tuple, Any], None] | None = None,
) -> list[Any]:
  """Returns the answer of each request.

  Each is handed to the harness's cache as soon as it is known, from which
  `--use_cache` resumes.

  Args:
    kind: the harness's name of such requests.
    requests: what is asked.
    alike: of each; requests of equal ones may share a call.
    answer: the numbers of some requests to their answers.
    rows: requests of a call, at most.
    quiet: whether no progress is shown.
    keep: takes (kind, the request's arguments, its answer); None where nothing
      resumes.
  """
  found: list[Any] = [None] * len(requests)
  groups: dict[Any, list[int]] = {}
  for i, same in enumerate(alike):
    groups.setdefault(same, []).append(i)
  with progress_bar(
    len(requests), "request", text=kind, shown=not quiet
  ) as bar:
    for group in groups.values():
      for start in range(0, len(group), rows):
        part = group[start : start + rows]
        for i, value in zip(part, answer(part), strict=True):
          found[i] = value
          if keep is not None:
            keep(kind, requests[i].args, value)
        bar.update(len(part))
  return found
