"""DiffusionGemma behind the engine: rows have the tokens of the offline sampler."""

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.sampling import requests
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.serving.launch import Program
from tests.sampling import published, small
from tests.serving import served

NAME = "diffusion_gemma_generate"
LENGTH, ROWS = 40, 3
CONFIG = SamplerConfig(preset="diffusion_gemma", steps=3, entropy_bound=1.0)


def asked(vocab: int, count: int):
  """Returns prompts as long as the window and longer, with budgets of all kinds."""
  rng = np.random.default_rng(3)
  sizes = [(3, 8), (12, 11), (1, 24), (17, 5), (0, 9), (12, 16), (21, 3)]
  return [
    (*rng.integers(3, vocab, size).tolist(), *[None] * new)
    for size, new in (sizes * count)[:count]
  ]


@pytest.mark.all
@pytest.mark.parametrize("calls", [1, 4])
def test_rows_are_those_of_the_offline_sampler(calls):
  model = published.model(NAME)
  objective, ends = model.objective, (5, 9)
  spec = CONFIG.build(objective, length=LENGTH, end_ids=ends)
  mesh = served.one_device()
  everywhere = jax.NamedSharding(mesh, jax.P())
  made = Program(
    spec,
    model.denoiser,
    jax.device_put(model.params, everywhere),  # as runs have them
    Process(),
    rows=ROWS,
    counts=(1, ROWS),
    mesh=mesh,
    defaults=CONFIG.options(ends),
  )
  made.compile()
  compiled = made.programs()
  rows = asked(objective.vocab_size, 9)
  # Two that begin alike: a window no longer has what lies before it.
  rows[5] = (*rows[1][:12], *rows[5][12:])
  chosen = [RowOptions(seed=served.SEED)] * len(rows)
  found = served.at_random(made, rows, seed=1, calls=calls, options=chosen)
  assert made.programs() == compiled

  options = stack(chosen, defaults=CONFIG.options(ends), objective=objective)
  batch = requests.build(
    [requests.whole(row, objective) for row in rows],
    objective=objective,
    length=LENGTH,
    options=options,
  )
  args = model.params, Process(), small.KEY, batch
  want = jax.device_get(published.quick(spec, model.denoiser, *args).tokens)
  for number, row in enumerate(rows):
    heard, own = found.heard[number], want[number][: len(row)].tolist()
    new = [
      token for token, given in zip(own, row, strict=True) if given is None
    ]
    stop = next((i for i, token in enumerate(new) if token in ends), len(new))
    told = heard.tokens[len(row) - len(new) :]
    assert told[:stop] == new[:stop]
    assert heard.reason == ("stop" if stop < len(new) else "length")
