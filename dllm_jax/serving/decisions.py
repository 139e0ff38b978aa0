"""Decisions over HTTP: `POST /v1/decisions`, as openai's `client.decisions` has it.

Questions of all requests that wait are put on canvases and read together, one
network call for as many as fit (`sampling.decisions`). What a model has no words
for is a refusal; what is not served is a 400.
"""

from collections.abc import Sequence
from concurrent import futures
import json
import queue
import threading
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from dllm_jax.parallel import distributed
from dllm_jax.run import decisions
from dllm_jax.run.run import Run
from dllm_jax.sampling.decisions.answers import Answer
from dllm_jax.sampling.decisions.layout import laid_out, Layout, Question
from dllm_jax.serving.http.limits import Refusal
from dllm_jax.serving.http.protocol import Body, Text

# Of labels, for each token of the shortest: below it a question is refused.
_LEAST_MASS = 1e-6
_MOST = 400  # questions of a request
_WAITING = 256  # requests

Name = Annotated[Text, Field(max_length=256)]


class TextPart(Body):
  """A part of what is asked about, or of a question."""

  type: Literal["input_text", "output_text", "text"]
  text: Text


class JsonPart(Body):
  """A JSON value as a part."""

  type: Literal["input_json"]
  # Any value is legal.
  json_: Any = Field(alias="json")


Parts = Text | Annotated[list[TextPart | JsonPart], Field(min_length=1)]


class Message(Body):
  """What somebody said."""

  type: Literal["message"] = "message"
  role: Literal["user", "developer", "system", "assistant"]
  content: Parts
  phase: Literal["commentary", "final_answer"] | None = None


class Call(Body):
  """A function or a tool that was called."""

  type: Literal["function_call", "custom_tool_call"]
  call_id: Name
  name: Name
  arguments: Text | None = None
  input: Text | None = None
  id: Name | None = None


class Output(Body):
  """What a call gave back."""

  type: Literal["function_call_output", "custom_tool_call_output"]
  call_id: Name
  output: Parts
  id: Name | None = None


class Predicate(Body):
  """Whether a statement about the input is true."""

  type: Literal["predicate"]
  instructions: Parts
  name: Name | None = None


class Option(Body):
  """One choice; a text and a boolean of the same letters are two."""

  value: StrictStr | StrictBool
  description: Text | None = None


class Choice(Body):
  """Which of some choices fits the input."""

  type: Literal["choice"]
  instructions: Parts
  choices: Annotated[list[Option], Field(min_length=2, max_length=255)]
  name: Name | None = None


class Level(Body):
  """One step of a scale."""

  label: Text
  description: Text | None = None


class Score(Body):
  """Where the input stands on ordered levels."""

  type: Literal["score"]
  instructions: Parts
  levels: Annotated[list[Level], Field(min_length=2, max_length=255)]
  name: Name | None = None


Asked = Annotated[Predicate | Choice | Score, Field(discriminator="type")]


class Decision(Body):
  """The body of `POST /v1/decisions`."""

  model: Text
  input: Text | Annotated[list[Message | Call | Output], Field(min_length=1)]
  questions: Annotated[list[Asked], Field(min_length=1, max_length=_MOST)]


class Decider:
  """Reads the answers of requests, those that wait together.

  Args:
    run: whose network.
    state: whose parameters; by default the newest checkpoint's.
    use_ema: whether to use averaged parameters where there are any.
  """

  def __init__(self, run: Run, *, state: Any = None, use_ema: bool = True):
    self._run, self._state, self._use_ema = run, state, use_ema
    self._waiting: queue.Queue = queue.Queue(_WAITING)
    self._thread: threading.Thread | None = None
    self._lock = threading.Lock()

  def layout(self, body: Decision, length: int) -> Layout:
    """Returns the canvas of a body.

    Raises:
      Refusal: it does not fit, or cannot be asked of this model or server.
    """
    if distributed.store() is not None:
      # The others would wait for a call that this one alone makes.
      raise Refusal(
        "decisions need one process, and this server has several: ask a server"
        " of one",
        param="questions",
      )
    try:
      made = laid_out(
        _context(body.input, self._run.tokenizer),
        [_question(asked) for asked in body.questions],
        self._run.tokenizer,
      )
    except ValueError as error:
      raise Refusal(str(error), param="questions") from error
    if len(made.row) + 1 > length:
      raise Refusal(
        f"input and questions are {len(made.row)} tokens, more than the {length}"
        " of this model: ask fewer questions, or shorten the input",
        param="input",
        code="context_length_exceeded",
      )
    return made

  def __call__(self, layout: Layout) -> Sequence[Answer]:
    """Returns the answers of a canvas, when it was read.

    Raises:
      Refusal: the network cannot decide, or too many wait.
    """
    future = futures.Future()
    with self._lock:
      if self._thread is None:
        self._thread = threading.Thread(
          target=self._serve, name="decisions", daemon=True
        )
        self._thread.start()
    try:
      self._waiting.put_nowait((layout, future))
    except queue.Full:
      raise Refusal(
        f"{_WAITING} decisions wait already: try again later", status=429
      ) from None
    return future.result()

  def _serve(self) -> None:
    while True:
      some = [self._waiting.get()]
      while not self._waiting.empty():
        some.append(self._waiting.get())
      layouts, waiting = zip(*some, strict=True)
      try:
        calibration = decisions.stored(self._run)
        found = decisions.read(
          self._run, layouts, state=self._state, use_ema=self._use_ema
        )
        made = [[calibration.answer(row) for row in rows] for rows in found]
      except ValueError as error:
        for future in waiting:
          future.set_exception(Refusal(str(error), param="model"))
      except Exception as error:  # pylint: disable=broad-except
        for future in waiting:
          future.set_exception(error)
      else:
        for future, answers in zip(waiting, made, strict=True):
          future.set_result(answers)


