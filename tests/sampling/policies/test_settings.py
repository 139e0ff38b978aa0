"""Settings of a sampler: each is refused in a line, or keeps what it promises.

The network is a table: what it says depends on slot and token alone.
"""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Geometric
from dllm_jax.core.types import Denoiser, KVCache, ModelOutputs
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_transition import MaskUniform
from dllm_jax.objectives.diffusion_lm import DiffusionLM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.genmd4 import GenMD4
from dllm_jax.objectives.gidd import GIDD
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.sampling.presets import PRESETS, SamplerConfig
from dllm_jax.sampling.requests import build
from tests.quick import long
from tests.sampling import published

VOCAB, MASK, LENGTH, ENDS = 9, 8, 8, (6, 3)
TOKENS = {"vocab_size": VOCAB, "mask_id": MASK}
OBJECTIVES = {
  "mdlm": MDLM(**TOKENS),
  "geometric": MDLM(**TOKENS, schedule=Geometric()),
  "md4": MD4(**TOKENS),
  "llada": LLaDA(**TOKENS),
  "dream": Dream(**TOKENS),
  "bd3lm": BD3LM(**TOKENS, length=LENGTH, block_size=4),
  "autoregressive": Autoregressive(**TOKENS, bos_id=0),
  "sedd": SEDD(**TOKENS),
  "gidd": GIDD(**TOKENS),
  "genmd4": GenMD4(**TOKENS),
  "d3pm": D3PM(**TOKENS, transition=MaskUniform()),
  "udlm": UDLM(vocab_size=VOCAB),
  "diffusion_lm": DiffusionLM(vocab_size=VOCAB, features=VOCAB),
}
OPTIONS = (
  {"banned": "5"},
  {"forced": "6"},
  {"forced": "2,5", "banned": "5"},
  {"forced": "5", "banned": "5"},
  {"forced": "8"},
  {"doubt_end": True},
  {"doubted": "5"},
  {"suppress_end": True},
  {"stop": True},
  {"top_k": 1},
  {"top_p": 1e-6},
  {"top_p": 0.5},
  *({"steps": steps} for steps in (1, 2, 3, 9)),
  *({"block_length": length} for length in (1, 2, 3, 4)),
  {"block_length": 4, "cache": "dual"},
  {"block_length": 2, "cache": "prefix"},
  {"block_length": 4, "context": 4},
  {"cache": "none"},
  *({"threshold": value} for value in (1e-6, 1.0)),
  *({"factor": value} for value in (1e-9, 1e9)),
  *({"entropy_bound": value} for value in (0.0, 1e9)),
  *({"score_temperature": value} for value in (1e-30, 1e30)),
  *({"temperature": value} for value in (0.0, 1e-30, 1e30)),
  *({"repetition_penalty": value} for value in (1e-30, 1e30)),
  *({"eta": value} for value in (0.0, 1.0)),
  *({"kappa": value} for value in (0.0, 1.0)),
  {"cfg_scale": 3.0},
  {"extend": True},
)


def network(prefers=None):
  """Returns a network that says random things, or mostly one token."""
  table = np.random.default_rng(3).normal(scale=3, size=(64, VOCAB))
  if prefers is not None:
    table[:, prefers] += 30
  table = jnp.asarray(table, jnp.float32)

  def apply(params, inputs, cache):
    tokens = inputs.latent if inputs.latent.ndim == 2 else 0
    at = inputs.positions * 7 + tokens
    return ModelOutputs(hidden=table[at % 64]), cache

  def cache(rows, slots):
    kept = jnp.zeros((1, rows, 1, slots, 1))
    seen = jnp.zeros((rows, slots), jnp.int32)
    return KVCache(key=kept, value=kept, segment_ids=seen)

  return Denoiser(init=None, apply=apply, cache=cache)


NETWORKS = {name: network(name) for name in (None, 6, MASK)}


def sample(objective, prefers, fields, **options):
  """Returns what a prompt, an infill and an empty row became, and which."""
  objective = OBJECTIVES[objective]
  config = SamplerConfig(**fields)
  sampler = config.build(objective, length=LENGTH, end_ids=ENDS)
  rows = [[1] + [None] * 6, [1, 2, None, None, 4, None, None], [None] * 3]
  if objective.begin_id is not None:
    rows = [[0, *row] for row in rows]
  requests = build(rows, objective=objective, length=LENGTH)
  process = objective.init(jax.random.key(0))
  args = {}, process, jax.random.key(1), requests
  found = published.quick(sampler, NETWORKS[prefers], *args, **options)
  return found, requests


def check(objective, prefers, fields):
  """Fails unless a sample is whole and legal."""
  found, requests = sample(objective, prefers, fields)
  tokens, given = np.asarray(found.tokens), requests.fixed | ~requests.valid
  np.testing.assert_array_equal(tokens[given], requests.tokens[given])
  new = set(tokens[~given].tolist())
  ids = lambda name: {int(i) for i in fields.get(name, "").split(",") if i}
  never = ids("banned") | set(ENDS if fields.get("suppress_end") else ())
  assert new <= (ids("forced") or set(range(VOCAB)))
  assert MASK not in new or OBJECTIVES[objective].mask_id is None
  assert not new & never


