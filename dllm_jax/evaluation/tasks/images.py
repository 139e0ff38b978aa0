"""`--task=images`: what a model with image tokens draws, and says of pictures.

A judge that is trained here on the model's training pictures (`samples/pictures`)
says whether a drawn picture is what was asked for; drawn and held-out pictures
are compared under its features; held-out pictures are asked about, and an answer
is right if it is the caption.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from dllm_jax.core import check
from dllm_jax.data.images.pictures import pixels_of, png
from dllm_jax.data.images.rows import Reading
from dllm_jax.evaluation.benchmarks.recall import wilson
from dllm_jax.evaluation.samples import pictures as judging
from dllm_jax.evaluation.tasks.registry import option, Setting, Task
from dllm_jax.run import images

_CLASSES = 100  # That a judge can tell apart, at most.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
  """What `--task=images` is told.

  Attributes: as their help says.
  """

  samples: int = option(200, "pictures to draw, and held-out ones to ask about")
  at_once: int = option(50, "pictures in a batch")
  epochs: int = option(4, "how often the judge sees each training picture")
  seed: int = option(0, "the seed of what is drawn")

  def __post_init__(self):
    check.at_least(self, 2, "samples", prefix="--")
    check.at_least(self, 1, "at_once", "epochs", prefix="--")


def _run(setting: Setting, options: Images) -> Mapping[str, Any]:
  run = setting.run
  images.vocabulary(run)
  sides = _pictures(run)
  classes = sorted({caption for caption, _ in sides[0]})
  if not 2 <= len(classes) <= _CLASSES or not sides[1]:
    raise ValueError(
      f"{run.config.data.path} has {len(classes)} captions and {len(sides[1])}"
      f" held-out pictures; a judge needs from 2 to {_CLASSES} captions, and"
      " some pictures to compare with: raise data.held_out"
    )
  number = {caption: i for i, caption in enumerate(classes)}
  stacked = [np.stack([p for _, p in side]) for side in sides]
  labels = [np.array([number.get(c, -1) for c, _ in side]) for side in sides]
  judge = judging.trained(stacked[0], labels[0], classes, epochs=options.epochs)
  chosen, real = judge.look(stacked[1])
  asked = [classes[i % len(classes)] for i in range(options.samples)]
  drawn = _drawn(setting, options, asked)
  found, features = judge.look(drawn.astype(np.float32) / 127.5 - 1.0)
  right = int(
    np.sum([classes[i] == c for i, c in zip(found, asked, strict=True)])
  )
  distance, error = judging.with_error(features, real)
  some = np.random.default_rng(0).permutation(len(stacked[0]))
  floor = judging.frechet_distance(
    judge.look(stacked[0][some[: options.samples]])[1], real
  )
  named = _named(setting, options, sides[1])
  return {
    "protocol": setting.protocol(dataclasses.asdict(options)),
    "judge_accuracy_on_held_out": float(np.mean(chosen == labels[1])),
    "drawn": len(asked),
    "drawn_accuracy": right / len(asked),
    "drawn_interval": wilson(right / len(asked), len(asked)),
    "frechet_distance": distance,
    "frechet_standard_error": error,
    "frechet_of_as_many_training_pictures": floor,
    **named,
  }


def _pictures(run: Any) -> tuple[list, list]:
  """Returns captions and pictures in [-1, 1], of training and held out."""
  size = round(images.vocabulary(run).tokens ** 0.5)
  size *= images.tokenizer_of(run).side
  dataset = dataclasses.replace(run.config.data, image_size=size)
  sides = [], []
  for held, record, image in Reading(dataset):
    if image is not None and record.text is not None:
      sides[held].append((record.text, pixels_of(image)))
  return sides


def _drawn(setting: Setting, options: Images, asked: list[str]) -> np.ndarray:
  made = []
  for start in range(0, len(asked), options.at_once):
    part = asked[start : start + options.at_once]
    part += [part[-1]] * (options.at_once - len(part))  # one program
    found = images.draw(
      setting.run,
      part,
      seed=options.seed + start,
      sampler=setting.sampler,
      use_ema=setting.use_ema,
    )
    made.append(found.pictures)
  return np.concatenate(made)[: len(asked)]


def _named(setting: Setting, options: Images, held: list) -> dict[str, Any]:
  """Returns how many held-out pictures are given their own caption."""
  chosen, right = held[: options.samples], 0
  for start in range(0, len(chosen), options.at_once):
    part = chosen[start : start + options.at_once]
    filled = part + [part[-1]] * (options.at_once - len(part))
    files = [
      ("held out", png(np.round((p + 1.0) * 127.5).astype(np.uint8)))
      for _, p in filled
    ]
    texts, _ = images.answer(
      setting.run,
      files,
      setting.run.config.data.question,
      seed=options.seed,
      sampler=setting.sampler,
      use_ema=setting.use_ema,
    )
    answers = zip(texts, part, strict=False)
    right += sum(text == caption for text, (caption, _) in answers)
  return {
    "named": len(chosen),
    "caption_exact_match": right / len(chosen),
    "caption_interval": wilson(right / len(chosen), len(chosen)),
  }


def _text(figures: Mapping[str, Any]) -> str:
  between = lambda name: "{:.3f} to {:.3f}".format(*figures[name])
  return "\n".join([
    f"drawn as asked     {figures['drawn_accuracy']:.3f}"
    f"  ({between('drawn_interval')}, of {figures['drawn']}; the judge is right"
    f" on {figures['judge_accuracy_on_held_out']:.3f} of held-out pictures)",
    f"Frechet distance   {figures['frechet_distance']:.3f}"
    f" +- {figures['frechet_standard_error']:.3f}"
    f"  (as many training pictures:"
    f" {figures['frechet_of_as_many_training_pictures']:.3f})",
    f"captions           {figures['caption_exact_match']:.3f}"
    f"  ({between('caption_interval')}, of {figures['named']})",
  ])


TASK = Task(
  summary="pictures drawn and named, by a judge trained here",
  run=_run,
  text=_text,
  options=Images,
)
