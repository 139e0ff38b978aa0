"""Runs that draw and read pictures: the tokenizer and the model, by one trainer."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from dllm_jax.cli import main
from dllm_jax.config import config
from dllm_jax.data.images.pictures import png
from dllm_jax.run import exchange, images
from dllm_jax.run.run import Run
from dllm_jax.sampling import SamplerConfig
from dllm_jax.sampling.traces import tiles
from tests import runs

pytestmark = pytest.mark.all

THREE = dataclasses.replace(images.DRAWING, steps=3)
COLOURS = {"red": (220, 40, 40), "blue": (40, 40, 220)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two colours with their names."""
  made = tmp_path_factory.mktemp("colours")
  rng, rows = np.random.default_rng(0), []
  for i in range(160):
    name = list(COLOURS)[i % 2]
    picture = np.full((8, 8, 3), COLOURS[name]) + rng.integers(
      -20, 20, (8, 8, 3)
    )
    (made / f"{i}.png").write_bytes(png(picture.astype(np.uint8)))
    rows.append({"image": f"{i}.png", "text": f"a {name}"})
  path = made / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def small(name, folder, **sections):
  resolved = config.load(name)
  resolved.data.update({"path": str(folder), "image_size": 8, "held_out": 0.2})
  resolved.training.update({"steps": 3, "batch_size": 8, "ema_decay": 0.0})
  resolved.optimizer.warmup_steps = 1
  resolved.checkpoint.every_steps = 3
  resolved.evaluation.batch_size = 8
  for section, fields in sections.items():
    resolved[section].update(fields)
  return resolved


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, folder):
  resolved = small(
    "digits_mmada:tokenizer", folder, data={"length": 64},
    model={"bits": 4, "stem": 8, "encoder_channels": (8, 8, 8),
           "decoder_channels": (8, 8, 8)},
  )  # fmt: skip
  run = Run.create(resolved, tmp_path_factory.mktemp("runs") / "tokens")
  run.train()
  return run


@pytest.fixture(scope="module")
def run(tokens, folder):
  resolved = small(
    "digits_mmada", folder,
    data={"length": 4 + 3 + 40, "tokenizer": "bpe:262",
          "image_tokenizer": str(tokens.workdir)},
    # The published layout has no embeddings of positions.
    model={"width": 32, "layers": 1, "heads": 2, "learned_positions": 0},
  )  # fmt: skip
  made = Run.create(resolved, tokens.workdir.parent / "model")
  made.train()
  return made


def test_a_tokenizer_trains(tokens):
  lines = (tokens.workdir / "metrics.jsonl").read_text().splitlines()
  said = {k: v for line in lines for k, v in json.loads(line).items()}
  assert np.isfinite(said["loss_nats_per_token"]) and "psnr" in said
  figures = tokens.evaluate(limit=1)
  assert np.isfinite(figures["bits_per_token"])


def test_a_run_keeps_its_tokenizer(run, tokens):
  kept = images.tokenizer_of(Run.open(run.workdir))
  assert kept.config == tokens.network
  again = images.find(tokens.workdir)
  pixels = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(1, 8, 8, 3)
  np.testing.assert_array_equal(kept.encode(pixels), again.encode(pixels))


def test_resumes(run):
  assert Run.create(run.resolved, run.workdir).train()["step"] == 3


def test_draws(run):
  """So many steps are so many calls, of one program, alone as in a batch."""
  draw = lambda prompts, **more: images.draw(
    run, prompts, seed=3, **{"sampler": THREE} | more
  )
  two = draw(["a red", "a blue"], trace=True)
  assert two.pictures.shape == (2, 8, 8, 3) and two.pictures.dtype == np.uint8
  assert (
    two.codes.shape == (2, 4) and 0 <= two.codes.min() <= two.codes.max() < 16
  )
  calls = two.sampled.generation.function_evaluations
  assert np.asarray(calls).tolist() == [3, 3]
  alone = draw(["a red"])
  np.testing.assert_array_equal(alone.codes[0], two.codes[0])
  assert all(launcher.programs() <= 2 for launcher in run.generator.launchers)
  greedy = SamplerConfig(preset="mmada", steps=2, cfg_scale=1.0)
  assert draw(["a red"], sampler=greedy).codes.shape == (1, 4)


def test_tiles(run, tmp_path):
  drawn = images.draw(run, ["a red"], seed=3, trace=True, sampler=THREE)
  build = images.sequences(run)
  shown = tiles.frames(
    drawn.sampled.generation.trace, images.tokenizer_of(run).decode,
    start=images.slots(build).start, tokens=4, offset=build.vocabulary.offset,
  )  # fmt: skip
  assert len(shown) == 4
  grey = [(f == 226).all(-1).mean() for f in shown]
  assert grey[0] > 0.5 and grey == sorted(grey, reverse=True) and grey[-1] < 0.1
  np.testing.assert_array_equal(shown[-1], drawn.pictures[0])
  for name in ("a.gif", "a.png", "a.html"):
    tiles.write(tmp_path / name, shown)
  assert Image.open(tmp_path / "a.gif").n_frames == 4
  assert (tmp_path / "a.html").read_text().count("iVBOR") == 4
  with pytest.raises(ValueError, match="a .gif, a .png or an .html"):
    tiles.write(tmp_path / "a.svg", shown)


