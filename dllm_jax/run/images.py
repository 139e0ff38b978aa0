"""What a run makes of pictures: drawn of prompts, and answers about them.

A run with image tokens keeps its image tokenizer in `image_tokenizer/`, in the
layout of published ones, so that it needs no other folder.
"""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.paths import Path
from dllm_jax.data.images import (
  decoded,
  fitted,
  ImageTokenizer,
  pixels_of,
  Sequences,
)
from dllm_jax.data.images.rows import tokens_of
from dllm_jax.models import ImageTokenizerConfig
from dllm_jax.pretrained.layouts import magvit2
from dllm_jax.sampling.generator import Sampled
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import answered

DRAWING = SamplerConfig(preset="mmada", cfg_scale=3.5)
"""How pictures are drawn, unless something else is asked for; as published."""
KEPT = "image_tokenizer"
"""The folder of a run's image tokenizer, in the run's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
  """Pictures and what they cost.

  Attributes:
    pictures: of bytes, one a prompt.
    sampled: their tokens, network calls and trace.
    codes: the code numbers of each, row by row.
  """

  pictures: np.ndarray
  sampled: Sampled
  codes: np.ndarray


def find(place: str | os.PathLike) -> magvit2.MagvitTokenizer:
  """Returns the image tokenizer of a folder, or of the run that trained one.

  Raises:
    FileNotFoundError: there is none.
    ValueError: the run trained something else.
  """
  from dllm_jax.run.run import Run  # noqa: PLC0415  It reads pictures by this.

  folder = paths.place(place)
  if (folder / "tokenizer.json").is_file() and (
    folder / "checkpoints"
  ).is_dir():
    run = Run.open(folder)
    if not isinstance(run.network, ImageTokenizerConfig):
      raise ValueError(
        f"{folder} holds a run of {run.resolved.objective.name}, no image"
        " tokenizer; train one with `dllm train --config=digits_mmada:tokenizer`"
      )
    return magvit2.MagvitTokenizer(run.network, run.state.eval_params["model"])
  return magvit2.read(folder)


def of(workdir: Path, dataset: Any) -> magvit2.MagvitTokenizer:
  """Returns the image tokenizer of a working directory: its own, or the named.

  Raises:
    FileNotFoundError: there is none.
    ValueError: none is named.
  """
  if (workdir / KEPT).is_dir():
    return magvit2.read(workdir / KEPT)
  if not dataset.image_tokenizer:
    raise ValueError(
      f"{workdir} has no image tokenizer: import the model again with"
      " --image_tokenizer, the folder of showlab/magvitv2's files, or put that"
      f" into {workdir / KEPT}"
    )
  return find(dataset.image_tokenizer)


def keep(workdir: Path, tokenizer: magvit2.MagvitTokenizer) -> None:
  """Writes an image tokenizer into a working directory, once."""
  if not (workdir / KEPT).is_dir():
    magvit2.write(workdir / KEPT, tokenizer)


def draw(
  run: Any,
  prompts: Sequence[str],
  *,
  num_samples: int = 1,
  seed: int = 0,
  sampler: SamplerConfig | None = None,
  use_ema: bool = True,
  trace: bool = False,
) -> Drawn:
  """Returns pictures that a run draws of prompts, all in one program.

  Args:
    run: a run with image tokens.
    prompts: what to draw.
    num_samples: pictures of each.
    seed: the seed.
    sampler: how to sample; None, or one of text, for `DRAWING`.
    use_ema: whether to use averaged parameters where there are any.
    trace: whether to keep every step.

  Raises:
    ValueError: the run's tokens are of text alone.
  """
  images, build = tokenizer_of(run), sequences(run)
  rows = [
    build.canvas(run.tokenizer.encode(prompt))
    for prompt in prompts
    for _ in range(num_samples)
  ]
  sampled = run.sample_rows(
    rows,
    length=build.length,
    seed=seed,
    sampler=chosen(run, sampler, draws=True),
    use_ema=use_ema,
    trace=trace,
  )
  tokens = np.asarray(sampled.generation.tokens)
  codes = tokens[:, slots(build)] - build.vocabulary.offset
  return Drawn(pictures=images.decode(codes), sampled=sampled, codes=codes)


def answer(
  run: Any,
  pictures: Sequence[tuple[str, bytes]],
  question: str,
  *,
  new_tokens: int | None = None,
  seed: int = 0,
  sampler: SamplerConfig | None = None,
  use_ema: bool = True,
  trace: bool = False,
) -> tuple[list[str], Sampled]:
  """Returns what a run answers to a question about each of some pictures.

  Args:
    run: a run with image tokens.
    pictures: their names and the bytes of their files.
    question: what is asked.
    new_tokens: tokens of an answer; None fills the row, as in training.
    seed: this and what else there is, errors too, as in `draw`.
  """
  images, build = tokenizer_of(run), sequences(run)
  size = round(build.vocabulary.tokens**0.5) * images.side
  fit = run.config.data.image_fit
  shown = [
    pixels_of(fitted(decoded(data, name), size, fit)) for name, data in pictures
  ]
  asked = [{"role": "user", "content": question}]
  text = run.tokenizer.encode(run.tokenizer.render(asked, answer=True))
  rows = []
  for codes in images.encode(np.stack(shown)):
    given = [*build.picture(codes), *(int(i) for i in text)]
    room = max(build.length - len(given), 1)
    rows.append([*given, *[None] * (new_tokens or room)])
  sampled = run.sample_rows(
    rows,
    length=max(build.length, *map(len, rows)),
    seed=seed,
    sampler=chosen(run, sampler, draws=False),
    use_ema=use_ema,
    trace=trace,
  )
  ends = run.tokenizer.end_ids
  tokens = np.asarray(sampled.generation.tokens).tolist()
  texts = [
    run.tokenizer.decode(answered(t[: len(row)], row, ends)).strip()
    for t, row in zip(tokens, rows, strict=True)
  ]
  return texts, sampled


def chosen(
  run: Any, sampler: SamplerConfig | None, *, draws: bool
) -> SamplerConfig:
  """Returns the sampler for pictures, or for text: the given one, if it is so.

  Else that of the run, which is of text, or the published one for pictures.
  """
  if sampler is not None and sampler.draws == draws:
    return sampler
  return DRAWING if draws else run.config.sampler


def sequences(run: Any) -> Sequences:
  """Returns what builds a run's rows.

  Raises:
    ValueError: its tokens are of text alone.
  """
  return Sequences(vocabulary=vocabulary(run), length=run.config.data.length)


def vocabulary(run: Any) -> ImageVocabulary:
  """Returns where a run's image tokens are.

  Raises:
    ValueError: its tokens are of text alone.
  """
  found = getattr(run.tokenizer, "images", None)
  if found is None:
    raise ValueError(
      f"{run.workdir} is a model of text alone, which draws and reads no"
      " pictures: take one with image tokens (configs/digits_mmada.py, MMaDA)"
    )
  return found


def tokenizer_of(run: Any) -> ImageTokenizer:
  """Returns the image tokenizer of a run, of the codes that the run knows.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it has other codes; the run's tokens are of text alone.
  """
  known = vocabulary(run)
  images = of(run.workdir, run.config.data)
  if images.codes != known.codes:
    raise ValueError(
      f"the image tokenizer of {run.workdir} has {images.codes} codes, and its"
      f" model {known.codes}: they belong to different models"
    )
  tokens_of(images, round(known.tokens**0.5) * images.side)
  return images


def slots(build: Sequences) -> slice:
  """Returns where the tokens of a drawn picture are in its row."""
  first = build.room + 2
  return slice(first, first + build.vocabulary.tokens)
