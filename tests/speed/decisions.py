"""Decisions beside the same answers written as JSON, by one network, in turns.

    python -m tests.speed.decisions

64 contexts with 4 questions each: read by `run.decide`'s reader, and written by
the sampler, held to the schema of the answers, one token a call (`json`) and two
(`json_two`), 16 rows at once in both. Then the latency of one request of each kind
over HTTP, from a server of the same network with nothing else to do: a decision
of 4 questions, the JSON of their answers, and a chat answer of 64 tokens. The
network is that of `configs/benchmark_sampler.py` over byte pairs, random: what is
answered means nothing, what it costs does. Prints JSON; ratios are medians over
the rounds.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import pathlib
import random
import statistics
import tempfile
import time

from tokenizers import Tokenizer

from dllm_jax.config import config as configs
from dllm_jax.data import byte_pairs
from dllm_jax.run import decisions
from dllm_jax.run.run import Run
from dllm_jax.sampling.constraints import automaton_of, json_schema
from dllm_jax.sampling.decisions import Question
from dllm_jax.sampling.options import RowOptions
from tests.serving import servers
from tests.speed.constrained import CONFIG, SMALL

THINGS = ("ship", "house", "letter", "garden", "horse", "river", "book", "king")
COLOURS = ("red", "blue", "green", "white", "black")
QUESTIONS = [
  Question(instructions=f"Is the {thing} {colour}?")
  for thing, colour in zip(THINGS[:4], COLOURS[:4], strict=True)
]
NAMES = [f"q{i + 1}" for i in range(len(QUESTIONS))]
SCHEMA = {
  "type": "object",
  "properties": {name: {"enum": ["yes", "no"]} for name in NAMES},
  "required": NAMES,
}
ANSWER = json.dumps(dict.fromkeys(NAMES, "yes"))
LABELLED = "A1: yes\nA2: no\n" * 8  # so that a label is one token
ROWS = 16
CHAT = 64


def contexts(count: int) -> list[str]:
  """Returns texts about things, a few dozen tokens each."""
  draw = random.Random(0)
  sentence = lambda: f"The {draw.choice(THINGS)} is {draw.choice(COLOURS)}."
  return [" ".join(sentence() for _ in range(8)) for _ in range(count)]


def asked(context: str) -> str:
  """Returns what the JSON is written behind: context and questions as text."""
  lines = [
    f"{name}: {question.instructions} [yes; no]"
    for name, question in zip(NAMES, QUESTIONS, strict=True)
  ]
  return "\n".join([context, "", *lines, "As JSON:", ""])


def tokenizer(folder: pathlib.Path) -> None:
  """Writes a tokenizer of byte pairs, with an end of text and a chat template."""
  texts = [f"{asked(text)}{ANSWER}\n{LABELLED}" for text in contexts(500)]
  made = Tokenizer.from_str(byte_pairs.learn(texts, 320))
  made.add_special_tokens(["<eos>", "[MASK]"])
  made.save(str(folder / "tokenizer.json"))
  fields = {
    "eos_token": "<eos>",
    "mask_token": "[MASK]",
    "chat_template": servers.TEMPLATE,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(fields))
  (folder / "text.txt").write_text("\n".join(texts))


def network(folder: pathlib.Path, small: bool) -> Run:
  """Returns a run of random parameters."""
  tokenizer(folder)
  resolved = configs.load(str(CONFIG))
  data = {"path": str(folder / "text.txt"), "tokenizer": str(folder)}
  resolved.data.update(data)
  if small:
    resolved.model.update(SMALL)
  run = Run.create(resolved, folder / "run")
  run.start()
  return run


def slots(run: Run) -> int:
  """Returns the slots of the answers, as the tokenizer would write them."""
  return len(run.tokenizer.encode(ANSWER))


def canvas(run: Run) -> int:
  """Returns a canvas for any context with its answers."""
  most = max(len(run.tokenizer.prompt(asked(text))) for text in contexts(64))
  return -(-(most + slots(run)) // 32) * 32


def writer(run: Run, texts: list[str], steps: int) -> Callable[[], int]:
  """Returns what writes the answers of contexts as JSON, and says the calls."""
  sampler = dataclasses.replace(
    run.config.sampler, block_length=0, steps=steps, temperature=0.0
  )
  language = automaton_of(json_schema(SCHEMA), run.tokenizer)
  options, free = [RowOptions(language=language)], [None] * slots(run)
  length = canvas(run)

  def write() -> int:
    calls = 0
    for start in range(0, len(texts), ROWS):
      part = texts[start : start + ROWS]
      prompts = [run.tokenizer.prompt(asked(text)).tolist() for text in part]
      made = run.sample_rows(
        [[*prompt, *free] for prompt in prompts],
        sampler=sampler,
        options=options * len(part),
        length=length,
      )
      for prompt, row in zip(prompts, made.rows, strict=True):
        json.loads(run.tokenizer.decode(row[len(prompt) :]))
      calls = max(calls, int(made.generation.function_evaluations.max()))
    return calls

  return write


def throughput(run: Run, rounds: int, count: int) -> dict:
  """Returns seconds of all decisions, and of their answers as JSON."""
  texts, most = contexts(count), slots(run)
  questions = [(text, QUESTIONS) for text in texts]
  ways = {
    "decisions": lambda: decisions.log_probs(run, questions),
    "json": writer(run, texts, most),
    "json_two": writer(run, texts, -(-most // 2)),
  }
  first = {name: way() for name, way in ways.items()}
  found = [
    {name: _timed(way) for name, way in ways.items()} for _ in range(rounds)
  ]
  medians = {k: statistics.median(r[k] for r in found) for k in ways}
  ratio = lambda name: statistics.median(
    r[name] / r["decisions"] for r in found
  )
  return {
    "json_calls": first["json"],
    "seconds": medians,
    "json_over_decisions": ratio("json"),
    "json_two_over_decisions": ratio("json_two"),
    "rounds": found,
  }


def _timed(way) -> float:
  start = time.perf_counter()
  way()
  return time.perf_counter() - start


def latency(run: Run, rounds: int) -> dict:
  """Returns milliseconds of one request of each kind over HTTP, in turns."""
  length = -(-(canvas(run) + CHAT) // 32) * 32
  sampler = dataclasses.replace(
    servers.SAMPLER, block_length=32, temperature=0.0
  )
  server = servers.Running(
    run,
    sampler=sampler,
    limits=dataclasses.replace(servers.LIMITS, seconds=600.0),
    slots=1,
    length=length,
    languages=256,
  ).start()
  (text,) = contexts(1)
  message = [{"role": "user", "content": text}]
  chat = {"model": servers.NAME, "messages": message, "max_tokens": CHAT}
  questions = [
    {
      "type": "choice",
      "instructions": question.instructions,
      "choices": [{"value": label} for label in question.labels],
    }
    for question in QUESTIONS
  ]
  form = {"name": "answers", "schema": SCHEMA, "strict": True}
  ask = {
    "decision": ("decisions", {
      "model": servers.NAME, "input": text, "questions": questions,
    }),
    "json": ("chat/completions", chat | {
      "messages": [{"role": "user", "content": asked(text)}],
      "max_tokens": slots(run),
      "response_format": {"type": "json_schema", "json_schema": form},
    }),
    "chat": ("chat/completions", chat | {"min_tokens": CHAT}),
  }  # fmt: skip

  def once(name):
    route, body = ask[name]
    status, _, made = servers.send(f"{server.url}/v1/{route}", body)
    if status != 200:
      raise SystemExit(f"{name}: {made}")

  try:
    for name in ask:
      once(name)
    found = [
      {name: 1000 * _timed(lambda name=name: once(name)) for name in ask}
      for _ in range(rounds)
    ]
  finally:
    server.stop()
  medians = {k: statistics.median(r[k] for r in found) for k in ask}
  return {"milliseconds": medians, "rounds": found}


def main() -> None:
  """Measures and prints."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--rounds", type=int, default=5)
  flags.add_argument("--contexts", type=int, default=64)
  flags.add_argument("--small", action="store_true", help="to try the script")
  args = flags.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    run = network(pathlib.Path(directory), args.small)
    print(
      json.dumps({
        "slots": slots(run),
        "canvas": canvas(run),
        **throughput(run, args.rounds, args.contexts),
        "latency": latency(run, args.rounds),
      })
    )


if __name__ == "__main__":
  main()