def test_answers(run, folder):
  files = [("0.png", (folder.parent / "0.png").read_bytes())]
  texts, sampled = images.answer(run, files, "What is this?", new_tokens=6)
  assert len(texts) == 1 and sampled.new_tokens >= 6


def test_commands(run, folder, tmp_path, capsys):
  out, workdir = tmp_path / "out.png", f"--workdir={run.workdir}"
  assert not main.main([
    "sample", workdir, "--prompt=a red", f"--image={out}", "--num_samples=4",
    f"--trace={tmp_path / 'out.gif'}", "--sampler.steps=3",
  ])  # fmt: skip
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert last["pictures"] == 4 and last["function_evaluations"] == 3
  assert Image.open(out).size == (20, 20)  # two rows of two, and gaps
  picture = folder.parent / "1.png"
  assert not main.main([
    "sample", workdir, f"--input_image={picture}", "--prompt=What is this?",
  ])  # fmt: skip
  assert "1.png" in capsys.readouterr().out
  assert not main.main(["sample", workdir, "--prompt=a red"])  # as text


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--image=a.jpg", "--prompt=a"], "must be a .png"),
    (["--image=a.png"], "pictures need --prompt"),
    (["--input_image=gone.png", "--prompt=a"], "gone.png is no file"),
    (["--image=a.png", "--input_image=b.png", "--prompt=a"], "not both"),
  ],
)
def test_wrong_flags(run, flags, words, capsys):
  assert main.main(["sample", f"--workdir={run.workdir}", *flags]) == 2
  said = capsys.readouterr().err
  assert words in said and said.startswith("dllm: ") and said.count("\n") == 1


def test_a_picture_that_is_none(run, tmp_path, capsys):
  (tmp_path / "cat.png").write_bytes(b"no picture")
  flags = [f"--input_image={tmp_path / 'cat.png'}", "--prompt=a"]
  assert main.main(["sample", f"--workdir={run.workdir}", *flags]) == 2
  assert "cat.png is no picture" in capsys.readouterr().err


def test_a_model_of_text(tmp_path, capsys):
  text = runs.run(tmp_path / "text")
  text.train()
  flags = [f"--image={tmp_path / 'a.png'}", "--prompt=a"]
  assert main.main(["sample", f"--workdir={text.workdir}", *flags]) == 2
  assert "is a model of text alone" in capsys.readouterr().err


def test_without_a_tokenizer(run, folder, tmp_path):
  (run.workdir / images.KEPT).rename(tmp_path / "away")
  try:
    Run.open(run.workdir)
    with pytest.raises(
      FileNotFoundError, match="does not exist; give the folder"
    ):
      images.of(run.workdir, small("digits_mmada", folder).data)
    resolved = small("digits_mmada", folder, data={"image_tokenizer": None})
    with pytest.raises(ValueError, match="has no image tokenizer"):
      images.of(run.workdir, resolved.data)
  finally:
    (tmp_path / "away").rename(run.workdir / images.KEPT)


def test_leaves_and_comes_back(run, tmp_path):
  """In the published layout, with its image tokenizer: the same bytes and codes."""
  first, second = tmp_path / "first", tmp_path / "second"
  exchange.export_run(run.workdir, first)
  kept = run.workdir / images.KEPT
  exchange.import_folder(first, tmp_path / "again", image_tokenizer=kept)
  exchange.export_run(tmp_path / "again", second)
  for name in ("config.json", "model.safetensors", "tokenizer.json"):
    assert (first / name).read_bytes() == (second / name).read_bytes(), name
  again = Run.open(tmp_path / "again")
  assert again.tokenizer.images == run.tokenizer.images
  assert again.config.data.length == run.config.data.length
  draw = lambda run: images.draw(run, ["a red"], sampler=THREE).codes
  np.testing.assert_array_equal(draw(again), draw(run))


def test_evaluates(run, capsys):
  """The task's figures, of a model that has learned nothing."""
  workdir = f"--workdir={run.workdir}"
  assert not main.main([
    "evaluate", workdir, "--task=images", "--samples=4", "--at_once=2",
  ])  # fmt: skip
  last = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (
    0 <= last["drawn_accuracy"] <= 1 and last["frechet_standard_error"] >= 0
  )
  assert last["named"] == 4 and "protocol" in last
