"""Self-speculation: the autoregressive text, or law, in fewer calls."""

import functools

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Causal
from dllm_jax.core.noise import Keyed, Tag
from dllm_jax.core.types import ModelInputs, ModelOutputs, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import (
  compose,
  Temperature,
  TopK,
  TopP,
)
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.sampler import Sampler
from tests import golden_cases, quick
from tests.sampling import published

IDLM = golden_cases.load("idlm").config["runs"]


def speculate(name, prompt, count, *, noise=None, end_ids=(), **fields):
  """Returns a generation of `count` tokens behind a prompt."""
  objective = published.model(name).objective
  return published.run(
    name,
    [prompt + [None] * count],
    policy=lambda objective: Speculation(objective=objective, **fields),
    block_length=objective.block_length,
    cache="block",
    noise=noise,
    end_ids=end_ids,
  )


@struct.dataclass
class Recorded:
  """What the original drew, by each row's own round and slot."""

  uniforms: jax.Array
  instead: jax.Array
  fresh: jax.Array

  def uniform(self, tag, n=1):
    assert tag == Tag.TRANSFER
    return self.uniforms[..., None]

  def categorical(self, tag, logits):
    return self.instead if tag == Tag.RESIDUAL else self.fresh


def recorded(arrays, rounds, length):
  """Returns what a sampled run drew: `(step, slots) -> noise`.

  Round 0 of ours has the first token, which theirs draws with the prompt.
  """
  u = np.full((rounds + 1, length + 8), 0.5, np.float32)
  instead = np.zeros((rounds + 1, length + 8), np.int32)
  fresh = np.zeros((rounds + 1, length + 8), np.int32)
  fresh[0] = arrays["run4_emitted"][0, 0]
  verified = 0
  for r in range(rounds):
    start = arrays["run4_start"][r] + 1
    fresh[r + 1] = arrays["run4_clean_sampled"][r]
    if arrays["run4_verify_round"][r]:
      n = arrays["run4_verify_uniform"].shape[1]
      u[r + 1, start : start + n] = arrays["run4_verify_uniform"][verified]
      instead[r + 1, start : start + n] = arrays["run4_verify_corrected"][
        verified
      ]
      verified += 1

  def at(step, slots):
    step = jnp.minimum(step, rounds)[:, None]
    slots = jnp.minimum(slots, length + 7)
    return Recorded(*(jnp.asarray(x)[step, slots] for x in (u, instead, fresh)))

  return at


@pytest.mark.parametrize("i", quick.few([0, 1, 4], lambda i: {i} & {1}))
@pytest.mark.all
def test_idlm_every_round_as_published(i):
  arrays, run = golden_cases.load("idlm").arrays, IDLM[i]
  (prompt,) = published.prompts(arrays[f"run{i}_prompt"])
  start, advance = arrays[f"run{i}_start"], arrays[f"run{i}_advance"]
  length = len(prompt) + run["max_new_tokens"]
  noise = None
  processors = (Temperature(run["temperature"]),)
  if run["temperature"]:
    noise = recorded(arrays, len(start), length)
    processors += (TopK(run["top_k"]), TopP(run["top_p"]))
  got = speculate(
    "idlm",
    prompt,
    run["max_new_tokens"],
    drafts=run["gen_block_size"] - 1,
    rule="published",
    processors=processors,
    noise=noise,
  )
  text = got.tokens[0][len(prompt) :]
  output = arrays[f"run{i}_output"][: len(text)]
  np.testing.assert_array_equal(text, output)
  rounds = np.zeros(length, int)
  for r, (at, count) in enumerate(zip(start, advance, strict=True)):
    rounds[at + 1 : at + 1 + count] = r + 1
  np.testing.assert_array_equal(
    got.revealed_at[0][len(prompt) :], rounds[len(prompt) :]
  )
  if i < 2:
    np.testing.assert_array_equal(text, arrays[f"autoregressive_{i}"])


def nemotron(**run):
  runs = golden_cases.load("nemotron").config["runs"]
  return [i for i, one in enumerate(runs) if run.items() <= one.items()]


