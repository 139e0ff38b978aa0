"""An autoregressive model that judges texts: ours, or a Hugging Face folder."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.types import Denoiser, Process
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.evaluation.likelihood.scorer import batch_of, Item, Scorer
from dllm_jax.parallel import make_mesh, MeshConfig
from dllm_jax.pretrained import load_pretrained
from dllm_jax.run.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge:
  """An exact likelihood and features of texts.

  Attributes:
    name: where it is from.
    scorer: its likelihood.
    tokenizer: its tokenizer.
    denoiser: its network.
    given: tokens at the start of a text that it cannot score: 1 of a folder
      that names no token which texts begin with, so that nothing predicts the
      first one.
  """

  name: str
  scorer: Scorer
  tokenizer: Tokenizer
  denoiser: Denoiser
  given: int = 0

  def encode(self, text: str) -> tuple[int, ...]:
    """Returns the tokens of a text."""
    return tuple(int(i) for i in self.tokenizer.encode(text))

  def nats(self, texts: list[str], *, rows: int) -> list[tuple[float, int]]:
    """Returns (exact nats, tokens that they are of) for each text."""
    found: list[Any] = [None] * len(texts)
    for at in self._canvases(texts).values():
      items = [Item(tokens=self.encode(texts[i]), given=self.given) for i in at]
      key = jax.random.key(0)
      nats = self.scorer.score(items, samples=1, key=key, rows=rows)
      for i, item, value in zip(at, items, nats, strict=True):
        found[i] = (float(value), item.targets)
    return found

  def _canvases(self, texts: list[str], more: int = 0) -> dict[int, list[int]]:
    sizes: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
      size = self.scorer.canvas(len(self.encode(text)) + more)
      sizes.setdefault(size, []).append(i)
    return sizes

  @functools.cached_property
  def _last(self):
    """The hidden state at each row's last slot, a compiled program."""
    return self.scorer.compiled(self._hidden)

  def _hidden(self, params, process, batch):
    objective = self.scorer.objective
    step = jnp.int32(0)
    drawn = objective.draw(process, jax.random.key(0), batch, step=step)
    inputs = objective.inputs(process, drawn.z, drawn.t, batch)
    out = self.denoiser.apply(params["model"], inputs, None)[0]
    last = jnp.sum(batch.segment_ids > 0, axis=1) - 1
    index = jnp.maximum(last, 0)[:, None, None]
    return jnp.take_along_axis(out.hidden, index, axis=1)[:, 0]

  def features(
    self, texts: list[str], *, rows: int
  ) -> Float[np.ndarray, "N D"]:
    """Returns the state that has seen all of a text, before what follows it."""
    rows = self.scorer.whole(rows)
    found: list[Any] = [None] * len(texts)
    for canvas, at in self._canvases(texts, 1).items():
      for start in range(0, len(at), rows):
        part = at[start : start + rows]
        items = [Item(tokens=(*self.encode(texts[i]), 0)) for i in part]
        items += [Item(tokens=())] * (rows - len(part))
        hidden = self._last(batch_of(items, canvas))
        for i, row in zip(part, hidden, strict=False):
          found[i] = np.asarray(row, np.float32)
    return np.stack(found)


def open_judge(path: str) -> Judge:
  """Returns the autoregressive model in a working directory or a folder.

  Raises:
    FileNotFoundError: there is no model.
    ValueError: it is not autoregressive.
  """
  folder, given = paths.place(path), 0
  if (folder / "checkpoints").exists():
    run = Run.open(folder)
    _check(path, run.objective)
    params, process = run.state.eval_params, run.state.process
    objective, denoiser, tokenizer = run.objective, run.denoiser, run.tokenizer
    mesh = run.mesh
  else:
    if not folder.exists():
      raise FileNotFoundError(
        f"no judge at {path}: give a working directory of an autoregressive "
        "run, or a published folder"
      )
    model = load_pretrained(folder)
    _check(path, model.objective)
    objective, denoiser, tokenizer = (
      model.objective, model.denoiser, model.tokenizer
    )  # fmt: skip
    # Where no token is called the beginning, nothing predicts the first one.
    given = int(tokenizer.bos_id is None)
    params, process = {"model": model.params, "process": {}}, Process()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  scorer = Scorer(
    objective=objective,
    denoiser=denoiser,
    params=params,
    process=process,
    mesh=mesh,
    estimator="exact",
  )
  return Judge(
    name=path,
    scorer=scorer,
    tokenizer=tokenizer,
    denoiser=denoiser,
    given=given,
  )


def _check(path: str, objective: Any) -> None:
  if not objective.exact:
    raise ValueError(
      f"{path} holds {type(objective).__name__}, which is not autoregressive: "
      "a judge needs an exact likelihood, for example a run of "
      "configs/shakespeare_autoregressive.py"
    )
