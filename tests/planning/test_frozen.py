"""Plans of networks that are frozen but for adapters, counted exactly."""

import pytest

from dllm_jax.config import config
from dllm_jax.data.numbers import Numbers
from dllm_jax.planning.facts import Reference, state_bytes

ONE = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1)
WIDTH, LAYERS, RANK, VOCAB = 128, 4, 2, 512


def reference(**adapter):
  given = config.load("smoke")
  given.model.width, given.model.layers, given.model.heads = WIDTH, LAYERS, 2
  given.model.param_dtype = "bfloat16"
  given.data.length = 64
  given.training.ema_decay = 0.0
  given.model.adapter.update(adapter)
  tokenizer = Numbers(vocab_size=VOCAB, mask_id=VOCAB - 1, bos_id=0, eos_id=1)
  return Reference(given, tokenizer)


@pytest.mark.parametrize("base, bits", [("default", 16), ("nf4", 4)])
@pytest.mark.all
def test_frozen_weights_count_in_their_own_type(base, bits):
  found = reference(rank=RANK, base=base)
  facts, network = found.facts, found.network
  kinds = state_bytes(facts.state, ONE, facts.trains)
  mlp = network.mlp_dim or 4 * WIDTH
  shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, mlp)] * 2 + [(mlp, WIDTH)]
  matrices = LAYERS * sum(a * b for a, b in shapes)
  adapters = LAYERS * sum(RANK * (a + b) for a, b in shapes)
  scales = matrices / 64 * 2 if base == "nf4" else 0  # in the network's type
  rest = 2 * VOCAB * WIDTH + (2 * LAYERS + 1) * WIDTH  # embeddings and norms
  if network.tied:
    rest -= VOCAB * WIDTH
  assert kinds["frozen"] == matrices * bits / 8 + scales + 2 * rest
  assert facts.parameters == matrices + rest + adapters
  assert facts.trained == pytest.approx(adapters / facts.parameters)
  # Masters of what trains, and two moments of each, with their counts.
  assert 0 <= kinds["parameters"] - 4 * adapters <= 16
  assert 0 <= kinds["optimizer"] - 8 * adapters <= 16


@pytest.mark.all
def test_gradients_of_what_is_frozen_are_not_formed():
  few, all_ = (reference(rank=rank).remat("none") for rank in (RANK, 0))
  # Two of three: forward, and back through each matrix to the inputs.
  assert few[0] == pytest.approx(2 / 3 * all_[0], rel=0.1)
  assert few[1] < all_[1]
