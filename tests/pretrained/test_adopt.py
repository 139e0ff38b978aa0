"""Diffusion from autoregressive weights; tokenizers of imported models."""

import json

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.models.rotary import Yarn
from dllm_jax.pretrained import families, tokens
from dllm_jax.pretrained.adopt import adopt
from dllm_jax.run.run import Run
from tests import golden_cases
from tests.data.test_chat import folder as tokenizer_folder
from tests.data.test_chat import TALK, TEMPLATE
from tests.pretrained.golden import publish, published_config, vocabulary


def qwen(path, kind, **changes):
  """Returns a Qwen folder: Dream's weights are Qwen2's, SDAR's Qwen3's."""
  name = {"qwen2": "dream_logits", "qwen3": "sdar"}[kind]
  without = {"mask_token_id": ..., "architectures": ...}
  return publish(name, path, model_type=kind, **without, **changes)


@pytest.mark.parametrize("kind, target", [
    ("qwen2", "dream"), ("qwen3", "dream"), ("qwen2", "llada"), ("qwen3", "bd3lm"),
])  # fmt: skip
@pytest.mark.all
def test_a_new_row_is_the_mask(kind, target, tmp_path):
  model = dllm_jax.load_pretrained(qwen(tmp_path / "in", kind))
  size = model.config.vocab_size
  ours = adopt(model, target)
  assert type(ours.objective).__name__.lower() == target
  assert ours.objective.mask_id == ours.tokenizer.mask_id == size
  assert ours.tokenizer.vocab_size == ours.config.vocab_size == size + 1
  table = np.asarray(ours.params["embed"]["embedding"])
  assert_allclose(table[size], table[:size].mean(0), atol=1e-6)
  # What was learned stays: the same network under a full mask.
  tokens = np.arange(12).reshape(1, 12) % size
  everyone = np.ones((1, 12, 12), bool)
  assert_allclose(
    ours.logits(tokens, everyone)[..., :size],
    model.logits(tokens, everyone),
    atol=1e-4,
  )
  dllm_jax.save_pretrained(ours, tmp_path / "out")
  back = dllm_jax.load_pretrained(tmp_path / "out")
  assert back.objective == ours.objective
  assert back.family.name == ("dream" if target == "dream" and kind == "qwen2"
                              else "qwen")  # fmt: skip
  assert_array_equal(back.logits(tokens), ours.logits(tokens))


@pytest.mark.all
@pytest.mark.parametrize("target", ["bd3lm", "dream"])
@pytest.mark.parametrize("name", golden_cases.present("qwen3_moe", "mixtral"))
def test_experts_are_adopted(name, target, tmp_path):
  model = dllm_jax.load_pretrained(publish(name, tmp_path / "in"))
  ours = adopt(model, target)
  assert type(ours.objective).__name__.lower() == target
  dllm_jax.save_pretrained(ours, tmp_path / "out")
  back = dllm_jax.load_pretrained(tmp_path / "out")
  assert back.family.table == model.family.table
  assert back.objective == ours.objective and back.config == ours.config


@pytest.mark.all
def test_a_spare_row_is_the_mask(tmp_path):
  scaling = {"rope_type": "yarn", "factor": 4.0}
  source = qwen(
    tmp_path / "in",
    "qwen2",
    eos_token_id=6,
    pad_token_id=6,
    rope_scaling=scaling,
    max_position_embeddings=64,
  )
  tokenizer_folder(source, mask_token=None, chat_template=TEMPLATE)
  model = dllm_jax.load_pretrained(source)
  spare, size = model.tokenizer.last_id + 1, vocabulary("dream_logits")
  ours = adopt(model, "dream")
  assert ours.objective.mask_id == spare == 8  # The last of its own is 7.
  assert ours.config.vocab_size == size

  workdir = tmp_path / "run"
  argv = [f"--from_hf={source}", f"--workdir={workdir}", "--as=dream"]
  assert main(["convert", *argv]) == 0
  run = Run.open(workdir)
  assert run.objective.mask_id == spare and run.objective.vocab_size == size
  assert run.network.rope_scaling == Yarn(factor=4.0, first_length=64)
  assert run.tokenizer.chat(TALK).size
  assert "▁" not in run.sample(["a"], length=4).texts[0]
  assert (
    main([
      "convert",
      f"--to_hf={tmp_path / 'out'}",
      f"--workdir={workdir}",
    ])
    == 0
  )
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert {"tokenizer.json", "tokenizer_config.json"} <= names
  stated = json.loads((tmp_path / "out" / "config.json").read_text())
  assert stated["model_type"] == "Dream" and stated["mask_token_id"] == spare


