"""Families of another's layout: the recorded networks' logits come out."""

import numpy as np
from numpy.testing import assert_allclose
import pytest

from dllm_jax.core.mask import decided_first
from dllm_jax.pretrained import load_pretrained
from tests import golden_cases
from tests.pretrained.golden import publish
from tests.pretrained.test_parity import at, loaded
from tests.quick import long

ATOL = 1e-4


def causal(length):
  return np.tri(length, dtype=bool)[None]


@pytest.mark.all
def test_llada_moe_under_its_published_model_type():
  a, model = loaded("llada_moe_published")
  assert model.family.name == "llada_moe"
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=ATOL)
  # The original sees padding; so do we where we are not told of it.
  seen = a["logits_with_attention_mask"]
  assert_allclose(model.logits(a["input_ids"]), seen, atol=ATOL)
  mask = at(a["attention_mask"])
  ours = np.asarray(model.logits(a["input_ids"], mask))
  assert mask.all() or np.abs(ours - seen)[mask].max() > 1e-2


@pytest.mark.all
def test_illada():
  a, model = loaded("illada")
  assert model.family.name == "illada" and model.config.tied
  tokens = a["input_ids"]
  assert_allclose(model.logits(tokens), a["logits"], atol=ATOL)
  mask = at(a["attention_mask"])
  ours = model.logits(tokens, mask)
  assert_allclose(ours[mask], a["logits_with_attention_mask"][mask], atol=ATOL)
  one = a["segments"]
  apart = (one[:, None] == one[None])[None]
  ours = model.logits(tokens, apart, positions=a["positions"])
  assert_allclose(ours, a["logits_two_documents"], atol=ATOL)


@pytest.mark.parametrize(
  "name, family",
  [
    ("sdar_moe", "sdar_moe"),
    long("dreamreasoner", "dream_reasoner"),
    ("llada22", "llada22"),
    long("llada21_generate", "llada2_moe"),
    long("fast_dllm_v2", "fast_dllm_v2"),
    *(  # transformers' LLaMA under the family's mask; not in every set
      long(name, name) for name in golden_cases.present("stable_diffcoder")
    ),
  ],
)
@pytest.mark.few(1)
def test_blocks_are_its_own_mask(name, family):
  a, model = loaded(name)
  assert model.family.name == family
  atol = 5e-4 if name == "llada21_generate" else ATOL
  length = a["input_ids"].shape[1]
  own = a["block_mask"][None] if name == "llada21_generate" else None
  assert_allclose(model.logits(a["input_ids"], own), a["logits"], atol=atol)
  everyone = np.ones((1, length, length), bool)
  if "logits_full" in a:
    ours = model.logits(a["input_ids"], everyone)
    assert_allclose(ours, a["logits_full"], atol=ATOL)
  if "logits_causal" in a:  # as transformers' Qwen3-MoE
    ours = model.logits(a["input_ids"], causal(length))
    assert_allclose(ours, a["logits_causal"], atol=ATOL)


@pytest.mark.all
def test_experts_are_chosen_block_by_block():
  a, model = loaded("llada22")
  # The original's choice is another one without a capacity.
  assert np.abs(a["logits"] - a["logits_without_capacity"]).max() > 1e-2
  row = model.logits(a["input_ids"][:1])
  assert_allclose(row, a["logits"][:1], atol=ATOL)
  # Whole blocks do not depend on what follows them.
  part = 2 * model.objective.block_size
  first = model.logits(a["input_ids"][:, :part])
  assert_allclose(first, a["logits"][:, :part], atol=ATOL)


@pytest.mark.all
def test_nemotron_reads_both_ways_and_causally():
  a, model = loaded("nemotron")
  tokens = a["input_ids"]
  length = tokens.shape[1]
  everyone = np.ones((1, length, length), bool)
  both = model.logits(tokens, everyone)
  assert_allclose(both, a["logits_bidirectional"], atol=ATOL)
  ours = model.logits(tokens, causal(length))
  assert_allclose(ours, a["logits_causal"], atol=ATOL)
  # A block that is read on causally stored tokens.
  known, block = a["cached_prefix"], a["cached_block"]
  mask = np.tri(known.shape[1] + block.shape[1], dtype=bool)
  mask[known.shape[1] :, known.shape[1] :] = True
  ours = model.logits(np.concatenate([known, block], axis=1), mask[None])
  assert_allclose(ours[:, known.shape[1] :], a["cached_logits"], atol=ATOL)


@pytest.mark.all
def test_wedlm_is_reordered_by_its_mask_alone():
  a, model = loaded("wedlm")
  tokens = a["input_ids"]
  assert_allclose(model.logits(tokens), a["logits"], atol=ATOL)
  # The recorded network sees decided tokens first, each at its position.
  order = a["reordered_positions"][0]
  row = np.empty_like(a["reordered_ids"])
  row[:, order] = a["reordered_ids"]
  mask = decided_first(row == golden_cases.load("wedlm").config["mask_id"])
  ours = np.asarray(model.logits(row, mask))
  assert_allclose(ours[:, order], a["reordered_logits"], atol=ATOL)


@pytest.mark.all
@pytest.mark.filterwarnings("ignore:.*may be SDAR")
def test_idlm_is_causal_and_trains_on_two_streams():
  a, model = loaded("idlm")
  assert model.family.name == "idlm" and model.objective.shift == 1
  assert_allclose(model.logits(a["input_ids"]), a["logits"], atol=ATOL)


@pytest.mark.all
def test_dreamon_sees_the_slots_in_use(tmp_path):
  a, model = loaded("dreamon")
  tokens, live = a["input_ids"], at(a["live"])
  assert_allclose(model.logits(tokens), a["logits_full"], atol=ATOL)
  ours = np.asarray(model.logits(tokens, live))
  assert_allclose(ours[live], a["logits"][live], atol=ATOL)
  # Its folder is Dream's: it is told, or has the token that expands.
  case = golden_cases.load("dreamon").config
  path = publish("dreamon", tmp_path, expand_token_id=case["expand_id"])
  told = load_pretrained(path)
  assert (model.family.name, told.family.name) == ("dream", "dreamon")
  assert (told.sampler, told.objective.delete_id) == ("dreamon", case["eos_id"])
  assert_allclose(told.logits(tokens), a["logits_full"], atol=ATOL)
  with pytest.raises(ValueError, match="expand_id 151667 must lie in"):
    load_pretrained(publish("dreamon", tmp_path / "own"), family="dreamon")
