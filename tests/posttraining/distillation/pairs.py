"""A task whose answers are many, which a distilled network learns to choose from.

    user       pairs a b c d e f
    assistant  b a c d f e          each pair in either order, at random

An answer is an exact match if it is one of the eight that are right. Each slot of
an undecided pair has either letter with probability 1/2: a network that was
trained on such answers is never sure of two pairs at once.

    python -m tests.posttraining.distillation.pairs write FOLDER
    python -m tests.posttraining.distillation.pairs measure RUN ...
"""

import dataclasses
import json
import pathlib
import random
import sys

from dllm_jax import Run
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import instructions
from dllm_jax.posttraining.distillation.student import load_examples
from dllm_jax.sampling import requests

LETTERS, PAIRS = "abcdefghijkl", 3
SIDES = {"train": 16_000, "prompts": 2048, "held_out": 256}
THRESHOLDS = (0.99, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3)


def parts(word: str) -> list[str]:
  """Returns the pairs of a word."""
  return [word[i : i + 2] for i in range(0, len(word), 2)]


def right(word: str, answer: str) -> bool:
  """Returns whether an answer has all pairs, each in either order."""
  return [*map(sorted, parts(answer))] == [*map(sorted, parts(word))]


def write(folder: pathlib.Path) -> None:
  """Writes the tokenizer and conversations: different words on each side."""
  folder.mkdir(parents=True, exist_ok=True)
  instructions.write_tokenizer(Path(folder / "letters"))
  rng, words = random.Random(0), {}
  while len(words) < sum(SIDES.values()):
    pairs = [rng.sample(LETTERS, 2) for _ in range(PAIRS)]
    words["".join(map("".join, pairs))] = None
  left = iter(words)
  for side, count in SIDES.items():
    lines = []
    for _ in range(count):
      word = next(left)
      said = "".join(rng.choice((p, p[::-1])) for p in parts(word))
      asked = {"role": "user", "content": f"pairs {word}"}
      told = {"role": "assistant", "content": said}
      lines.append(json.dumps({"messages": [asked, told]}))
    (folder / f"{side}.jsonl").write_text("\n".join(lines) + "\n")


def measure(run: Run) -> list[dict[str, float]]:
  """Returns exact matches and network calls on held-out prompts."""
  examples = load_examples(run.config.data, run.tokenizer).held_out
  prompts = [one.tokens[: one.given].tolist() for one in examples]
  length, found = run.config.data.length, []
  rows = [requests.continuation(p, length=length) for p in prompts]
  words = [run.tokenizer.decode(p).split(" ")[-1] for p in prompts]
  for threshold in THRESHOLDS:
    sampler = dataclasses.replace(run.config.sampler, threshold=threshold)
    sampled = run.sample_rows(rows, length=length, sampler=sampler)
    ends = run.tokenizer.end_ids
    answers = [
      run.tokenizer.decode(requests.answered(got, row, ends))
      for got, row in zip(sampled.generation.tokens.tolist(), rows, strict=True)
    ]
    exact = [right(*pair) for pair in zip(words, answers, strict=True)]
    calls = sampled.generation.function_evaluations
    found.append({
      "threshold": threshold,
      "exact_match": sum(exact) / len(exact),
      "calls": float(calls.mean()),
      "tokens_per_call": float((2 * PAIRS + 1) / calls.mean()),
    })
  return found


def main(task: str, *places: str) -> None:
  """Writes the data, or prints a line for each run and threshold."""
  if task == "write":
    write(pathlib.Path(places[0]))
    return
  for place in places:
    for line in measure(Run.open(place)):
      print(place, json.dumps(line), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