def test_what_cannot_be_adopted(tmp_path):
  model = dllm_jax.load_pretrained(publish("llada_logits", tmp_path))
  with pytest.raises(ValueError, match="diffuses already"):
    adopt(model, "dream")
  with pytest.raises(ValueError, match="legal: dream, llada, bd3lm"):
    adopt(model, "mdlm")


def test_masks_must_agree(tmp_path):
  source = publish("llada_logits", tmp_path, mask_token_id=4)
  tokenizer_folder(source)  # its mask is 7, the config's another
  with pytest.raises(ValueError, match="tokenizer.json has the mask 7, but .*"):
    dllm_jax.load_pretrained(source)


def test_end_and_pad_are_checked(tmp_path):
  source = publish("llada_logits", tmp_path, mask_token_id=7, eos_token_id=3)
  tokenizer_folder(source, eos_token="<|end|>")
  with pytest.warns(UserWarning, match="has the end token 6, but .* says 3"):
    model = dllm_jax.load_pretrained(source)
  assert model.tokenizer.eos_id == 3 and model.tokenizer.bos_id == 3


_SIZE = vocabulary("llada_logits")
_MASK = published_config(golden_cases.load("llada_logits"))["mask_token_id"]
_FAR = 3 * _SIZE


@pytest.mark.parametrize("fields, message", [
    ({"eos_token_id": _MASK},
     f"token {_MASK} is both the mask and the end of a text"),
    ({"eos_token_id": [5, _FAR]}, None),
    ({"eos_token_id": _FAR},
     f"vocabulary of {_SIZE} tokens lacks the end id {_FAR}"),
    ({"pad_token_id": _SIZE},
     f"vocabulary of {_SIZE} tokens lacks the pad id {_SIZE}"),
    ({"pad_token_id": "x"}, "pad_token_id must be a token id, not 'x'"),
    ({"pad_token_id": -1}, None),
])  # fmt: skip
def test_special_tokens_must_be_possible(fields, message):
  config = published_config(golden_cases.load("llada_logits")) | fields
  fields = families.Fields(config, "config.json")
  family = families.find(fields)
  read = lambda: tokens.ids(family, fields, _SIZE, families.Ids(None))
  if message is None:
    assert read().mask == _MASK
  else:
    with pytest.raises(ValueError, match=message):
      read()


def test_too_many_tokens(tmp_path):
  source = publish("llada_logits", tmp_path / "in")
  tokenizer_folder(source, mask_token=None)
  path = source / "tokenizer.json"
  text = json.loads(path.read_text())
  text["added_tokens"][-1]["id"] = 7
  text["model"]["vocab"]["z"] = _SIZE
  path.write_text(json.dumps(text))
  with pytest.raises(ValueError, match=f"has tokens up to {_SIZE}, but"):
    dllm_jax.load_pretrained(source)


def test_the_mask_can_be_told(tmp_path):
  source = publish("llada2_moe", tmp_path)
  case = golden_cases.load("llada2_moe").config
  model = dllm_jax.load_pretrained(source, mask_id=case["mask_id"])
  assert model.objective.mask_id == case["mask_id"]
