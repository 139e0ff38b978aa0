"""The library's sampler, and the parameters and prompts of the other program.

python tests/speed/decode_library.py EXCHANGE.npz ROWS
"""

import dataclasses
import pathlib
import sys
import tempfile

from decode_worker import serve
import jax
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.run.run import Run

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

  def generate(kind, rows):
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
