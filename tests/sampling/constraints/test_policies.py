"""Every policy keeps its text in the language, in any order, on any canvas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.udlm import UDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Temperature, TopK
from dllm_jax.sampling.policies.remasking import Cap, ReMDM
from dllm_jax.sampling.policies.renoising import Psi, Renoise
from dllm_jax.sampling.policies.revision import Edit, MaskPredict
from dllm_jax.sampling.policies.selection import (
  EntropyBound,
  Everything,
  Threshold,
)
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.policies.unmasking import FirstHitting, Unmasking
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.sampler import Sampler
from tests.quick import long
from tests.sampling.constraints import tiny

M, PATTERN = tiny.M, "(ab)+b?"
GREEDY = (Temperature(0.0),)
POLICIES = {
  "ancestral": Ancestral(objective=M, steps=3),
  "first_hitting": FirstHitting(objective=M, steps=4),
  "confidence": Unmasking(objective=M, steps=4),
  "greedy": Unmasking(objective=M, steps=2, processors=GREEDY),
  "left": Unmasking(objective=M, steps=4, score="left"),
  "margin": Unmasking(objective=M, steps=4, score="margin"),
  "entropy_bound": Unmasking(
    objective=M, steps=4, score="entropy", selection=EntropyBound(value=0.5)
  ),
  "threshold": Unmasking(objective=M, steps=4, selection=Threshold(value=0.4)),
  "best_alone": Unmasking(objective=M, steps=4, processors=(TopK(1),)),
  "mask_predict": Unmasking(
    objective=M, steps=4, selection=Everything(), revision=MaskPredict()
  ),
  "edit": Unmasking(
    objective=M, steps=4, revision=Edit(threshold=0.1, extra=3, always=True)
  ),
  "remdm": ReMDM(objective=M, steps=6, rule=Cap(eta=0.3)),
  "psi": Psi(objective=M, steps=6, kappa=0.5),
}
QUICK = ()
MIXED = [PATTERN, None, "a|b", "[ab]*b", PATTERN, None]


def batch(rows=60):
  patterns = list(itertools.islice(itertools.cycle(MIXED), rows))
  return patterns, tiny.requests(patterns)


@pytest.mark.parametrize(
  "name", [name if name in QUICK else long(name) for name in POLICIES]
)
def test_texts_are_in_the_language_of_their_row(name):
  patterns, requests = batch()
  out = tiny.sample(POLICIES[name], requests)
  free = tiny.sample(POLICIES[name], requests.replace(languages=None))
  for i, pattern in enumerate(patterns):
    tokens = out.tokens[i].tolist()
    assert tiny.MASK not in tokens
    if pattern is None:  # as if no other row had a language
      assert tokens == free.tokens[i].tolist()
    else:
      assert tiny.accepts(pattern, tokens), (pattern, tokens)


@pytest.mark.all
@pytest.mark.parametrize("name", ["ancestral", "greedy", "first_hitting"])
@pytest.mark.parametrize("block", [1, 2])
def test_blocks_hand_their_states_on(name, block):
  patterns = ["(ab){2}b", PATTERN, "a?b?a?b?", "[ab]{4}"] * 8
  policy = POLICIES[name]
  out = tiny.sample(
    policy.__class__(**vars(policy) | {"steps": max(block, 2)}),
    tiny.requests(patterns),
    block_length=block,
  )
  for pattern, tokens in zip(patterns, out.tokens.tolist(), strict=True):
    assert tiny.accepts(pattern, tokens), (pattern, tokens)


@pytest.mark.all
def test_a_language_may_be_that_of_a_span():
  """Slot 0 and slot 3 are free of the language of slots 1 and 2."""
  rows = [[None] * 4] * 40
  requests = tiny.requests(["ab|bb"] * 40, rows, spans=[(1, 3)] * 40)
  tokens = np.asarray(tiny.sample(POLICIES["ancestral"], requests).tokens)
  assert all(tiny.accepts("ab|bb", row[1:3]) for row in tokens)
  assert not (tokens[:, 1:3] == tiny.END).any()  # something follows
  assert len({*tokens[:, 0].tolist()}) > 1


@pytest.mark.all
def test_what_is_given_inside_belongs_to_the_text():
  rows = [[None, 1, None, None], [None, None, 0, None]] * 20
  requests = tiny.requests([PATTERN] * 40, rows)
  out = tiny.sample(POLICIES["confidence"], requests).tokens.tolist()
  for row, tokens in zip(rows, out, strict=True):
    assert tiny.accepts(PATTERN, tokens)
    assert all(g in (None, t) for g, t in zip(row, tokens, strict=True))
  with pytest.raises(ValueError, match="no part of any"):
    tiny.requests(["bb|aa"], [[None, 2, None, None]])


@pytest.mark.all
def test_greedy_takes_the_best_text_of_one_call():
  """Of 30 networks and languages, by brute force over all texts."""
  rng = np.random.default_rng(0)
  policy = Unmasking(objective=M, steps=1, processors=GREEDY)
  for pattern in ("(ab)+b?", "a?b?a?b?", "[ab]*b"):
    requests = tiny.requests([pattern])
    sampler = Sampler(policy=policy, length=4, end_ids=(tiny.END,))
    run = jax.jit(
      lambda p, r=requests, s=sampler: tiny.generate(
        s, tiny.NETWORK, p, tiny.Process(), jax.random.key(0), r
      )
    )
    for _ in range(10):
      p = rng.dirichlet(np.full(len(tiny.P), 0.1))
      law, _ = tiny.product_law(p)
      best = tiny.SEQUENCES[tiny.conditional(pattern, law).argmax()]
      found = run(jnp.array(p, jnp.float32)).tokens[0]
      assert found.tolist() == best.tolist()


@pytest.mark.all
def test_ancestral_sampling_has_the_exact_law_of_two_calls():
  """Calls at t = 1 and 1/2: each draws a text given what stands, and reveals."""
  requests = tiny.repeated(tiny.requests([PATTERN]), 20_000)
  policy = Ancestral(objective=M, steps=2, spacing="uniform")
  out = tiny.sample(policy, requests)
  first, _ = tiny.product_law()
  first = tiny.conditional(PATTERN, first)
  wanted = np.zeros(len(first))
  stay = float(M.stay(jnp.float32(1.0), jnp.float32(0.5)))
  for i in np.flatnonzero(first):
    for kept in itertools.product((False, True), repeat=4):
      chance = np.prod([1 - stay if k else stay for k in kept])
      known = [(j, tiny.SEQUENCES[i][j]) for j in range(4) if kept[j]]
      law, _ = tiny.product_law(known=known)
      wanted += first[i] * chance * tiny.conditional(PATTERN, law)
  found = tiny.frequency(out.tokens)
  assert not found[wanted == 0].any()
  assert np.abs(found - wanted).sum() / 2 < 0.03


@pytest.mark.all
@pytest.mark.parametrize("policy", [Psi, Renoise])
def test_processes_that_replace_tokens_end_in_the_language(policy):
  objective = UDLM(vocab_size=5)
  rows = [[None] * 4] * 24
  made = tiny.requests([PATTERN] * 24).languages
  requests = build(rows, objective=objective, length=4, languages=made)
  made = policy(objective=objective, steps=5)
  for tokens in tiny.sample(made, requests).tokens.tolist():
    assert tiny.accepts(PATTERN, tokens)


@pytest.mark.all
def test_the_log_probability_is_that_of_the_marginal_law():
  policy = Unmasking(objective=M, steps=1, processors=GREEDY)
  out = tiny.sample(policy, tiny.requests([PATTERN]))
  law, _ = tiny.product_law()
  wanted = tiny.conditional(PATTERN, law)
  for slot, token in enumerate(out.tokens[0].tolist()):
    exact = wanted[tiny.SEQUENCES[:, slot] == token].sum()
    np.testing.assert_allclose(np.exp(out.log_prob[0, slot]), exact, rtol=1e-4)


def test_policies_that_draw_no_whole_text_refuse():
  from tests.sampling import small

  policy = Speculation(objective=small.AUTOREGRESSIVE, drafts=2)
  sampler = Sampler(policy=policy, length=4, block_length=1, cache="block")
  with pytest.raises(ValueError, match="cannot keep a text in a language"):
    sampler.check_languages()
