"""What a network says of pairs of answers, and what the reference said, kept.

The samples of a pair are a function of its number and its epoch alone
(`vrpo.VRPO.masks`), so that the reference is asked of each once, before training
begins, and is then needed no more: neither its parameters nor its passes. Its
answers are lines of `reference.jsonl`, which a kill cuts short and a second
start goes on with. float32 written in decimal is read as it was.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
from typing import Any

import jax
from jaxtyping import Float, PyTree
import numpy as np

from dllm_jax.core.files import Lines, read_lines
from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar
from dllm_jax.core.types import Denoiser, Objective, Process
from dllm_jax.parallel import compilation, distributed
from dllm_jax.parallel.sharding import global_batch, row_share
from dllm_jax.posttraining import preferences
from dllm_jax.posttraining.preferences import HELD_OUT, Pair, Pairs
from dllm_jax.posttraining.vrpo import Preference

_FILE = "reference.jsonl"

Ask = Callable[[PyTree, Process, Pairs], Float[np.ndarray, "B 2 n"]]


def asker(
  loss: Preference,
  objective: Objective,
  denoiser: Denoiser,
  mesh: jax.sharding.Mesh,
  *,
  reference: bool,
) -> Ask:
  """Returns a function to the estimates of pairs, in nats, as one program.

  Args:
    loss: what is hidden.
    objective: how the network was trained that is asked.
    denoiser: the network.
    mesh: the device mesh.
    reference: whether it is the reference, which may have masks of its own.
  """
  method = loss.method

  def ask(params, process, batch):
    process = process.replace(params=params["process"])
    masks = method.masks(
      loss.objective, process, loss.seed, batch, reference=reference
    )
    denoise = lambda inputs: denoiser.apply(params["model"], inputs, None)[0]
    terms = method.terms(objective, process, denoise, masks, batch)
    return jax.lax.with_sharding_constraint(terms.sum(axis=-1), jax.P())

  program = compilation.jit(ask, mesh=mesh, dtype=denoiser.dtype)

  def run(params, process, batch):
    with jax.set_mesh(mesh):
      placed = global_batch(batch, mesh)
      return np.asarray(program(params, process, placed))

  return run


def parts(
  pairs: Sequence[Pair],
  noise: int,
  samples: int,
  mesh: jax.sharding.Mesh,
  *,
  size: int,
  length: int,
) -> Iterator[tuple[int, int, Pairs]]:
  """Yields (first, count, this process's rows) of all pairs in their order.

  Args:
    pairs: the pairs.
    noise: which of their samples.
    samples: of an answer.
    mesh: the device mesh.
    size: pairs of a batch over all processes.
    length: tokens a row.
  """
  share = row_share(mesh)
  part = size // share.count
  for first in range(0, len(pairs), size):
    own = first + share.index * part + np.arange(part)
    numbers = np.where(own < len(pairs), own, -1)
    unknown = np.zeros((part, 2, samples), np.float32)
    batch = preferences.rows(pairs, numbers, [noise] * part, unknown, length)
    yield first, min(size, len(pairs) - first), batch


class Reference:
  """The reference's answers in a working directory.

  Args:
    workdir: the directory.
    told: what they are a function of, besides a pair's number and its noise:
      the reference and the pairs.
    pairs: the pairs by noise: of each epoch's set, and of `HELD_OUT`.
    samples: of an answer.

  Raises:
    ValueError: the directory has those of other pairs or of another reference.
  """

  def __init__(
    self,
    workdir: Path,
    told: Mapping[str, Any],
    pairs: Mapping[int, Sequence[Pair]],
    samples: int,
  ):
    self._path, self._told, self._pairs = workdir / _FILE, told, pairs
    self._step = None
    self._tables = {
      noise: np.full((len(of), 2, samples), np.nan, np.float32)
      for noise, of in pairs.items()
    }
    for line in read_lines(self._path):
      with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
        self._take(json.loads(line))

  @property
  def complete(self) -> bool:
    """Whether nothing is left to ask."""
    return not any(np.isnan(table).any() for table in self._tables.values())

  def table(self, noise: int | None = None) -> Float[np.ndarray, "*S N 2 n"]:
    """Returns what it says of all pairs under a noise, nats; None: of each set."""
    if noise is not None:
      return self._tables[noise]
    return np.stack([
      t for noise, t in self._tables.items() if noise != HELD_OUT
    ])

  def _take(self, line: Mapping[str, Any]) -> None:
    """Takes a line that was written before."""
    told = line.get("told")
    if told is not None:
      self._step = line["step"]
      changed = [k for k in self._told if told.get(k) != self._told[k]]
      if changed:
        raise ValueError(
          f"{self._path} is of other {' and '.join(changed)}: bring back what"
          " this run began with, or use another --output"
        )
    elif line["noise"] in self._tables:
      first, nats = line["first"], np.asarray(line["nats"], np.float32)
      self._tables[line["noise"]][first : first + len(nats)] = nats

  def ask(
    self,
    step: int,
    ask: Callable[[Pairs], np.ndarray],
    batches: Callable[[Sequence[Pair], int], Iterator[tuple[int, int, Pairs]]],
  ) -> None:
    """Asks for what is missing and keeps it.

    Args:
      step: how far the reference is trained.
      ask: a batch to its estimates.
      batches: `parts` of some pairs under a noise.

    Raises:
      ValueError: the reference is not what it was, or its answer is not finite.
    """
    if self._step not in (None, step):
      raise ValueError(
        f"{self._path}: more passes over the pairs ask more of the reference,"
        f" which was at step {self._step} and is at {step}: bring it back, or"
        " leave training.steps as it was"
      )
    writes = jax.process_index() == 0
    distributed.exchange("read")  # before anything is written
    total = sum(map(len, self._pairs.values()))
    bar = progress_bar(total, "pair", text="reference", shown=writes)
    with contextlib.ExitStack() as stack:
      stack.enter_context(bar)
      add = lambda line: None
      if writes:
        lines = stack.enter_context(contextlib.closing(Lines(self._path)))
        add = lambda line: lines.add(json.dumps(line) + "\n")
      add({"told": dict(self._told), "step": step})
      for noise, of in self._pairs.items():
        for first, count, batch in batches(of, noise):
          here = self._tables[noise][first : first + count]
          if np.isnan(here).any():
            here[:] = ask(batch)[:count]
            self._check(here)
            nats = here.astype(float).tolist()
            add({"noise": noise, "first": first, "nats": nats})
          bar.update(count)

  def _check(self, nats: np.ndarray) -> None:
    if not np.isfinite(nats).all():
      raise ValueError(
        "the reference gives an answer the probability 0, or no number at all:"
        " see that its weights are whole, and that no answer has a mask token"
      )
