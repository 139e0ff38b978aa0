"""Every recorded step of pictures drawn and of answers: `golden/mmada`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.types import Process
from dllm_jax.objectives.mmada import MMaDA
from dllm_jax.pretrained import load_pretrained
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import Temperature, Within
from dllm_jax.sampling.policies.selection import CosinePlan, Progress, Seen
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import generate
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from tests import golden_cases, quick
from tests.pretrained.golden import publish

CASE = golden_cases.load("mmada")
A = CASE.arrays
DRAWN = [run for run in CASE.config["runs"] if "timesteps" in run]
ASKED = [run for run in CASE.config["runs"] if "mmu_run" in run]
QUICK = DRAWN[-1:]  # guided; the others take as long
VOCAB = CASE.config["hf_config"]["vocab_size"]
MASK = CASE.config["hf_config"]["mask_token_id"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  return load_pretrained(
    publish("mmada", tmp_path_factory.mktemp("m") / "mmada")
  )


def program(sampler, model):
  def run(params, key, requests):
    return generate(
      sampler, model.denoiser, params, Process(), key, requests, trace=True
    )

  return jax.jit(run)


def over(run):
  images = ImageVocabulary(
    offset=run["text_tokenizer_len"], codes=run["codebook_size"],
    tokens=run["seq_len"], pad=0, begin=0, end=0, to_image=0, understand=0,
    start_image=0, end_image=0, reason=0, end_header=0,
  )  # fmt: skip
  return MMaDA(
    vocab_size=VOCAB, mask_id=MASK, images=images,
    length=A["t2i_input"].shape[1],
  )  # fmt: skip


def sampler_of(run, empty):
  """The preset's policy; the recorded empty prompts differ from row to row."""
  objective = over(run)
  built = SamplerConfig(
    preset="mmada", steps=run["timesteps"], temperature=run["temperature"],
    score_temperature=run["temperature"],
  ).build(objective, length=A["t2i_input"].shape[1])  # fmt: skip
  images, policy = objective.images, built.policy
  assert policy.filters == (Within(images.offset, images.stop),)
  assert policy.selection == CosinePlan(total=images.tokens, waits=True)
  guidance = None
  if run["guidance_scale"]:
    guidance = Guidance(
      scale=run["guidance_scale"], kind="empty", prompt=empty, hidden=-1
    )
  return Sampler(policy=policy, length=built.length, guidance=guidance)


def some(runs):
  """Returns runs, all but a few among the long tests."""
  marks = lambda run: () if run in QUICK else pytest.mark.all
  return [pytest.param(run, marks=marks(run)) for run in runs]


@pytest.mark.parametrize("run", some(DRAWN), ids=lambda run: f"t2i{run['run']}")
def test_every_step_of_a_picture(model, run):
  """The canvas before every step, and all codes at the end."""
  name, tokens = f"t2i{run['run']}", A["t2i_input"]
  guided = bool(run["guidance_scale"])
  parts = [[i] for i in range(len(tokens))] if guided else [range(len(tokens))]
  for part in map(list, parts):
    empty = tuple(A["t2i_uncond"][part[0], : run["resolution"] + 1].tolist())
    sampler = sampler_of(run, empty)
    wanted = tokens[part] == MASK
    requests = Requests(
      tokens=np.where(wanted, 0, tokens[part]), fixed=~wanted,
      valid=A["t2i_attention_mask"][part] > 0,
      request=np.asarray(part, np.int32),
    )  # fmt: skip
    found = program(sampler, model)(model.params, jax.random.key(0), requests)
    steps = run["timesteps"]
    assert np.asarray(found.function_evaluations).tolist() == [steps] * len(
      part
    )
    canvases = [found.trace.initial, *found.trace.frames.tokens]
    inputs = A[f"{name}_inputs"][:, part]
    for step in range(steps):
      np.testing.assert_array_equal(canvases[step], inputs[step], f"{step}")
      masked = (inputs[step] == MASK).sum(1)
      np.testing.assert_array_equal(
        masked, A[f"{name}_masked_count"][step, part]
      )
    codes = np.asarray(found.tokens)[wanted].reshape(len(part), -1)
    codes -= run["text_tokenizer_len"]
    np.testing.assert_array_equal(codes, A[f"{name}_output"][part])


