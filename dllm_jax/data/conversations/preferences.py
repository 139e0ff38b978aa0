"""Preferences: two answers to a prompt, of which one is better."""

from typing import NamedTuple

from dllm_jax.data import source
from dllm_jax.data.conversations import supervision
from dllm_jax.data.conversations.examples import Example, find, Reading
from dllm_jax.data.dataset import Dataset
from dllm_jax.data.huggingface import HuggingFace


class Pair(NamedTuple):
  """Two answers to one prompt.

  Attributes:
    chosen: the better one, behind its prompt.
    rejected: the other one, behind the same prompt.
  """

  chosen: Example
  rejected: Example


class Preferences(NamedTuple):
  """The pairs of a data set.

  Attributes:
    train: what to train on.
    held_out: what to evaluate on.
  """

  train: list[Pair]
  held_out: list[Pair]


def load_preferences(dataset: Dataset, tokenizer: HuggingFace) -> Preferences:
  """Returns the preferences that a dataset names, as pairs of examples.

  Args:
    dataset: what to read; a pair longer than `length` is dropped or shortened as
      `too_long` says.
    tokenizer: that of the model, with its template, unless `dataset` names one.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: a row cannot be trained on (the answers are the same, there is no
      prompt), and `skip_bad` is off; the data are no preferences; there are
      none.
  """
  form, files = find(dataset, dataset.path)
  if form.name != "preferences":
    raise ValueError(
      f"{dataset.path} holds conversations ({form.name}), not preferences: rows "
      "with chosen and rejected are needed"
    )
  tokenizer = supervision.templated(tokenizer, dataset.template)
  reading = Reading(dataset, tokenizer, form)
  sides = [], []
  for row, (chosen, rejected) in reading.read(files):
    held = source.is_held_out(row.key(), dataset.held_out_of_path)
    sides[held].append(Pair(chosen.example, rejected.example))
  if dataset.held_out_path:
    held_out = source.find(dataset.held_out_path)
    for _, (chosen, rejected) in reading.read(held_out):
      sides[1].append(Pair(chosen.example, rejected.example))
  if not sides[0]:
    raise reading.nothing(files)
  return Preferences(*sides)
