"""Sampling in a language beside sampling without one: one network, in turns.

    python -m tests.speed.constrained [--cache=dual] [--batch_size=8]

The network is that of `configs/benchmark_sampler.py`; its 32,000 tokens get texts,
as many as they are, by which a JSON schema becomes an automaton of about 200
states. There is no end of text, so that both programs fill all 256 slots by as
many calls; every text must parse. Prints JSON: seconds of each round, medians,
and the median over the rounds of the ratio of the two.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import string
import tempfile

import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.reports.benchmark import prompts
from dllm_jax.run.run import Run
from dllm_jax.sampling.constraints import json_schema
from dllm_jax.sampling.constraints.automaton import compiled
from dllm_jax.sampling.options import RowOptions

CONFIG = pathlib.Path(__file__).parents[2] / "configs/benchmark_sampler.py"
SMALL = {"width": 64, "layers": 2, "heads": 4, "mlp_dim": 128, "unroll": 1}
SCHEMA = {
  "type": "array",
  "items": {
    "type": "object",
    "properties": {
      "name": {"type": "string", "maxLength": 4},
      "kind": {"enum": ["book", "record", "picture"]},
      "day": {"type": "string", "format": "date"},
      "price": {"type": "number"},
    },
    "required": ["name", "kind", "day", "price"],
  },
}


def texts(count: int) -> list[bytes]:
  """Returns what so many tokens write: single signs, pairs, and syllables."""
  signs = [chr(c) for c in range(32, 127)]
  marks = [a + b for a, b in itertools.product('"{}[],: ', repeat=2)]
  letters = string.ascii_lowercase
  words = (
    before + "".join(some)
    for size in (2, 3, 4)
    for before in ("", " ")
    for some in itertools.product(letters, repeat=size)
  )
  found = itertools.chain(signs, marks, words)
  return [text.encode() for text in itertools.islice(found, count)]


def main() -> None:
  """Measures and prints."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--cache", default="none")
  flags.add_argument("--batch_size", type=int, default=1)
  flags.add_argument("--rounds", type=int, default=5)
  flags.add_argument("--small", action="store_true", help="to try the script")
  args = flags.parse_args()
  resolved = configs.load(str(CONFIG))
  if args.small:
    resolved.model.update(SMALL)
  with tempfile.TemporaryDirectory() as directory:
    run = Run.create(resolved, pathlib.Path(directory) / "run")
    run.start()
  written = texts(run.objective.mask_id)
  language = compiled(json_schema(SCHEMA).pattern, [*written, b""])
  sampler = dataclasses.replace(run.config.sampler, cache=args.cache)
  length = run.config.data.length
  rows = prompts(run, length, args.batch_size, None, False)
  ways = {"free": RowOptions(), "held": RowOptions(language=language)}

  def once(way, seed):
    return run.sample_rows(
      rows,
      length=length,
      seed=seed,
      sampler=sampler,
      options=[ways[way]] * len(rows),
    )

  calls = {}
  for way in ways:
    sampled = once(way, 0)
    calls[way] = int(sampled.generation.function_evaluations.max())
  start = rows[0].index(None)
  for row in np.asarray(sampled.generation.tokens):
    json.loads(b"".join(written[token] for token in row[start:]))
  if calls["free"] != calls["held"]:
    raise SystemExit(f"not as many calls: {calls}")
  rounds = [
    {way: once(way, seed).seconds for way in ways}
    for seed in range(1, args.rounds + 1)
  ]
  ratios = [each["held"] / each["free"] for each in rounds]
  print(
    json.dumps({
      "states": language.states,
      "arcs": len(language.arcs),
      "classes": language.kinds,
      "calls": calls["held"],
      "seconds": {
        way: statistics.median(each[way] for each in rounds) for way in ways
      },
      "ratio": statistics.median(ratios),
      "ratios": ratios,
      "rounds": rounds,
    })
  )


if __name__ == "__main__":
  main()
