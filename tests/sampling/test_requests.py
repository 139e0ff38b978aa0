"""Requests and infill templates."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.data.numbers import Numbers
from dllm_jax.data.tokenizer import Characters
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.generator import Generator
from dllm_jax.sampling.infill import parse
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import (
  answered,
  begun,
  bucket,
  build,
  continuation,
  text_ids,
)
from tests import toys

OBJECTIVE = MDLM(vocab_size=128, mask_id=127)
encode = lambda text: [ord(c) for c in text]
LETTERS = Characters("".join(map(chr, range(127))))


def test_template_becomes_slots():
  slots = parse("To be [MASK*3] not[MASK]", LETTERS)
  assert slots == [*encode("To be "), None, None, None, *encode(" not"), None]
  requests = build([slots, [65, None]], objective=OBJECTIVE, length=16)
  assert requests.fixed[0].sum() == 10 and requests.valid[0].sum() == 14
  np.testing.assert_array_equal(requests.valid[1], np.arange(16) < 2)
  np.testing.assert_array_equal(requests.request, [0, 1])
  assert requests.tokens[0, 0] == ord("T")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ("no span", "no mask span"),
    ("[MASK*0]", "empty mask span"),
    ("a [MASK*x] b", "malformed mask span"),
    ("a [MASK", "malformed mask span"),
  ],
)
def test_bad_templates(template, message):
  with pytest.raises(ValueError, match=message):
    parse(template, LETTERS)


def test_continuation():
  assert continuation([1, 2], length=4) == [1, 2, None, None]
  assert continuation([1, 2], length=4, new_tokens=1) == [1, 2, None]
  with pytest.raises(ValueError, match="5 tokens but the canvas has 4 slots"):
    continuation([1] * 5, length=4)
  assert continuation([1], new_tokens=2) == [1, None, None]
  with pytest.raises(ValueError, match="how many new_tokens"):
    continuation([1])
  with pytest.raises(ValueError, match="new_tokens must lie in"):
    continuation([1, 2], length=4, new_tokens=3)


@pytest.mark.parametrize(
  ("rows", "message"),
  [
    ([], "nothing to sample"),
    ([[1] * 9], "needs 9 slots but the canvas has 8"),
    ([[1, 128]], "outside the vocabulary"),
    ([[1, 127]], "mask token 127 at slot 1"),
  ],
)
def test_bad_rows(rows, message):
  with pytest.raises(ValueError, match=message) as error:
    build(rows, objective=OBJECTIVE, length=8)
  assert "\n" not in str(error.value)


def test_buckets_are_few_and_wide_enough():
  sizes = {bucket(n) for n in range(1, 1025)}
  assert sorted(sizes) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
  assert all(n <= bucket(n) < max(1.5 * n, 33) for n in range(1, 1025))
  assert bucket(65, multiple=32) == 96 and bucket(33, multiple=20) == 60
  with pytest.raises(ValueError, match="at least 1 slot"):
    bucket(0)


def test_prompts_of_many_lengths_need_a_handful_of_programs():
  fast, plain = SamplerConfig(preset="fast_dllm"), SamplerConfig(preset="llada")
  for config, most in ((plain, 11), (fast, 10)):
    specs = {
      config.build(OBJECTIVE, length=config.canvas(OBJECTIVE, slots))
      for slots in range(1, 1025)
    }
    assert len(specs) <= most  # Each is one program for a number of rows.


def test_a_service_compiles_once_for_all_lengths_of_a_bucket():
  tokenizer = Numbers(vocab_size=9, mask_id=8)
  objective = MDLM(vocab_size=9, mask_id=8)
  denoiser = toys.mixer(9, 4)
  mesh = make_mesh(devices=jax.devices()[:1])
  generator = Generator(objective, denoiser, tokenizer, mesh=mesh)
  config = SamplerConfig(preset="llada", steps=2)
  params = jax.jit(denoiser.init)(jax.random.key(0), None)
  for length in (1, 5, 20):
    rows = [continuation([1] * n, new_tokens=10) for n in (length, 2)]
    plan = generator.plan(rows, length=None, sampler=config)
    sampled = generator(params, Process(), plan, seed=0)
    assert sampled.generation.tokens.shape == (2, 32)
    assert [len(row) for row in sampled.rows] == [length + 10, 12]
  (launcher,) = generator.launchers
  assert launcher.programs() == 1


def test_a_text_ends_at_its_end_and_begins_after_its_beginning():
  template = [3, None, None, 5, None]
  assert text_ids([3, 1, 7, 5, 2], template) == [3, 1, 7, 5, 2]
  assert text_ids([3, 1, 7, 5, 7], template, (7,)) == [3, 1, 5]
  assert text_ids([3, 8, 7, 5, 7], template, (7, 8)) == [3, 5]
  here = Autoregressive(vocab_size=12, mask_id=11, bos_id=9)
  assert begun([3, None], here) == [9, 3, None]
  assert begun([9, 3], here) == [9, 3]
  published = dataclasses.replace(here, begins=False)
  assert begun([3, None], published) == [3, None]
  assert begun([None], published) == [9, None]
  assert begun([], published) == [9]


def test_answers_end_at_the_first_of_all_ends():
  template = [9, 3, None, None, None]
  assert answered([9, 3, 1, 7, 8], template, (8, 7)) == [1]
  assert answered([9, 3, 1, 7, 8], template, ()) == [1, 7, 8]
