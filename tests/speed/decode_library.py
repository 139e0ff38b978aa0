"""The library's sampler and engine, and the parameters and prompts of the other program.

python tests/speed/decode_library.py EXCHANGE.npz ROWS
"""

import dataclasses
import functools
import pathlib
import queue
import sys
import tempfile

from decode_worker import serve
import jax
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.run.run import Run
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.requests import Committed, Finished, Request

CONFIG = pathlib.Path(__file__).parents[2] / "configs/benchmark_sampler.py"


def main(path: str, rows: int) -> None:
  """Writes the network and prompts to the file, then serves."""
  with tempfile.TemporaryDirectory() as directory:
    resolved = configs.load(str(CONFIG))
    run = Run.create(resolved, pathlib.Path(directory) / "run")
    run.start()
  length, sampler = run.config.data.length, run.config.sampler
  mask_id = run.objective.mask_id
  prompts = np.random.default_rng(0).integers(0, mask_id, (rows, length // 3))
  params = run.state.params["model"]
  flat = jax.tree_util.tree_flatten_with_path(params)[0]
  np.savez(
    path,
    prompts=prompts,
    mask_id=mask_id,
    length=length,
    block_length=sampler.block_length,
    steps=sampler.steps,
    eps=run.network.norm_eps,
    theta=run.network.rope_theta,
    **{jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat},
  )
  templates = [
    [*prompt.tolist(), *[None] * (length - len(prompt))] for prompt in prompts
  ]

  @functools.cache
  def engine():
    dual = dataclasses.replace(sampler, cache="dual")
    made = Engine.of(run, sampler=dual, slots=rows, queue=rows, length=length)
    made.start()
    return made

  def served(count):
    canvases, over = np.zeros((count, length), np.int32), queue.Queue()

    def listener(row):
      canvases[row, : prompts.shape[1]] = prompts[row]

      def hear(event):
        if isinstance(event, Committed):
          canvases[row, list(event.slots)] = event.tokens
        elif isinstance(event, Finished):
          over.put(event)

      return hear

    for row in range(count):
      request = Request(template=tuple(templates[row]), number=row)
      engine().submit(request, listener(row))
    for _ in range(count):
      over.get()
    return canvases

  def generate(kind, rows):
    if kind == "engine":
      return served(rows)
    sampled = run.sample_rows(
      templates[:rows],
      length=length,
      sampler=dataclasses.replace(sampler, cache=kind),
      seed=0,
    )
    return np.asarray(sampled.generation.tokens)

  serve(generate)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