# What left masks, or tokens that were forbidden, in a finished text.
@pytest.mark.parametrize(
  ("objective", "prefers", "fields"),
  [
    ("llada", None, {"preset": "llada", "forced": "5", "doubted": "5"}),
    ("mdlm", None, {"preset": "entropy_bound", "forced": "6", "doubt_end": True}),
    ("dream", 6, {"preset": "dream_margin", "top_k": 1, "doubt_end": True}),
    ("dream", MASK, {"preset": "maskgit_plus", "top_k": 1, "banned": "0,1,2"}),
    ("gidd", None, {"preset": "mdlm", "forced": "2"}),  # noise was left
    long("mdlm", MASK, {
      "preset": "mask_predict", "temperature": 1e-30, "repetition_penalty": 1e-30,
    }),
    long("llada", None, {"preset": "llada", "temperature": 1.0, "cfg_scale": 1e38}),
    long("d3pm", None, {"preset": "udlm", "forced": "2", "steps": 3}),
    long("bd3lm", 6, {"preset": "sdar", "top_p": 1e-6, "doubt_end": True}),
    long("llada", 6, {"preset": "mask_predict", "forced": "6", "doubted": "6"}),
    long("mdlm", MASK, {"preset": "dream_origin", "top_k": 1, "forced": "2,8"}),
  ],
  ids=str,
)  # fmt: skip
@pytest.mark.few(1)
def test_what_cannot_be_preferred_is_still_written(objective, prefers, fields):
  check(objective, prefers, fields)


def settings(count):
  """Yields random settings of a preset."""
  rng = random.Random(1)
  for _ in range(count):
    fields = {"preset": rng.choice(list(PRESETS))}
    for more in rng.sample(OPTIONS, rng.choice((0, 1, 2, 2, 3))):
      fields |= more
    yield rng.choice(list(OBJECTIVES)), rng.choice(list(NETWORKS)), fields


@pytest.mark.parametrize(
  ("objective", "prefers", "fields"),
  [*settings(16), *(long(*case) for case in [*settings(120)][16:])],
  ids=str,
)
@pytest.mark.few(1)
def test_no_legal_setting_leaves_a_mask(objective, prefers, fields):
  try:
    check(objective, prefers, fields)
  except ValueError as error:
    assert "\n" not in str(error)


# What no policy could heed was left aside in silence.
@pytest.mark.parametrize(
  ("objective", "fields", "said"),
  [
    ("diffusion_lm", {"banned": "5"}, "moves vectors and draws no tokens"),
    ("diffusion_lm", {"suppress_end": True}, "suppress_end means nothing"),
    ("diffusion_lm", {"top_p": 0.5}, "top_p means nothing"),
    ("diffusion_lm", {"preset": "diffusion_gemma"}, "which moves vectors"),
    ("genmd4", {"preset": "remdm"}, "needs a masked-diffusion objective"),
    ("genmd4", {"preset": "psi"}, "which GenMD4 has not"),
    (
      "autoregressive",
      {"preset": "idlm_published", "block_length": 4},
      "on kept keys and values.* not cache='none', block_length=4",
    ),
    (
      "autoregressive",
      {"preset": "idlm", "cache": "none"},
      "on kept keys and values.* not cache='none', block_length=1",
    ),
  ],
  ids=str,
)
def test_what_an_objective_cannot_heed_is_refused(objective, fields, said):
  with pytest.raises(ValueError, match=said):
    SamplerConfig(**fields).build(
      OBJECTIVES[objective], length=LENGTH, end_ids=ENDS
    )


# ML-GSAI/LLaDA issue 137: of `confidence_eos_eot_inf` one end had no effect.
@pytest.mark.parametrize("preset", ["llada", long("llada_random")])
@pytest.mark.all
def test_doubted_tokens_are_revealed_last_and_none_is_lost(preset):
  fields = {"preset": preset, "steps": 6}  # a slot a step
  plain = np.asarray(sample("llada", None, fields)[0].tokens)[0, 1:7]
  doubted = set(plain[::2].tolist())
  ids = {"doubted": "+".join(map(str, doubted))}
  found, _ = sample("llada", None, fields | ids, trace=True)
  history = published.history(found, 0)[:, 1:7]
  np.testing.assert_array_equal(history[-1], plain)
  order = np.argmax(history != MASK, axis=0)
  late = np.isin(plain, list(doubted))
  assert 0 < late.sum() < 6 and order[late].min() > order[~late].max()
  # Where the network wants nothing but ends, ends it is.
  found, _ = sample("llada", 6, fields | {"doubt_end": True}, trace=True)
  assert (np.asarray(found.tokens)[0, 1:7] == 6).all()