@pytest.mark.parametrize(
  "i", [*map(quick.long, nemotron(method="linear_spec_generate"))]
)
def test_nemotron_drafts_both_ways_and_tests_causally(i):
  case = golden_cases.load("nemotron")
  run, arrays = case.config["runs"][i], case.arrays
  (prompt,) = published.prompts(arrays[f"run{i}_prompt"])
  end = run.get("eos_token_id")
  got = speculate(
    "nemotron",
    prompt,
    run["max_new_tokens"],
    source="block",
    rule="best",
    drafts=run["block_length"] - 1,
    threshold=run["threshold"] or None,
    processors=(Temperature(0.0),),
    end_ids=(end,) if end is not None else (),
  )
  # Theirs may go on past the end, and has its first token from the prompt.
  output = arrays[f"run{i}_output"][0][: got.tokens.shape[1]]
  np.testing.assert_array_equal(got.tokens[0][: len(output)], output)
  if end is None:
    assert_same_rounds(arrays, i, got.revealed_at[0], len(prompt))


def assert_same_rounds(arrays, i, revealed_at, prompt):
  """Checks that rounds from the same token take as many as recorded.

  Ours begin a token earlier: theirs has its first one from the prompt.
  """
  ours = {}
  for r in range(revealed_at.max() + 1):
    slots = np.flatnonzero(revealed_at == r)
    ours[int(slots[0]) - 1] = len(slots)
  at, shared = prompt, 0
  for moved in arrays[f"run{i}_accepted"]:
    if at in ours and at + moved < len(revealed_at):
      assert ours[at] == moved
      shared += 1
    at += int(moved)
  assert shared > len(ours) // 2


def first_law(rule, p, q, count, processors=()):
  """Returns which token comes first where drafts of law q are tested.

  Args:
    rule: how drafts are made and tested.
    p: the law of the token.
    q: that of its draft.
    count: how often.
    processors: of the policy.
  """
  size = len(p)
  objective = Autoregressive(vocab_size=size + 1, mask_id=size)
  policy = Speculation(
    objective=objective, drafts=1, rule=rule, processors=processors
  )
  one = lambda law: ModelOutputs(
    hidden=jnp.broadcast_to(
      jnp.log(jnp.append(law, 1e-30)), (count, 1, size + 1)
    )
  )
  request = jnp.arange(count)
  noise = lambda step, slot: Keyed.at(
    jax.random.key(0),
    request=request,
    step=jnp.full((count,), step),
    position=slot + jnp.zeros((count, 1), jnp.int32),
  )
  masks = jnp.full((count, 1), size)
  drafts, _ = policy.draft(noise(0, 7), one(q), masks)
  pad = lambda x: jnp.concatenate([x, x], axis=1)
  twice = lambda law: one(law).replace(hidden=pad(one(law).hidden))
  both = noise(1, jnp.arange(7, 9)[None])
  tested = policy.test(
    both, twice(p), twice(q), pad(drafts), jnp.ones((count,), jnp.int32)
  )
  return tested.tokens[:, 0]


def first_counts(rule, p, q, count, **fields):
  """Returns the counts of `first_law`."""
  size = len(p)
  program = jax.jit(functools.partial(first_law, rule, count=count, **fields))
  token = np.asarray(program(p, q))
  return np.bincount(token, minlength=size + 1)[:size]


def chi_square(counts, law):
  """Returns how far counts are from a law, in deviations of chi-square."""
  expected = counts.sum() * law
  some = expected > 5
  terms = ((counts - expected) ** 2 / np.maximum(expected, 1e-9))[some]
  freedom = max(some.sum() - 1, 1)
  return (terms.sum() - freedom) / np.sqrt(2 * freedom)


@pytest.mark.all
def test_which_rule_has_the_autoregressive_law():
  arrays = golden_cases.load("idlm").arrays
  gap = np.abs(arrays["law_published"] - arrays["run4_verify_p"][:, 0]).max(1)
  row = int(np.argmax(gap))
  p = arrays["run4_verify_p"][row, 0].astype(np.float64)
  q = arrays["run4_verify_q"][row, 0].astype(np.float64)
  p, q = p / p.sum(), q / q.sum()
  published_law = arrays["law_published"][row].astype(np.float64)
  published_law /= published_law.sum()
  count = 4000
  for rule in ("drawn", "best"):
    counts = first_counts(rule, p, q, count)
    assert chi_square(counts, p) < 5, rule
  counts = first_counts("published", p, q, count)
  assert chi_square(counts, p) > 50
  assert chi_square(counts, published_law) < 5


