"""DiffusionGemma's sampler: every call of transformers' recorded generations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Full
from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import Denoiser, Process
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma
from dllm_jax.sampling.policies.renoising import Renoise
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from tests import golden_cases, quick
from tests.sampling import published

NAME = "diffusion_gemma_generate"


def case():
  return golden_cases.load(NAME)


class Record:
  """A recorded generation as our rows count it."""

  def __init__(self, i: int):
    run = case().config["runs"][i]
    self.options, self.right = run["options"], run["padding"] == "right"
    prefix = f"run{i}_"
    self.arrays = {
      name.removeprefix(prefix): x
      for name, x in case().arrays.items()
      if name.startswith(prefix)
    }
    self.vocab = case().config["hf_config"]["text_config"]["vocab_size"]
    self.prompt = self.arrays["prompt"]
    ones = np.ones_like(self.prompt)
    self.mask = self.arrays.get("attention_mask", ones)
    self.width = case().config["hf_config"]["canvas_length"]
    self.canvases = len(self.arrays["init_canvas"])
    # A row that ends goes on with garbage where no padding is named: the batch's
    # last row decides how long. Then all canvases are sampled here.
    pads = self.options.get("pad_token_id") is not None
    ends = self.options.get("eos_token_id", [])
    self.ends = tuple(ends) if pads else ()
    self.calls = [self._calls(b) for b in range(len(self.prompt))]

  def _calls(self, b: int) -> list[int]:
    """Returns the recorded calls in which a row took part."""
    index, finished = self.arrays["canvas_index"], self.arrays["finished"]
    output = self.arrays["output"][b, self.prompt.shape[1] :]
    calls = []
    for call, k in enumerate(index):
      before = output[: k * self.width]
      over = np.isin(before, self.ends).any()
      first = call == 0 or index[call - 1] != k
      if not over and (first or not finished[call - 1, b]):
        calls.append(call)
    return calls

  @property
  def starts(self) -> np.ndarray:
    """Returns the slot of each row's first canvas: ours have no left padding."""
    wide = np.full(len(self.prompt), self.prompt.shape[1])
    return wide if self.right else self.mask.sum(axis=1)

  def requests(self) -> Requests:
    """Returns the rows; right padding is given, and hidden."""
    starts, new = self.starts, self.canvases * self.width
    length = starts.max() + new
    slots = np.arange(length)
    tokens = np.zeros((len(starts), length), np.int32)
    valid = slots < (starts + new)[:, None]
    for b, start in enumerate(starts):
      tokens[b, :start] = self.prompt[b, -start:]
      if self.right:
        valid[b, :start] = self.mask[b] > 0
    return Requests(
      tokens=tokens,
      fixed=slots < starts[:, None],
      valid=valid,
      request=np.arange(len(starts), dtype=np.int32),
    )

  def noise(self, step, slots) -> Recorded:
    """Returns the recorded uniforms of each row's own step."""
    most = max(map(len, self.calls))
    table = np.array([c + [c[-1]] * (most - len(c)) for c in self.calls])
    rows = jnp.arange(len(table))[:, None]
    call = jnp.asarray(table)[rows, jnp.minimum(step, most - 1)[:, None]]
    at = slots - self.starts[:, None]
    place = at % self.width
    canvas = jnp.clip(at // self.width, 0, self.canvases - 1)
    first = jnp.asarray(self.arrays["init_uniform"])
    if "start" in self.arrays:  # a caller's canvas, as draws that give it
      given = (self.arrays["start"] + 0.5) / self.vocab
      first = first.at[0].set(given)
    pick = lambda name: jnp.asarray(self.arrays[name])[call, rows, place]
    prior = first[canvas, rows, place]
    return Recorded({
      Tag.TOKEN: pick("token_uniform"),
      Tag.REMASK: pick("renoise_uniform")[..., None],
      Tag.PRIOR: jnp.stack([prior, prior], axis=-1),
    })

  def sampler(self) -> Sampler:
    """Returns the sampler with the run's options."""
    options = self.options
    objective = DiffusionGemma(vocab_size=self.vocab, canvas=self.width)
    policy = Renoise(
      objective=objective,
      steps=options["max_denoising_steps"],
      hot=options["t_max"],
      cold=options["t_min"],
      bound=options["entropy_bound"],
      stable=options["stability_threshold"],
      rest=options["confidence_threshold"],
    )
    return Sampler(
      policy=policy,
      length=self.requests().tokens.shape[1],
      block_length=self.width,
      cache="block",
      end_ids=self.ends,
      fill_id=options.get("pad_token_id"),
    )


def begun(denoiser: Denoiser, start, logits) -> Denoiser:
  """Returns a network that a caller told what it last said of a first canvas."""

  def apply(params, inputs, cache):
    if inputs.mask == Full() and inputs.self_conditioning is not None:
      table = denoiser.apply(params, inputs, cache)[0].unembed
      said = (
        jax.nn.softmax(jnp.asarray(logits)) @ table[:, : logits.shape[-1]].T
      )
      first = jnp.all(inputs.latent == start) & jnp.all(
        inputs.self_conditioning == 0
      )
      said = jnp.where(first, said, inputs.self_conditioning)
      inputs = inputs.replace(self_conditioning=said)
    return denoiser.apply(params, inputs, cache)

  return denoiser._replace(apply=apply)


@functools.cache
def generated(i: int):
  record, model = Record(i), published.model(NAME)
  denoiser = model.denoiser
  if "start" in record.arrays:
    denoiser = begun(
      denoiser, record.arrays["start"], record.arrays["start_sc_logits"]
    )
  args = model.params, Process(), jax.random.key(0), record.requests()
  made = published.quick(
    record.sampler(), denoiser, *args, trace=True, noise=record.noise
  )
  return record, made


@pytest.mark.parametrize("i", [quick.long(i) for i in range(10)])
def test_every_call_of_recorded_generations(i):
  record, made = generated(i)
  a, frames = record.arrays, made.trace.frames
  for b, start in enumerate(record.starts):
    calls, ran = record.calls[b], np.flatnonzero(frames.ran[:, b])
    assert len(ran) == len(calls)
    for call, frame in zip(calls, ran, strict=True):
      k = a["canvas_index"][call]
      here = slice(start + k * record.width, start + (k + 1) * record.width)
      last = call == calls[-1] or a["canvas_index"][call + 1] != k
      last |= bool(a["finished"][call, b])
      want = a["argmax" if last else "next_canvas"][call, b]
      np.testing.assert_array_equal(frames.tokens[frame, b, here], want)
      if "logits" in a:
        logits = a["logits"][call, b] / a["temperature"][call]
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        taken = a["argmax" if last else "sampled"][call, b]
        sure = np.take_along_axis(p, taken[:, None], axis=1)[:, 0]
        found = frames.confidence[frame, b, here]
        np.testing.assert_allclose(found, sure, atol=5e-4)
    new = slice(start, start + record.canvases * record.width)
    output = a["output"][b, record.prompt.shape[1] :]
    np.testing.assert_array_equal(made.tokens[b, new], output)
    # The reading of the prompt and of each canvas that another follows.
    reads = 1 + a["canvas_index"][calls[-1]]
    assert made.function_evaluations[b] == len(calls) + reads
    pad = record.options.get("pad_token_id")
    real = np.sum(output != pad) if pad is not None else output.size
    # Calls after an end are not counted there, with or without padding.
    ends = record.options.get("eos_token_id", [])
    before = lambda call: output[: a["canvas_index"][call] * record.width]
    counted = [call for call in calls if not np.isin(before(call), ends).any()]
    np.testing.assert_allclose(
      real / len(counted), a["tokens_per_forward"][b], rtol=1e-6
    )


@pytest.mark.all
def test_alone_equals_batched_equals_padded():
  """A row's tokens are its own, in any batch and on any canvas."""
  record, made = generated(1)
  model, sampler = published.model(NAME), record.sampler()
  sampler = dataclasses.replace(sampler, length=sampler.length + 5)
  whole = record.requests()
  wider = lambda x: np.pad(x, [(0, 0), (0, 5)])
  for b in range(len(record.prompt)):
    one = Record(1)
    one.calls, one.prompt, one.mask = (
      x[b : b + 1] for x in (record.calls, record.prompt, record.mask)
    )
    batched = ("init_uniform", "token_uniform", "renoise_uniform")
    one.arrays = record.arrays | {
      name: record.arrays[name][:, b : b + 1] for name in batched
    }
    row = jax.tree.map(lambda x: x[b : b + 1], whole)
    row = row.replace(
      tokens=wider(row.tokens), fixed=wider(row.fixed), valid=wider(row.valid)
    )
    args = model.params, Process(), jax.random.key(0), row
    alone = published.quick(sampler, model.denoiser, *args, noise=one.noise)
    used = np.flatnonzero(row.valid[0])
    np.testing.assert_array_equal(alone.tokens[0, used], made.tokens[b, used])