@pytest.mark.parametrize(
  "run", some(ASKED), ids=lambda run: f"mmu{run['mmu_run']}"
)
def test_answers(model, run):
  given, new = A["mmu_prompt"], run["max_new_tokens"]
  length = given.shape[1] + new
  objective = MMaDA(vocab_size=VOCAB, mask_id=MASK)
  sampler = SamplerConfig(
    preset="llada", cfg_scale=run["cfg_scale"],
    steps=run["steps"] * run["block_length"] // new,
  ).build(objective, length=length)  # fmt: skip
  # Blocks are counted from the prompt, and need not divide the canvas.
  sampler = Sampler(
    policy=sampler.policy, length=length, block_length=run["block_length"],
    guidance=sampler.guidance,
  )  # fmt: skip
  tokens = np.zeros((len(given), length), np.int32)
  tokens[:, : given.shape[1]] = given
  fixed = np.broadcast_to(np.arange(length) < given.shape[1], tokens.shape)
  requests = Requests(
    tokens=tokens, fixed=fixed, valid=np.ones_like(fixed),
    request=np.arange(len(given), dtype=np.int32),
  )  # fmt: skip
  found = program(sampler, model)(model.params, jax.random.key(0), requests)
  np.testing.assert_array_equal(found.tokens, A[f"mmu{run['mmu_run']}_output"])


@pytest.mark.parametrize("steps", [quick.long(8), 18])
def test_cosine_plan(steps):
  """How many stay masked of 1024, the last slot waiting for the last step."""
  plan = CosinePlan(total=1024, waits=True)
  left, expected = 1024, np.maximum(A[f"mask_len_T{steps}"], 1)
  for step in range(steps):
    seen = Seen(
      candidates=jnp.arange(1024)[None] < left,
      score=jnp.zeros((1, 1024)), confidence=jnp.zeros((1, 1024)),
    )  # fmt: skip
    at = jnp.asarray([step])
    shown = plan(seen, Progress(step=at, maskable=at * 0 + 1024), steps, None)
    left -= int(shown.sum())
    assert left == (0 if step + 1 == steps else expected[step])


def test_plan_waits():
  """Of few slots the plan would end early: the last waits, by calls for nothing."""
  left, counts = 3, []
  for step in range(6):
    seen = Seen(
      candidates=jnp.arange(3)[None] < left, score=jnp.zeros((1, 3)),
      confidence=jnp.zeros((1, 3)),
    )  # fmt: skip
    at = jnp.asarray([step])
    progress = Progress(step=at, maskable=at * 0 + 3)
    left -= int(CosinePlan(waits=True)(seen, progress, 6, None).sum())
    counts.append(left)
  assert counts == [2, 1, 1, 1, 1, 0]


def test_noise_compounds():
  """tau_s = tau prod_j (1 - j / T), on the logarithm of the confidence."""
  policy = Unmasking(
    objective=MMaDA(vocab_size=5, mask_id=4), steps=4, noise_temperature=2.0,
    falling="compounding", processors=(Temperature(1.0),),
  )  # fmt: skip

  class Half:
    def uniform(self, tag, n):
      return jnp.full((1, 3, n), 0.5)

  sure, masked = jnp.full((1, 3), 0.25), jnp.ones((1, 3), bool)
  gumbel = -np.log(-np.log(0.5))
  for step, left in enumerate(np.cumprod([0.75, 0.5, 0.25, 0.0])):
    at = jnp.asarray([step])
    state = Progress(step=at, maskable=at * 0 + 3)
    found = policy._noised(sure, Half(), masked, state)
    expected = np.log(0.25) + 2.0 * left * gumbel
    np.testing.assert_allclose(found, np.full((1, 3), expected), rtol=1e-5)


def test_a_model_of_text_draws_nothing():
  text = MMaDA(vocab_size=5, mask_id=4)
  with pytest.raises(ValueError, match="draws pictures.*text alone"):
    SamplerConfig(preset="mmada").build(text, length=8)