@functools.cache
def tiny():
  """A causal network over four tokens and a mask, and its parameters."""
  network = transformer(
    TransformerConfig(vocab_size=5, width=16, layers=1, heads=2, mlp_dim=16)
  )
  ones = jnp.ones((1, 1), jnp.int32)
  inputs = ModelInputs(latent=ones, positions=ones, segment_ids=ones)
  params = network.init(jax.random.key(1), inputs)
  return network, jax.tree.map(lambda x: 6.0 * x if x.ndim > 1 else x, params)


def law_of_texts(processors, template):
  """Returns how likely each filling of a template's three slots is."""
  network, params = tiny()
  free = np.flatnonzero([token is None for token in template])
  texts = np.tile([token or 0 for token in template], (64, 1))
  fill = np.meshgrid(*[range(4)] * 3, indexing="ij")
  texts[:, free] = np.stack(fill, -1).reshape(-1, 3)
  seen = jnp.asarray(texts[:, :-1], jnp.int32)
  at = jnp.broadcast_to(jnp.arange(seen.shape[1]), seen.shape)
  inputs = ModelInputs(
    latent=seen, positions=at, segment_ids=jnp.ones_like(at), mask=Causal()
  )
  logits = reduce(lambda x: x, network.apply(params, inputs, None)[0])
  logits = jnp.where(jnp.arange(5) == 4, -jnp.inf, logits)
  log_p = jax.nn.log_softmax(compose(processors, logits, None))
  picked = jnp.take_along_axis(
    log_p, jnp.asarray(texts[:, 1:])[..., None], axis=-1
  )
  return np.exp(np.asarray(picked[:, free - 1, 0].sum(1), np.float64))


TEMPLATES = [0, None, None, None], [0, None, None, 1, None]
"""A prompt, and one with a token that is given behind it."""


@pytest.mark.parametrize("template", TEMPLATES, ids=["prompt", "given"])
@pytest.mark.parametrize(
  "fields",
  [
    quick.long({"drafts": 2}),
    quick.long({"drafts": 2, "rule": "best"}),
    quick.long({"drafts": 2, "source": "quadratic"}),
    quick.long({"drafts": 2, "source": "quadratic", "rule": "best"}),
    quick.long({"drafts": 2, "source": "block"}),
    quick.long({"drafts": 2, "source": "block", "rule": "best"}),
    quick.long({
      "drafts": 2,
      "source": "block",
      "rule": "best",
      "threshold": 0.5,
    }),
  ],
  ids=str,
)
def test_texts_have_the_autoregressive_law(fields, template):
  got, deviation = texts(template, **fields)
  assert deviation < 5
  # Some drafts are taken: fewer calls than tokens, two calls a round or one.
  a_round = 2 if fields.get("source") == "block" else 1
  assert (
    got.function_evaluations < len(template) * a_round - a_round + 1
  ).any()


@pytest.mark.parametrize("template", TEMPLATES, ids=["prompt", "given"])
@pytest.mark.all
def test_so_many_texts_tell_another_law(template):
  """The published rule's, which has texts, too, that are impossible."""
  _, deviation = texts(template, drafts=2, rule="published")
  assert deviation > 50


def texts(template, **fields):
  """Returns fillings of a template and how far they are from their law.

  Infinitely far if one of them is impossible. So many that a test of drafts by
  (p / q)^0.9 would show.
  """
  processors = (Temperature(0.8), TopK(3))
  objective = Autoregressive(vocab_size=5, mask_id=4)
  network, params = tiny()
  sampler = Sampler(
    policy=Speculation(objective=objective, processors=processors, **fields),
    length=len(template),
    block_length=1,
    cache="block",
  )
  requests = build(
    [template] * 20_000, objective=objective, length=len(template)
  )
  got = published.quick(
    sampler, network, params, Process(), jax.random.key(0), requests
  )
  free = np.flatnonzero([token is None for token in template])
  assert (got.tokens[:, 3] == 1).all() or template[3] is None
  index = got.tokens[:, free] @ np.array([16, 4, 1])
  counts = np.bincount(index, minlength=64)
  law = law_of_texts(processors, template)
  assert abs(law.sum() - 1) < 1e-5
  possible = counts[law < 1e-9].sum() == 0
  return got, chi_square(counts, law) if possible else np.inf


