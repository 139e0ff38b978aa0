"""Presets: what they build, what they refuse, and that memory is bounded."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.types import Process
from dllm_jax.data.numbers import Numbers
from dllm_jax.models.transformer import transformer, TransformerConfig
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.mmada import MMaDA
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.generator import Generator
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Banned, Temperature, TopP
from dllm_jax.sampling.policies.remasking import (
  Cap,
  Conf,
  FlowCorrector,
  ForwardBackward,
  Loop,
  Rescale,
)
from dllm_jax.sampling.policies.revision import MaskPredict
from dllm_jax.sampling.policies.selection import (
  Chance,
  CosinePlan,
  EntropyBound,
  Even,
  Factor,
  Threshold,
  Truncated,
)
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.policies.unmasking import FirstHitting
from dllm_jax.sampling.presets import PRESETS, SamplerConfig
from dllm_jax.sampling.program import generate
from dllm_jax.sampling.requests import build, Requests
from tests import jaxprs, toys
from tests.quick import long
from tests.sampling import published

UNIFORM = ("udlm", "duo", "psi", "diffusion_gemma")


def objective_of(name, vocab=20, length=24):
  tokens = {"vocab_size": vocab, "mask_id": vocab - 1}
  if name in UNIFORM:
    return UDLM(vocab_size=vocab)
  if name == "autoregressive" or name.startswith("idlm"):
    return Autoregressive(**tokens, bos_id=0)
  blocks = {"length": length, "block_size": length // 4}
  if name == "llada2_2":
    return BD3LM(**tokens, **blocks, delete_id=vocab - 2, split_id=vocab - 3)
  if name == "dreamon":
    return Dream(**tokens, expand_id=vocab - 2, delete_id=vocab - 3)
  if name in ("bd3lm", "sdar", "dream_reasoner") or name.startswith("llada2"):
    return BD3LM(**tokens, **blocks)
  if name == "wedlm":
    return BD3LM(**tokens, **blocks, attention="decided_first")
  if name.startswith("fast_dllm_v2"):
    return BD3LM(**tokens, **blocks, opens=True, shift=1)
  if name.startswith("nemotron"):
    kind = {"attention": "causal_context", "opens": True}
    return BD3LM(**tokens, **blocks, **kind)
  if name == "mmada":
    marks = ("begin", "end", "start_image", "end_image", "to_image")
    marks += ("understand", "pad", "reason", "end_header")
    images = ImageVocabulary(
      offset=4, codes=8, tokens=8, **dict.fromkeys(marks, vocab - 2)
    )
    return MMaDA(**tokens, images=images, length=length)
  if name == "remdm_loop":  # Even times: the last step may begin in the loop.
    return LLaDA(**tokens)
  return (Dream if "dream" in name else MDLM)(**tokens)


def network(vocab):
  return transformer(
    TransformerConfig(vocab_size=vocab, width=16, layers=1, heads=2)
  )


def requests_of(rows, length):
  slots = np.arange(length)
  return Requests(
    tokens=np.ones((rows, length), np.int32),
    fixed=np.broadcast_to(slots < 3, (rows, length)),
    valid=np.ones((rows, length), bool),
    request=np.arange(rows, dtype=np.int32),
  )


def abstract_inputs(denoiser, objective, length):
  batch = jax.eval_shape(lambda: objective_batch(1, length))
  inputs = jax.eval_shape(
    lambda batch: objective.inputs(
      Process(), batch.tokens, jnp.ones((1, 1)), batch
    ),
    batch,
  )
  return jax.eval_shape(denoiser.init, jax.random.key(0), inputs)


def objective_batch(rows, length):
  from dllm_jax.core.types import Batch

  ones = np.ones((rows, length), np.int32)
  return Batch(
    tokens=ones, loss_mask=ones > 0, segment_ids=ones, positions=ones
  )


# The quick tests' share: a preset of each policy that no recorded generation has.
FEW = (
  "psi",
  "remdm_loop",
  "mask_predict",
  "llada2_edit",
  "diffusion_gemma",
)


def presets(*others):
  """Returns (a preset's name, *others) as parameters, all but a few long."""
  return [
    (pytest.param if name in FEW else long)(name, *rest)
    for name in PRESETS
    for rest in itertools.product(*(other(name) for other in others))
  ]


def speculates(name):
  return PRESETS[name].policy is Speculation


def caches(name):
  """Returns the caches that a preset can have."""
  objective = objective_of(name)
  one = type(objective) not in (MDLM, Dream) or PRESETS[name].policy.resizes
  if one:  # The others have one cache each.
    return [None]
  policy = (
    SamplerConfig(preset=name, block_length=8)
    .build(objective, length=24)
    .policy
  )
  return ["none", "prefix", "dual"] if policy.forces else [None, "dual"]


@pytest.mark.parametrize(("name", "cache"), presets(caches))
@pytest.mark.few(1)
def test_memory_is_bounded(name, cache):
  """No value has canvas x vocabulary elements a row, guided and cached."""
  rows, length, vocab = 2, 512, 50_000
  objective = objective_of(name, vocab, length)
  masks = objective.mask_id is not None
  blocks = {} if cache in (None, "none") else {"block_length": 32}
  spec = SamplerConfig(
    preset=name,
    cache=cache,
    cfg_scale=0.5 if masks and not speculates(name) else 0.0,
    repetition_penalty=1.0 if speculates(name) else 1.2,
    top_k=50,
    banned="3,4",
    **blocks,
  ).build(objective, length=length, end_ids=(0,))
  denoiser = network(vocab)
  params = abstract_inputs(denoiser, objective, length)
  jaxpr = jax.make_jaxpr(
    lambda params, key, requests: generate(
      spec, denoiser, params, Process(), key, requests
    )
  )(params, jax.random.key(0), requests_of(rows, length))
  # Of two rows, four under guidance, together less than one row's canvas.
  assert not jaxprs.larger_than(jaxpr, length * vocab)
  assert jaxprs.larger_than(jaxpr, 8 * vocab)
  assert not jaxprs.to_the_host(jaxpr)


@pytest.mark.parametrize("name", presets())
@pytest.mark.few(1)
def test_every_preset_fills_the_canvas_in_few_steps(name):
  objective = objective_of(name)
  few = {} if name in ("bd3lm", "autoregressive") else {"steps": 3}
  if speculates(name):
    few = {}  # a round takes as many tokens as it may
  dream = type(objective) is Dream and not PRESETS[name].policy.resizes
  if dream or name in ("fast_dllm", "fast_dllm_factor"):
    few |= {"block_length": 8, "cache": "dual"}  # Dream: a call for one slot.
  spec = SamplerConfig(preset=name, **few).build(objective, length=24)
  denoiser, params = network_of(20)
  rows = [[1, 2, 3] + [None] * n for n in (21, 9)]
  requests = build(rows, objective=objective, length=24)
  out = published.quick(
    spec, denoiser, params, Process(), jax.random.key(0), requests
  )
  tokens, given = np.asarray(out.tokens), requests.fixed | ~requests.valid
  np.testing.assert_array_equal(tokens[given], requests.tokens[given])
  free = tokens[~given]
  assert ((free >= 0) & (free < objective.vocab_size)).all()
  assert objective.mask_id is None or (free != objective.mask_id).all()
  assert (np.asarray(out.function_evaluations) >= 1).all()


@functools.cache
def network_of(vocab):
  denoiser = network(vocab)
  objective = objective_of("mdlm", vocab)
  batch = objective_batch(1, 4)
  t = np.ones((1, 1), np.float32)
  inputs = objective.inputs(Process(), batch.tokens, t, batch)
  return denoiser, jax.jit(denoiser.init)(jax.random.key(0), inputs)


def defaults(name):
  """Returns a preset's sampler, policy, filters and processors."""
  spec = SamplerConfig(preset=name).build(
    objective_of(name, length=128), length=128, end_ids=(0,)
  )
  return spec, spec.policy, spec.policy.filters, spec.policy.processors


@pytest.mark.parametrize(
  ("name", "rule"),
  [
    ("remdm", Cap(eta=0.04)),
    ("remdm_rescale", Rescale(eta=0.04)),
    ("remdm_conf", Conf()),
    ("remdm_loop", Loop(eta=0.02, t_on=0.55, t_off=0.05, alpha_on=0.9)),
    ("forward_backward", ForwardBackward()),
    ("dfm", FlowCorrector(scale=10.0, power=0.25)),
  ],
)
def test_published_defaults_of_remasking(name, rule):
  _, policy, _, processors = defaults(name)
  assert policy.rule == rule and TopP(0.9) in processors


@pytest.mark.parametrize(
  ("name", "score", "selection", "heat"),
  [
    ("llada", "confidence", Even(), 0.0),
    ("llada_random", "random", Even(), 0.0),
    ("dream", "entropy", Truncated(), 0.2),
    ("dream_margin", "margin", Truncated(), 0.0),
    ("dream_origin", "random", Chance(), 0.0),
    ("maskgit_plus", "confidence", Truncated(), 0.0),
    ("maskgit", "confidence", CosinePlan(), 1.0),
    ("fast_dllm", "confidence", Threshold(value=0.9), 0.0),
    ("fast_dllm_factor", "confidence", Factor(value=1.0), 0.0),
    ("entropy_bound", "entropy", EntropyBound(value=0.1), 0.0),
    ("sdar", "confidence", Threshold(value=0.85, least=Even(of="window")), 1.0),
    ("llada2", "confidence", Threshold(value=0.95, least=Even(of="window")), 0.0),
  ],
)  # fmt: skip
def test_published_defaults_by_confidence(name, score, selection, heat):
  _, policy, filters, processors = defaults(name)
  assert (policy.score, policy.selection) == (score, selection)
  heats = [
    p.value for p in (*filters, *processors) if isinstance(p, Temperature)
  ]
  assert heats == [heat] or (heat == 1.0 and not heats)


def test_published_defaults_of_the_rest():
  spec, *_ = defaults("fast_dllm")
  assert (spec.block_length, spec.cache, spec.refresh) == (32, "dual", 0)
  assert TopP(0.95) in defaults("dream")[2]
  bd3lm, policy, _, processors = defaults("bd3lm")
  assert isinstance(policy, FirstHitting) and TopP(0.9) in processors
  assert (bd3lm.cache, bd3lm.end_ids) == ("block", (0,))
  edit = defaults("llada2_edit")[1].revision
  assert (edit.threshold, edit.extra, edit.always) == (0.9, 16, False)
  gemma = defaults("diffusion_gemma")[1]
  assert (gemma.steps, gemma.hot, gemma.cold, gemma.bound) == (
    48,
    0.8,
    0.4,
    0.1,
  )
  for name in ("mdlm", "sedd", "udlm", "duo", "md4", "uniform_grid"):
    assert isinstance(defaults(name)[1], Ancestral)
  assert defaults("md4")[1].spacing == "cosine"
  assert isinstance(defaults("mask_predict")[1].revision, MaskPredict)
  assert defaults("psi")[1].kappa == 0.95


def refuses(message, *, name="llada", length=24, **fields):
  with pytest.raises(ValueError, match=message) as caught:
    SamplerConfig(preset=name, **fields).build(
      objective_of(name), length=length
    )
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("field", ["threshold", "factor", "entropy_bound"])
def test_another_rule_fills_the_same_parts(cached, field):
  name = "fast_dllm_v2" + "_cached" * cached
  fields = {field: 0.7, "block_length": 8, "preset": name}
  built = SamplerConfig(**fields).build(
    objective_of(name, length=32), length=32
  )
  parts = built.policy.selection
  assert (parts.width, parts.cached, parts.rule.value) == (8, cached, 0.7)
  assert parts.entropy == (field == "entropy_bound")
  # Rows may have thresholds of their own, and fewer steps if calls see all parts.
  defaults = SamplerConfig(**fields).options()
  assert defaults.threshold == (0.7 if field == "threshold" else None)
  assert (built.row_steps is None) == cached


def test_what_is_refused_before_compilation():
  refuses("block_length 7 does not divide the canvas of 24", block_length=7)
  refuses("block_length 32 does not divide the canvas of 24", name="fast_dllm")
  refuses("steps 25 is more than the 24 slots", steps=25)
  refuses("at least 6 steps, one a slot, .* not 5", name="bd3lm", steps=5)
  refuses(
    "at least 2 steps", name="dream", steps=1, cache="dual", block_length=8
  )
  for threshold in (0.0, -1.0, 1.5):
    refuses(r"threshold must lie in \(0, 1\]", threshold=threshold)
  refuses("factor must be above 0", factor=0.0)
  refuses("legal: none, prefix, dual, block", cache="paged")
  refuses("'block' needs a block-causal", cache="block", block_length=8)
  refuses("'dual' needs a block_length", cache="dual")
  refuses("use cache 'block'", name="sdar", cache="dual")
  refuses("legal: mdlm, md4", name="nothing")
  refuses(
    "threshold means nothing to .* 'mdlm'; legal", name="mdlm", threshold=0.5
  )
  refuses("eta means nothing to .* 'remdm_conf'", name="remdm_conf", eta=0.1)
  refuses("two rules", threshold=0.5, factor=1.0)
  refuses("guidance scale must be 0", cfg_scale=-1.0)
  refuses("has no mask token: use class", name="udlm", cfg_scale=1.0)
  refuses("separated by commas", banned="a")
  refuses(r"banned has token 20, outside the vocabulary \[0, 20\)", banned="20")
  refuses("forced has token -1, outside", forced="-1")
  refuses("doubted means nothing to .* 'mdlm'", name="mdlm", doubted="5")
  refuses("doubt_end means nothing", name="dream_origin", doubt_end=True)
  refuses("need a tokenizer with an end", doubt_end=True)
  refuses("refresh is for caches", refresh=2)
  refuses("repetition penalty", repetition_penalty=0.0)
  refuses("context must lie in", context=99)
  refuses("reach is for cache 'prefix'", block_length=8, reach=8)
  refuses("end of text", stop=True)
  refuses("top_p must lie in", top_p=0.0)


def test_no_cache_is_chosen_that_would_be_refused():
  build = lambda name, **fields: SamplerConfig(preset=name, **fields).build(
    objective_of(name), length=24
  )
  assert build("llada", block_length=1).cache == "none"
  assert build("autoregressive").cache == "block"
  assert build("sdar").cache == "block"
  as_masked = SamplerConfig(preset="sdar", block_length=8)
  assert as_masked.build(objective_of("llada"), length=24).cache == "none"


def test_class_guidance_without_labels_is_refused():
  objective, (denoiser, params) = objective_of("llada"), network_of(20)
  spec = SamplerConfig(preset="llada", cfg_scale=1.0, null_label=3).build(
    objective, length=24
  )
  args = params, Process(), jax.random.key(0), requests_of(1, 24)
  with pytest.raises(ValueError, match="needs a label for each request"):
    generate(spec, denoiser, *args)


def test_a_cache_that_the_network_lacks_is_refused():
  objective = objective_of("llada")
  spec = SamplerConfig(preset="fast_dllm", block_length=8).build(
    objective, length=24
  )
  denoiser, params = network_of(20)
  bare = denoiser._replace(cache=None)
  with pytest.raises(ValueError, match="keeps no keys and values"):
    generate(
      spec, bare, params, Process(), jax.random.key(0), requests_of(1, 24)
    )
  with pytest.raises(ValueError, match="batch of requests is empty"):
    generate(
      spec, denoiser, params, Process(), jax.random.key(0), requests_of(0, 24)
    )


@pytest.mark.all
def test_a_row_goes_on_with_the_end_that_it_drew():
  tokenizer = Numbers(vocab_size=9, mask_id=8, end_ids=(0, 3))
  denoiser = toys.mixer(9, 4)
  generator = Generator(
    MDLM(vocab_size=9, mask_id=8),
    denoiser,
    tokenizer,
    mesh=make_mesh(devices=jax.devices()[:1]),
  )
  config = SamplerConfig(preset="llada", forced="3", stop=True, block_length=4)
  plan = generator.plan([[1, *[None] * 7]], length=8, sampler=config)
  params = jax.jit(denoiser.init)(jax.random.key(0), None)
  sampled = generator(params, Process(), plan, seed=0)
  assert sampled.generation.tokens.tolist() == [[1, *[3] * 7]]
  assert sampled.rows == [[1]]  # Neither is a part of the text.


# What no token satisfies is refused before anything is sampled; that whatever is
# legal leaves no mask is for `policies/test_settings.py`.
@pytest.mark.parametrize(
  "fields",
  [
    {"banned": "5", "forced": "5"},
    {"banned": "0,1,2,3,4,5,6,7"},
    {"forced": "8"},  # the mask
    {"forced": "0", "suppress_end": True},
    {"forced": "0,8", "banned": "0+8"},
    {"banned": "1;2 3,4", "forced": "1,2,3,4", "suppress_end": True},
  ],
  ids=str,
)
def test_what_leaves_no_token_is_refused(fields):
  config = SamplerConfig(preset="llada", **fields)
  objective = MDLM(vocab_size=9, mask_id=8)
  with pytest.raises(ValueError, match="no token is left to draw"):
    config.build(objective, length=8, end_ids=(0,))
  assert SamplerConfig(preset="llada", banned="5", forced="5,6").build(
    objective, length=8
  )


# ML-GSAI/LLaDA issue 137: `confidence_eos_eot_inf` covered one of two ends. The
# ends are drawn as any token, and revealed last.
def test_doubted_ends_come_last():
  config = SamplerConfig(preset="llada", doubt_end=True)
  policy = config.build(
    MDLM(vocab_size=9, mask_id=8), length=8, end_ids=(6, 3)
  ).policy
  assert [p.tokens for p in policy.doubts] == [(6, 3)]
  assert not any(isinstance(p, Banned) for p in policy.filters)
  ids = SamplerConfig(preset="llada", doubted="6+3")
  same = ids.build(MDLM(vocab_size=9, mask_id=8), length=8).policy
  assert same.doubts == policy.doubts
  with pytest.raises(ValueError, match="need a tokenizer with an end"):
    config.build(MDLM(vocab_size=9, mask_id=8), length=8)
  with pytest.raises(ValueError, match="doubt_end means nothing to"):
    SamplerConfig(preset="mdlm", doubt_end=True)
