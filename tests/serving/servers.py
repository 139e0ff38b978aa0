"""A tiny model behind a real server on loopback, for tests of clients."""

import contextlib
import json
import threading
import urllib.error
import urllib.request

from dllm_jax import serving
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.run.run import Run
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.serving.http.server import Server

NAME, KEY = "tiny", "a-key"
LENGTH, SLOTS, CHOICES, SEED = 48, 2, 4, 3
SAMPLER = SamplerConfig(preset="llada", block_length=8, temperature=1.0)
LIMITS = serving.Limits(
  choices=CHOICES, concurrent=64, body_seconds=1.0, seconds=60.0
)
TEMPLATE = (
  "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)


def letters() -> HuggingFace:
  """A tokenizer of bytes as folders have it, with a chat template and a mask."""
  from tokenizers import models

  from dllm_jax.data.byte_pairs import byte_level
  from dllm_jax.sampling.constraints.spelling import _byte_names

  vocabulary = {name: byte for name, byte in _byte_names().items()}
  made = byte_level(models.BPE(vocabulary, []), None)
  made.add_special_tokens(["<eos>", "[MASK]"])
  return HuggingFace(
    definition=made.to_str(),
    mask_id=257,
    eos_id=256,
    chat_templates={"default": TEMPLATE},
  )


class Front:
  """A server of a model in a thread of its own; its engine is another's.

  Args:
    model: what is served.
    key: what clients must know, or None.
  """

  def __init__(self, model: serving.Model, key: str | None = None):
    self.model, self.engine = model, model.engine
    self.gate = serving.application(model, key=key)
    self.server = Server(
      self.gate, host="127.0.0.1", port=0, limits=model.limits
    )
    self._thread = threading.Thread(target=self.server.run, daemon=True)
    self._thread.start()
    assert self.server.listening.wait(30)
    self.url = "http://{}:{}".format(*self.server.address)

  def ended(self) -> None:
    """Waits for the server's end."""
    self._thread.join(30)
    assert not self._thread.is_alive()

  def stop(self) -> None:
    """Ends the server."""
    self.server.should_exit = True
    self.ended()


class Running(Front):
  """A server and its engine.

  Args:
    run: whose network.
    key: what clients must know, or None.
    sampler: how it samples.
    limits: of requests.
    **engine: of the engine.
  """

  def __init__(
    self,
    run: Run,
    *,
    key: str | None = None,
    sampler: SamplerConfig = SAMPLER,
    limits: serving.Limits = LIMITS,
    **engine,
  ):
    engine = {"slots": SLOTS, "length": LENGTH, "queue": 256, "top": 2} | engine
    self.run, self.sampler = run, sampler
    made = serving.Engine.of(run, sampler=sampler, **engine)
    model = serving.Model.of(
      run, made, name=NAME, sampler=sampler, limits=limits
    )
    super().__init__(model, key)

  def start(self) -> "Running":
    """Waits until it is ready."""
    self.engine.start()
    return self

  def stop(self) -> None:
    """Ends the server and its engine."""
    super().stop()
    self.engine.stop()

  def offline(self, template, *, number: int = 0, **options) -> list[int]:
    """Returns the text's ids that the offline sampler gives a template."""
    (row,) = self.run.sample_rows(
      [template],
      length=LENGTH,
      numbers=[number],
      sampler=self.sampler,
      options=[RowOptions(**options)],
    ).rows
    return row

  def text(self, prompt: str, new: int, **options) -> str:
    """Returns what the offline sampler writes after a prompt."""
    ids = [int(i) for i in self.run.tokenizer.prompt(prompt)]
    row = self.offline([*ids, *[None] * new], **options)
    return self.run.tokenizer.decode(row[len(ids) :])


def send(
  url: str, body=None, *, data: bytes | None = None, headers=None, method=None
):
  """Returns the status, the headers and the body of an answer."""
  data = json.dumps(body).encode() if body is not None else data
  given = {"Content-Type": "application/json"} | (headers or {})
  request = urllib.request.Request(url, data, given, method=method)
  with contextlib.ExitStack() as stack:
    try:
      answer = stack.enter_context(urllib.request.urlopen(request, timeout=120))
    except urllib.error.HTTPError as error:
      answer = stack.enter_context(error)
    text = answer.read().decode()
    kind = answer.headers.get("content-type", "")
    made = json.loads(text) if kind.startswith("application/json") else text
    return answer.status, answer.headers, made


def events(url: str, body) -> list[tuple[str, str]]:
  """Returns the events of a stream, (name, data) each."""
  status, headers, text = send(url, body)
  assert status == 200 and headers["content-type"].startswith("text/event")
  assert text.endswith("\n\n")
  found = []
  for event in text[:-2].split("\n\n"):
    fields = dict(line.split(": ", 1) for line in event.split("\n"))
    found.append((fields.get("event", "message"), fields["data"]))
  return found
