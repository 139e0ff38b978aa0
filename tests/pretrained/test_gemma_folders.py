"""DiffusionGemma's folders as runs: settings, tied copies, what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dllm_jax.cli.main import main
from dllm_jax.run.exchange import export_run, import_folder
from dllm_jax.run.run import Run
from dllm_jax.serving import Engine, Limits, Model
from dllm_jax.serving.http import protocol, wishes
from dllm_jax.serving.http.limits import Refusal
from tests import golden_cases
from tests.pretrained.golden import plain, publish

NAME = "diffusion_gemma_generate"
DECODER, TEXT = "model.decoder.", "model.encoder.language_model."
HOT = 0.9
SETTINGS = {
  "max_denoising_steps": 7,
  "t_max": HOT,
  "t_min": 0.3,
  "stability_threshold": 2,
  "confidence_threshold": None,
  "sampler_config": {"entropy_bound": 0.2},
  "pad_token_id": 0,
}


def config():
  return golden_cases.load(NAME).config["hf_config"]


def repeated(tensors):
  """Returns a folder's tensors with all that an encoder and a head repeat."""
  made = dict(tensors)
  for name, array in tensors.items():
    if name.startswith(DECODER) and not name.endswith("layer_scalar"):
      made[TEXT + name.removeprefix(DECODER)] = array
  made["lm_head.weight"] = tensors[DECODER + "embed_tokens.weight"]
  return {
    k: v for k, v in made.items() if "encoder" not in k or "cond" not in k
  }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A published folder with all that others' have besides."""
  made = publish(NAME, tmp_path_factory.mktemp("gemma") / "in")
  ends = {"eos_token_id": plain(NAME)[:3]}
  path = made / "generation_config.json"
  path.write_text(json.dumps(SETTINGS | ends))
  weights = made / "model.safetensors"
  save_file(repeated(load_file(weights)), weights)
  return made


@pytest.fixture(scope="module")
def imported(folder):
  """What an import of it told, in `workdir`."""
  return import_folder(folder, folder.parent / "run", length=32)


@pytest.fixture(scope="module")
def run(folder, imported):
  return Run.open(folder.parent / "run")


@pytest.mark.all
def test_a_folders_sampler_is_the_runs(run):
  sampler = run.config.sampler
  found = [getattr(sampler, name) for name in ("steps", "hot", "cold")]
  assert found == [7, HOT, 0.3]
  assert (sampler.entropy_bound, sampler.stable) == (0.2, 2)
  built = sampler.build(run.objective, length=32)
  assert built.policy.rest == 0.005 and built.policy.bound == 0.2


@pytest.mark.all
def test_all_ends_of_a_folder_end_a_row(run):
  ends = plain(NAME)[:3]
  assert set(ends) <= set(run.tokenizer.end_ids)
  built = run.config.sampler.build(
    run.objective, length=32, end_ids=run.tokenizer.end_ids, fill_id=0
  )
  assert set(ends) <= set(built.end_ids) and built.fill_id == 0


@pytest.mark.all
def test_tied_copies_are_told_and_come_back(imported, folder, run, tmp_path):
  before = load_file(folder / "model.safetensors")
  copies = {k for k in before if k.startswith(TEXT) and "scalar" not in k}
  assert len(copies) > 50 and copies | {"lm_head.weight"} <= set(
    imported["tensors_unused"]
  )
  export_run(run.workdir, tmp_path / "out")
  after = load_file(tmp_path / "out" / "model.safetensors")
  assert list(after) == sorted(before)
  for name, array in before.items():
    assert after[name].tobytes() == array.tobytes(), name
  for name in ("config.json", "generation_config.json"):
    one, other = (json.loads((x / name).read_text()) for x in (
      folder, tmp_path / "out",
    ))  # fmt: skip
    assert one.items() <= other.items()


def test_copies_that_differ_are_refused(folder, tmp_path, capsys):
  made = publish(NAME, tmp_path / "in")
  tensors = load_file(folder / "model.safetensors")
  name = TEXT + "layers.0.mlp.down_proj.weight"
  tensors[name] = tensors[name] + np.float32(1)
  save_file(tensors, made / "model.safetensors")
  said = refused(
    capsys, "convert", f"--from_hf={made}", f"--workdir={tmp_path / 'run'}"
  )
  assert name in said and "differs from model.decoder.layers.0" in said


