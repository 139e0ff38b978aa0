"""Rooflines of two decoders: their limits, and what is refused."""

import jax
import pytest

from dllm_jax.evaluation.samples import decoders
from dllm_jax.evaluation.samples.traffic import Traffic
from dllm_jax.parallel.hardware import CHIPS


@pytest.fixture(scope="module")
def found():
  return list(
    decoders.levels(["llada_1b"], ["h100", "v5p"], context=64, block=8)
  )


def test_seconds_are_those_of_what_binds():
  chip = CHIPS["h100"]
  rate = 0.9 * 3.35e12
  assert Traffic(flops=0.0, bytes=rate).seconds(chip) == pytest.approx(1.0)
  peak = 0.75 * 989e12
  assert Traffic(flops=2 * peak, bytes=rate).seconds(chip) == pytest.approx(2.0)


def test_few_rows_are_level_at_a_token_and_many_at_a_block(found):
  """Weights bind both at first; at last a block has the products of its slots."""
  for chip in ("h100", "v5p"):
    mine = [one for one in found if one.chip == chip]
    assert mine[0].rows == 1 and mine[0].tokens == pytest.approx(1.0, rel=1e-3)
    assert mine[-1].rows == 1024
    needed = [one.tokens for one in mine]
    assert needed == sorted(needed) and 6.0 < needed[-1] <= 8.0
    assert mine[0].block_intensity > 7.9 * mine[0].token_intensity


def test_a_token_reads_the_weights_once_and_the_cache(found):
  """1.4 billion weights of two bytes; 64 slots of 22 layers' keys and values."""
  run = decoders.network("llada_1b")
  network = run.network
  params = (
    sum(x.size for x in _leaves(run)) - network.vocab_size * network.width
  )
  heads = network.kv_heads or network.heads
  slot = 2 * network.layers * heads * network.head_dim
  moved = 2 * (params + slot * (64 + 1))
  one = next(x for x in found if x.chip == "h100" and x.rows == 1)
  assert one.token == pytest.approx(moved / (0.9 * 3.35e12), rel=1e-6)


def _leaves(run):
  return jax.tree.leaves(run.served.abstract.params["model"])


def test_rows_up_to_which_a_sampler_is_faster(found):
  first = next(one for one in found if one.chip == "v5p" and one.tokens > 1.5)
  just = decoders.faster_up_to(found, first.tokens)
  assert just["llada_1b", "v5p"] == first.rows // 2  # level is not faster
  assert decoders.faster_up_to(found, 8.5)["llada_1b", "h100"] == 1024
  assert set(decoders.faster_up_to(found, 0.9).values()) == {0}
  tried = [
    {"point": "good", "tokens_per_call": 4.0, "perplexity": 5.0},
    {"point": "fast", "tokens_per_call": 6.0, "perplexity": 9.0},
    {"point": "beaten", "tokens_per_call": 3.0, "perplexity": 6.0},
    {"point": "single", "tokens_per_call": 1.0, "perplexity": 1.0},
    {"point": "empty", "tokens_per_call": 9.0, "perplexity": None},
  ]
  table = decoders.table(found, tried)
  assert "| single | 1.00 | never | never |" in table
  assert "| (what the memory holds) | | 1024 rows | 1024 rows |" in table
  picture = decoders.picture(found, tried)
  drawn = [row["point"] for row in tried if f">{row['point']}: " in picture]
  assert drawn == ["good", "fast"]


@pytest.mark.parametrize(
  "names, chips, context, says",
  [
    (["llada_1b"], ["h101"], 64, "unknown chip 'h101'; legal: v5e"),
    (["smoke"], ["h100"], 64, "states no vocab_size"),
    ([], ["h100"], 64, "on a network and a chip"),
    (["llada_8b"], ["v6e"], 2**16, "more than one v6e has"),
  ],
)
def test_what_cannot_be_set_against_each_other_is_said(
  names, chips, context, says
):
  with pytest.raises(ValueError, match=says):
    list(decoders.levels(names, chips, context=context, block=8))
