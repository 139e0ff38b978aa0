"""Folders that cannot be read: one line, naming file and tensor; no trace."""

import json
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.run import exchange
from tests import golden_cases
from tests.pretrained.golden import publish, published_config, vocabulary

CASE = "llada_logits"
CONFIG = published_config(golden_cases.load(CASE))
SIZE, LAYERS, HIDDEN = (
  vocabulary(CASE),
  CONFIG["n_layers"],
  CONFIG["mlp_hidden_size"],
)
NAME = f"model.transformer.blocks.{LAYERS - 1}.ff_proj.weight"
HEADS = CONFIG["n_heads"] + 1  # No divisor.


def truncate(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-1000])


def foreign(content):
  return lambda folder: (folder / "model.safetensors").write_bytes(content)


def edit_config(**changes):
  def change(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

  return change


def edit_weights(change):
  def edit(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)

  return edit


def shard(folder, drop=None, wrong=False):
  path = folder / "model.safetensors"
  tensors = load_file(path)
  path.unlink()
  names = sorted(tensors)
  half = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
  where = {}
  for i, keys in half.items():
    file = f"model-0000{i}-of-00002.safetensors"
    where |= dict.fromkeys(keys, file)
    if wrong and i == 2:
      keys = keys[1:]
    if i != drop:
      save_file({key: tensors[key] for key in keys}, folder / file)
  index = {"weight_map": where}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder):
  (folder / "model.safetensors").unlink()
  (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def lie_about_bytes(folder):
  header = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}
  text = json.dumps(header).encode()
  foreign(struct.pack("<Q", len(text)) + text + bytes(8))(folder)


MESSAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "unknown family": (
        edit_config(model_type="gpt9", architectures=["GPT9"]),
        "'gpt9' .* is unknown; known model_types: llada, dream, sdar"),
    "unsupported option": (edit_config(alibi=True), "alibi=True is not supported"),
    "a field is missing": (edit_config(d_model=None), "lacks the field d_model"),
    "a field is text": (edit_config(n_layers="2"), "n_layers must be a whole"),
    "heads do not divide": (
        edit_config(n_kv_heads=HEADS), f"config.json: kv_heads {HEADS}"),
    "truncated": (truncate, "model.safetensors .* is truncated .*fetch it again"),
    "empty": (foreign(b""), "model.safetensors is not a safetensors file"),
    "a pickle in disguise": (
        foreign(pickle.dumps(list(range(100)))), "is not a safetensors file"),
    "wrong bytes": (lie_about_bytes, "is not a safetensors file, or .*shape"),
    "shapes": (
        edit_config(mlp_hidden_size=HIDDEN + 16),
        rf"model.safetensors: tensor .* has shape \(.*{HIDDEN}.*\), but the config"
        rf" gives \(.*{HIDDEN + 16}.*\)"),
    "a tensor is missing": (
        edit_weights(lambda t: t.pop(NAME)),
        f"tensor {NAME} is missing, which parameter layers/mlp/gate/kernel"),
    "too few layers": (
        edit_config(n_layers=LAYERS - 1), "model.safetensors: tensor .* has no place"),
    "a tensor too many": (
        edit_weights(lambda t: t.update(extra=np.ones(3))),
        "model.safetensors: tensor extra has no place in a LLaDA network"),
    "a missing shard": (
        lambda f: shard(f, drop=2),
        "model-00002-of-00002.safetensors is missing, which holds tensor"),
    "a shard without its tensor": (
        lambda f: shard(f, wrong=True), "lacks tensor .*, which model.safetensors"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a pickle": (pickled, "pytorch_model.bin is refused; a pickle is never read"),
    "mask outside the vocabulary": (
        edit_config(mask_token_id=SIZE),
        f"vocabulary of {SIZE} tokens is smaller than the mask id {SIZE}"),
}  # fmt: skip


