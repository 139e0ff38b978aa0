"""Self-speculation beside cached autoregressive decoding: one network, one text.

    dllm train --config=configs/shakespeare_autoregressive.py \
        --workdir=runs/drafts --config.objective.masks_ahead=3 \
        --config.objective.clean_weight=1.0 --config.objective.begins=false \
        --config.data.length=126 --config.data.path='e2e/*.txt'
    python -m tests.speed.speculate --workdir=runs/drafts

All programs write the likeliest text behind the same held-out prompts; texts are
compared before anything is timed. Prints JSON: medians of tokens a second of
rounds in turns, their ratios to autoregressive decoding, network calls of each.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from dllm_jax.core.types import Process
from dllm_jax.run.run import Run
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import build


def main() -> None:
  """Measures and prints."""
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("--workdir", required=True)
  flags.add_argument("--rows", type=int, default=1)
  flags.add_argument("--prompt", type=int, default=32)
  flags.add_argument("--tokens", type=int, default=96)
  flags.add_argument("--rounds", type=int, default=5)
  flags.add_argument("--prompts", type=int, default=4)
  args = flags.parse_args()

  run = Run.open(args.workdir)
  params = run.load().eval_params["model"]
  length = args.prompt + args.tokens
  held_out = run.corpus.held_out
  launchers = {}
  for name in ("autoregressive", "idlm", "idlm_quadratic"):
    config = SamplerConfig(preset=name, temperature=0.0, stop=False)
    sampler = config.build(run.objective, length=length)
    launchers[name] = Launcher(sampler, run.denoiser)
  batches = []
  for i in range(args.prompts):
    some = range(i * args.rows, (i + 1) * args.rows)
    rows = [held_out[n].tokens[: args.prompt].tolist() for n in some]
    rows = [row + [None] * args.tokens for row in rows]
    batches.append(build(rows, objective=run.objective, length=length))
  key, calls = jax.random.key(0), {}
  for requests in batches:
    made = {
      name: launch(params, Process(), key, requests)
      for name, launch in launchers.items()
    }
    for one in made.values():
      np.testing.assert_array_equal(one.tokens, made["autoregressive"].tokens)
    for name, one in made.items():
      count = int(one.function_evaluations.sum())
      calls[name] = calls.get(name, 0) + count
  rates = {name: [] for name in launchers}
  for _ in range(args.rounds):
    for name, launch in launchers.items():
      start = time.perf_counter()
      for requests in batches:
        jax.block_until_ready(launch(params, Process(), key, requests).tokens)
      seconds = time.perf_counter() - start
      rates[name].append(len(batches) * args.rows * args.tokens / seconds)
  median = {name: statistics.median(one) for name, one in rates.items()}
  own = rates.pop("autoregressive")
  ratios = {
    name: [one / base for one, base in zip(rates[name], own, strict=True)]
    for name in rates
  }
  print(
    json.dumps({
      "tokens_per_second": median,
      "ratio": {name: statistics.median(x) for name, x in ratios.items()},
      "ratios": ratios,
      "calls": calls,
    })
  )


if __name__ == "__main__":
  main()