def response(
  body: Decision, layout: Layout, answers: Sequence[Answer]
) -> dict[str, Any]:
  """Returns what a client is sent."""
  given = layout.tokens
  written = len(layout.row) - given
  return {
    "model": body.model,
    "answers": [
      _answered(asked, answer, min(map(len, labels)))
      for asked, answer, labels in zip(
        body.questions, answers, layout.labels, strict=True
      )
    ],
    "usage": {
      "input_tokens": given,
      "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
      "output_tokens": written,
      "output_tokens_details": {"reasoning_tokens": 0},
      "total_tokens": given + written,
    },
  }


def _answered(asked: Any, answer: Answer, tokens: int) -> dict[str, Any]:
  """Returns an answer, or a refusal; tokens are those of the shortest label."""
  if not 0 < answer.mass >= _LEAST_MASS**tokens:
    return {"type": "refusal", "name": asked.name}
  made = {"type": asked.type, "name": asked.name, "label_mass": answer.mass}
  if asked.type == "predicate":
    return made | {"probability": answer.probabilities[0]}
  if asked.type == "choice":
    values = [option.value for option in asked.choices]
    pairs = zip(values, answer.probabilities, strict=True)
    return made | {
      "choice": values[answer.best],
      "confidence": answer.confidence,
      "probabilities": [{"value": v, "probability": p} for v, p in pairs],
    }
  levels = enumerate(zip(asked.levels, answer.probabilities, strict=True))
  return made | {
    "score": answer.mean,
    "confidence": answer.confidence,
    "probabilities": [
      {"label": level.label, "value": i, "probability": p}
      for i, (level, p) in levels
    ],
  }


def _plain(parts: Any) -> str:
  """Returns the text of parts."""
  if isinstance(parts, str):
    return parts
  return "\n".join(
    part.text if isinstance(part, TextPart) else json.dumps(part.json_)
    for part in parts
  )


def _question(asked: Any) -> Question:
  instructions = _plain(asked.instructions)
  if asked.type == "predicate":
    return Question(instructions=instructions, labels=("true", "false"))
  if asked.type == "score":
    labels = [level.label for level in asked.levels]
    hints = [level.description or "" for level in asked.levels]
  else:
    values = [option.value for option in asked.choices]
    spelled = lambda v: json.dumps(v) if isinstance(v, bool) else v
    kinds = {spelled(v) for v in values if isinstance(v, bool)}
    quoted = lambda v: isinstance(v, str) and v in kinds
    labels = [json.dumps(v) if quoted(v) else spelled(v) for v in values]
    hints = [option.description or "" for option in asked.choices]
  return Question(
    instructions=instructions, labels=tuple(labels), hints=tuple(hints)
  )


def _context(given: Any, tokenizer: Any) -> Any:
  """Returns a text, or messages where the model has a template for them."""
  if isinstance(given, str):
    return given
  names, said = {}, []
  for item in given:
    if isinstance(item, Message):
      role = "system" if item.role == "developer" else item.role
      said.append((role, _plain(item.content)))
    elif isinstance(item, Call):
      names[item.call_id] = item.name
      said.append((
        "assistant", f"{item.name}({item.arguments or item.input or ''})"
      ))  # fmt: skip
    elif item.call_id in names:
      text = f"{names[item.call_id]}: {_plain(item.output)}"
      said.append(("user", text))
    else:
      raise Refusal(
        f"input has an output of call {item.call_id!r}, which was not made",
        param="input",
      )
  if getattr(tokenizer, "chat_templates", None):
    return [{"role": role, "content": text} for role, text in said]
  return "\n".join(f"{role}: {text}" for role, text in said)