def refused(capsys, *argv) -> str:
  """Returns the one line of a command that exits with 2."""
  capsys.readouterr()
  assert main(list(argv)) == 2
  (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
  assert line.startswith("dllm: ")
  return line


def test_prompts_with_pictures_are_refused(run, capsys):
  image = config()["image_token_id"]
  args = ["sample", f"--workdir={run.workdir}", "--new_tokens=8"]
  said = refused(capsys, *args, f"--prompt=3 {image} 5")
  assert f"image token {image} at slot 1" in said and "text alone" in said


@pytest.mark.all
def test_a_server_refuses_pictures(run):
  image = config()["image_token_id"]
  engine = Engine.of(run, slots=1, length=32, state=run.load())
  model = Model.of(
    run, engine, name="g", sampler=run.config.sampler, limits=Limits()
  )
  body = {"model": "g", "max_tokens": 8}
  for prompt in (f"3 {image} 5", [3, image, 5]):
    with pytest.raises(Refusal, match=f"image token {image}") as error:
      wishes.completion(protocol.Completion(**body, prompt=prompt), model)
    assert error.value.status == 400
  made = wishes.completion(protocol.Completion(**body, prompt=[3, 5]), model)
  assert made is not None


def test_canvases_of_another_length_are_refused(run, capsys):
  own = config()["canvas_length"]
  args = [f"--workdir={run.workdir}", f"--sampler.block_length={own // 2}"]
  said = refused(capsys, "sample", *args)
  assert f"has canvases of {own} slots" in said
  assert f"block_length {own}" in said
  assert f"has canvases of {own} slots" in refused(capsys, "serve", *args)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"canvas_length": 0}, "canvas must be at least 1"),
    ({"canvas_length": "8"}, "canvas_length must be a whole number"),
    ({"image_token_id": "i"}, "image_token_id must be a whole number"),
    ({"model_type": "gemma4", "architectures": ["Gemma4ForCausalLM"]},
     "is an autoregressive Gemma"),
    ({"model_type": "gemma4_text", "architectures": None}, "left to right"),
    ("layer_types", "not chunked_attention"),
  ],
)  # fmt: skip
def test_configs_that_are_refused(changes, words, tmp_path, capsys):
  if changes == "layer_types":
    text = config()["text_config"]
    kinds = ["chunked_attention", *text["layer_types"][1:]]
    changes = {"text_config": text | {"layer_types": kinds}}
  made = publish(NAME, tmp_path / "in", **changes)
  to = f"--workdir={tmp_path / 'run'}"
  assert words in refused(capsys, "convert", f"--from_hf={made}", to)


TEMPLATE = (
  "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<model>' }}"
  " {{ m.content }}<end>{% endfor %}"
  "{% if add_generation_prompt %}<model> {% endif %}"
)


def talks(folder):
  """Gives a folder a tokenizer of numbers, a chat template and conversations."""
  from tokenizers import models, pre_tokenizers, Tokenizer

  size = config()["text_config"]["vocab_size"]
  names = {1: "<end>", size - 4: "<user>", size - 3: "<model>"}
  words = {names.get(i, str(i)): i for i in range(size)}
  made = Tokenizer(models.WordLevel(words, unk_token="0"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(list(names.values()))
  made.save(str(folder / "tokenizer.json"))
  told = {"eos_token": "<end>", "pad_token": "0", "chat_template": TEMPLATE}
  (folder / "tokenizer_config.json").write_text(json.dumps(told))
  rng = np.random.default_rng(0)
  path = folder.parent / "chats.jsonl"
  with path.open("w") as file:
    for _ in range(80):
      said = " ".join(map(str, rng.integers(10, 30, 3)))
      pair = {"user": said, "assistant": " ".join(reversed(said.split()))}
      turns = [{"role": k, "content": v} for k, v in pair.items()]
      file.write(json.dumps({"messages": turns}) + "\n")
  return path


@pytest.mark.all
def test_conversations_tune_adapters(tmp_path, capsys):
  """As docs/finetuning.md shows: import, train adapters, sample, and back."""
  made, workdir = publish(NAME, tmp_path / "in"), tmp_path / "run"
  chats = talks(made)

  def dllm(*argv):
    assert main(list(argv)) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  dllm("convert", f"--from_hf={made}", f"--workdir={workdir}", "--length=32")
  told = dllm(
      "train", f"--workdir={workdir}", f"--config.data.path={chats}",
      "--config.training.steps=30", "--config.optimizer.learning_rate=0.02",
      "--config.optimizer.warmup_steps=0", "--config.logging.progress=false",
      "--config.logging.every_steps=1", "--config.model.adapter.rank=4",
  )  # fmt: skip
  assert told["step"] == 30
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  said = [json.loads(line) for line in lines]
  name = "loss_nats_per_token"
  losses = [m[name] for m in said if name in m]
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

  sampled = dllm("sample", f"--workdir={workdir}", "--prompt=11 12 13")
  assert sampled["samples"][0].startswith("11 12 13")
  adapters = dllm(
    "convert", f"--to_peft={tmp_path / 'a'}", f"--workdir={workdir}"
  )
  assert adapters["rank"] == 4 and adapters["modules"] > 20
  dllm("convert", f"--to_hf={tmp_path / 'out'}", f"--workdir={workdir}")
  before, after = (
    load_file(x / "model.safetensors") for x in (made, tmp_path / "out")
  )
  moved = {k for k in before if not np.array_equal(before[k], after[k])}
  assert set(before) == set(after)
  matrices = ("self_attn", ".mlp.", "self_conditioning")
  assert moved and all(any(m in k for m in matrices) for k in moved)
