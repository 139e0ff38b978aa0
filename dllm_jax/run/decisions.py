"""What a run decides: answers to questions about a text, with a temperature."""

from collections.abc import Sequence
import json
from typing import Any

import numpy as np

from dllm_jax.core import files
from dllm_jax.sampling.decisions.answers import (
  Answer,
  Calibration,
  calibration_error,
  fitted,
)
from dllm_jax.sampling.decisions.layout import laid_out, Layout, Question
from dllm_jax.sampling.decisions.reader import Reader

_FILE = "decisions.json"


def decide(
  run: Any,
  context: Any,
  questions: Sequence[Question],
  *,
  calibration: Calibration | None = None,
  state: Any = None,
  use_ema: bool = True,
) -> list[Answer]:
  """Returns the answer to each question about a context.

  Args:
    run: whose network.
    context: a text, or messages of a chat.
    questions: what is asked; labels of one token each take one network call.
    calibration: a temperature; None for what was fitted in the run's directory.
    state: whose parameters; by default the newest checkpoint's.
    use_ema: whether to use averaged parameters where there are any.

  Raises:
    ValueError: the network cannot decide, or a question is illegal.
  """
  if calibration is None:
    calibration = stored(run)
  asked = [(context, questions)]
  found = log_probs(run, asked, state=state, use_ema=use_ema)[0]
  return [calibration.answer(row) for row in found]


def log_probs(
  run: Any,
  asked: Sequence[tuple[Any, Sequence[Question]]],
  *,
  state: Any = None,
  use_ema: bool = True,
) -> list[list[np.ndarray]]:
  """Returns labels' log-probabilities, nats, for several contexts at once."""
  layouts = [laid_out(text, qs, run.tokenizer) for text, qs in asked]
  return read(run, layouts, state=state, use_ema=use_ema)


def read(
  run: Any,
  layouts: Sequence[Layout],
  *,
  state: Any = None,
  use_ema: bool = True,
) -> list[list[np.ndarray]]:
  """Returns the log-probability of each label of canvases, nats."""
  state = run.state if state is None else state
  params = state.eval_params if use_ema else state.params
  process = state.process.replace(params=params["process"])
  return reader(run)(params["model"], process, layouts)


def reader(run: Any) -> Reader:
  """Returns what reads labels of a run, made once."""
  if "reader" not in run.__dict__:
    made = Reader(run.objective, run.denoiser, mesh=run.mesh)
    run.__dict__["reader"] = made
  return run.__dict__["reader"]


def stored(run: Any) -> Calibration:
  """Returns the temperature that was fitted; 1 if none was."""
  try:
    text = (run.workdir / _FILE).read_text(encoding="utf-8")
  except OSError:
    return Calibration()
  return Calibration(temperature=json.loads(text)["temperature"])


def fit(
  run: Any,
  asked: Sequence[tuple[Any, Sequence[Question]]],
  truth: Sequence[Sequence[int]],
  *,
  use_ema: bool = True,
) -> dict[str, float]:
  """Fits a temperature on half of some questions, says what it does to the rest.

  It is kept in the run's directory, as `decisions.json`.

  Args:
    run: whose network.
    asked: contexts and questions, in an order that means nothing.
    truth: the right label of each question.
    use_ema: whether to use averaged parameters where there are any.

  Returns:
    The temperature, and the expected calibration error of the other half with
    it and without, each with its standard error.

  Raises:
    ValueError: there are too few questions.
  """
  found = log_probs(run, asked, use_ema=use_ema)
  rows = [row for of in found for row in of]
  right = [k for of in truth for k in of]
  if len(rows) < 20 or len(rows) != len(right):
    raise ValueError(
      "a temperature is fitted on 20 questions or more, each with its answer, not"
      f" on {len(rows)} with {len(right)}"
    )
  made = fitted(rows[::2], right[::2])
  summary = {"temperature": made.temperature, "questions": len(rows)}
  for name, calibration in (("", Calibration()), ("fitted_", made)):
    answers = [calibration.answer(row) for row in rows[1::2]]
    error, spread = calibration_error(answers, right[1::2])
    summary |= {f"{name}calibration_error": error, f"{name}stderr": spread}
  hits = [int(np.argmax(r)) == k for r, k in zip(rows, right, strict=True)]
  summary["accuracy"] = float(np.mean(hits))
  files.write_whole(run.workdir / _FILE, json.dumps(summary, indent=2) + "\n")
  return summary