@pytest.mark.parametrize("what", MESSAGES)
def test_one_line_and_nothing_written(what, tmp_path, capsys):
  spoil, message = MESSAGES[what]
  folder = publish(CASE, tmp_path / "in")
  spoil(folder)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    dllm_jax.load_pretrained(folder)
  assert "\n" not in str(error.value) and str(folder) in str(error.value)

  before = sorted(tmp_path.rglob("*"))
  workdir = tmp_path / "run"
  argv = ["convert", f"--from_hf={folder}", f"--workdir={workdir}"]
  assert main(argv) == 2
  assert len(capsys.readouterr().err.strip().splitlines()) <= 2  # bar, message
  assert sorted(tmp_path.rglob("*")) == before


def test_shards_load(tmp_path):
  folder = publish(CASE, tmp_path)
  shard(folder)
  a = golden_cases.load(CASE).arrays
  logits = dllm_jax.load_pretrained(folder).logits(a["input_ids"])
  np.testing.assert_allclose(logits, a["logits"], atol=2e-4)


def test_averages_without_names_are_told_of(tmp_path):
  folder = publish("mdlm", tmp_path)
  more = {"ema.shadow_params.0": np.ones((3, 4), np.float32)}
  edit_weights(lambda t: t.update(more))(folder)
  with pytest.warns(
    UserWarning, match="1 averaged tensors .ema.shadow_params.0"
  ):
    model = dllm_jax.load_pretrained(folder)
  assert "ema.shadow_params.0" in model.unused


def test_an_interrupted_conversion_leaves_nothing(
  tmp_path, capsys, monkeypatch
):
  folder = publish(CASE, tmp_path / "in")
  before = sorted(tmp_path.rglob("*"))

  def interrupt(*_):
    assert sorted(tmp_path.glob(".run.*.tmp"))  # under way
    raise KeyboardInterrupt

  monkeypatch.setattr(exchange.Checkpoints, "save_imported", interrupt)
  argv = ["convert", f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}"]
  assert main(argv) == 130
  assert "dllm: interrupted" in capsys.readouterr().err
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.all
def test_half_precision(tmp_path):
  folder = publish(CASE, tmp_path)
  half = lambda t: t.update({k: v.astype(np.float16) for k, v in t.items()})
  edit_weights(half)(folder)
  model = dllm_jax.load_pretrained(folder)
  assert model.params["final_norm"]["scale"].dtype == np.float32
  low = dllm_jax.load_pretrained(folder, dtype="bfloat16")
  assert low.params["final_norm"]["scale"].dtype == "bfloat16"
  tokens = golden_cases.load(CASE).arrays["input_ids"]
  # bfloat16 keeps 8 bits: 0.5 of logits up to 12 through two layers.
  expected = np.asarray(model.logits(tokens))
  atol = 0.5 * LAYERS / 2 * np.abs(expected).max() / 12
  np.testing.assert_allclose(low.logits(tokens), expected, atol=atol)
  dllm_jax.save_pretrained(model, tmp_path / "out")
  back = load_file(tmp_path / "out" / "model.safetensors")
  assert {x.dtype for x in back.values()} == {np.dtype(np.float16)}


def test_saving_never_overwrites(tmp_path):
  model = dllm_jax.load_pretrained(publish(CASE, tmp_path / "in"))
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("precious")
  with pytest.raises(FileExistsError, match="is not empty"):
    dllm_jax.save_pretrained(model, tmp_path / "out")
  short = {**model.params, "final_norm": {"scale": np.ones(3)}}
  with pytest.raises(ValueError, match="final_norm/scale must be"):
    dllm_jax.save_pretrained(model, tmp_path / "new", params=short)
  assert not (tmp_path / "new").exists()


def test_a_file_is_no_folder(tmp_path):
  file = tmp_path / "model.ckpt"
  file.write_bytes(b"x")
  with pytest.raises(ValueError, match="a pickle is never read"):
    dllm_jax.load_pretrained(file)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    dllm_jax.load_pretrained(tmp_path / "nowhere")