@pytest.mark.parametrize(
  "fields",
  [
    quick.long({"drafts": 3}),
    {"drafts": 3, "source": "quadratic"},
    quick.long({"drafts": 3, "source": "block", "rule": "best"}),
    quick.long({
      "drafts": 2,
      "source": "block",
      "rule": "best",
      "threshold": 0.5,
    }),
  ],
  ids=str,
)
def test_what_is_given_behind_a_prompt_is_kept_and_read(fields):
  objective = Autoregressive(vocab_size=5, mask_id=4)
  network, params = tiny()
  one = {"objective": objective, "processors": (Temperature(0.0),)}
  rows = [
    [0, None, None, 1, None, 3, 3, None, None, None, 2, None],
    [2, None, None, None, 0, 1, 2, 3, 0, 1, 2, None],
    [1, 1, None, None, None, None, None, None, None, 3],
  ]
  requests = build(rows, objective=objective, length=12)
  args = network, params, Process(), jax.random.key(0), requests
  wide = {"length": 12, "block_length": 1, "cache": "block"}
  policies = Speculation(**one, **fields), Ancestral(**one, steps=1)
  drafted, plain = (
    published.quick(Sampler(policy=policy, **wide), *args)
    for policy in policies
  )
  np.testing.assert_array_equal(drafted.tokens, plain.tokens)
  taken = drafted.revealed_at >= 0
  np.testing.assert_array_equal(taken, requests.valid & ~requests.fixed)


@pytest.mark.parametrize("source", ["quadratic", quick.long("masks")])
def test_drafts_are_those_of_masks_behind_what_was_taken(source):
  """Rounds are those of uncached calls on a text, and masks from its last token.

  Up to the canvas's end, behind which masks are read, too, also of a canvas that
  has as many slots as a call.
  """
  objective = Autoregressive(vocab_size=5, mask_id=4)
  network, params = tiny()
  one = {"objective": objective, "processors": (Temperature(0.0),)}
  n, rows = 3, 4
  policy = Speculation(**one, source=source, drafts=n)
  length = policy.width if source == "quadratic" else 24
  sampler = Sampler(policy=policy, length=length, block_length=1, cache="block")
  requests = build(
    [[i, i] + [None] * (length - 2) for i in range(rows)],
    objective=objective,
    length=length,
  )
  got = published.quick(
    sampler, network, params, Process(), jax.random.key(0), requests
  )
  slots = np.arange(length + n)
  wins = 0
  for text, revealed_at in zip(got.tokens, got.revealed_at, strict=True):
    padded = np.pad(text, (0, n))
    masked = (slots >= slots[:length, None]) & (
      slots < slots[:length, None] + n
    )
    inputs = ModelInputs(
      latent=jnp.where(masked, 4, padded),
      positions=jnp.broadcast_to(slots, masked.shape),
      segment_ids=jnp.asarray(slots < slots[:length, None] + n, jnp.int32),
      mask=Causal(),
    )
    logits = reduce(lambda x: x, network.apply(params, inputs, None)[0])
    best = np.argmax(np.asarray(logits)[..., :4], axis=-1)
    expected, at, drafts, r = np.full(length, -1), 1, False, 0
    while at < length - 1:
      right = best[at, at : at + n] == padded[at + 1 : at + 1 + n]
      right &= np.arange(at + 1, at + 1 + n) < length
      taken = int(np.cumprod(right).sum()) if drafts else 0
      expected[at + 1 : at + 2 + taken] = r
      wins += taken
      drafts = source == "quadratic" or not drafts or taken == n
      at, r = at + 1 + taken, r + 1
    np.testing.assert_array_equal(revealed_at, expected)
  assert 0 < wins < rows * length


@pytest.mark.parametrize(
  "fields",
  [
    {"threshold": 0.5},
    {"source": "block", "threshold": 0.5},
    {"rule": "greedy"},
    {"drafts": -1},
    {"source": "elsewhere"},
    {"source": "quadratic", "rule": "published"},
  ],
  ids=str,
)
def test_what_cannot_be_drafted_is_refused(fields):
  objective = Autoregressive(vocab_size=5, mask_id=4)
  with pytest.raises(ValueError, match=r"source|rule|drafts"):
    Speculation(objective=objective, **fields)
  with pytest.raises(ValueError, match="the law of the next token"):
    Speculation(objective=MDLM(vocab_size=5, mask_id=4))
