"""The files of a working directory that say what its run is."""

import json

from ml_collections import ConfigDict

from dllm_jax import data
from dllm_jax.config import config as configs
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.data.conversations import templated
from dllm_jax.data.tokenizer import Tokenizer, tokenizer_from_json
from dllm_jax.training.checkpoint import steps_in

PUBLISHED = "published"
"""The folder of what an import keeps for the way out."""


def begin(workdir: Path, resolved: ConfigDict, tokenizer: Tokenizer) -> None:
  """Writes the configuration and the tokenizer of a run."""
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(workdir / "tokenizer.json", tokenizer.to_json() + "\n")
  write_whole(workdir / "config.json", resolved.to_json(indent=2) + "\n")


def check_empty(workdir: Path) -> None:
  """Raises ValueError if a directory holds more than a start that was killed."""
  begun = lambda p: (
    p.name in ("tokenizer.json", "image_tokenizer") or p.suffix == ".tmp"
  )
  if workdir.exists() and not all(map(begun, workdir.iterdir())):
    raise ValueError(
      f"{workdir} is not empty and holds no run; use another --workdir"
    )


def check_same(workdir: Path, resolved: ConfigDict) -> None:
  """Checks that a run may go on with a configuration.

  Raises:
    ValueError: it has trained with another one.
  """
  old = json.loads(configs.stored(workdir).to_json())
  changed = configs.differences(old, json.loads(resolved.to_json()))
  if changed and steps_in(workdir) != [0]:  # imported, not trained yet
    raise ValueError(
      f"{workdir} holds a run with another configuration ("
      + "; ".join(changed[:3])
      + "); use another --workdir, or only change mesh, logging, "
      "checkpoint and training.steps"
    )


def load_corpus(workdir: Path, resolved: ConfigDict) -> "data.Corpus":
  """Returns the text of a run that begins, or goes on, in a directory.

  Raises:
    ValueError: the directory holds something else.
    FileNotFoundError: the text does not exist.
  """
  config = configs.parse(resolved)
  dataset, tokenizer = config.data, None
  if (workdir / "config.json").exists():
    check_same(workdir, resolved)
    tokenizer = read_tokenizer(workdir)
    if dataset.template != configs.stored(workdir).data.template:
      tokenizer = templated(tokenizer, dataset.template)
  else:
    check_empty(workdir)
  corpus = read_corpus(config, tokenizer, workdir)
  compared = any(r.form.startswith("preferences") for r in corpus.reports)
  if compared and dataset.format is None:
    raise ValueError(
      f"{dataset.path} holds preferences (chosen, rejected), which dllm align "
      "trains on; data.format=preferences trains on the chosen answers"
    )
  return corpus


def read_corpus(
  config: configs.Config, tokenizer: Tokenizer | None, workdir: Path
) -> "data.Corpus":
  """Returns the text of a configuration, as its objective wants it filled."""
  pictures = None
  if config.data.format == "images":
    from dllm_jax.run import images  # noqa: PLC0415  It opens runs itself.

    pictures = images.of(workdir, config.data)
  return data.load(
    config.data, tokenizer=tokenizer, fill=config.fill, images=pictures
  )


def read_tokenizer(workdir: Path) -> Tokenizer:
  """Returns the tokenizer of a run.

  Raises:
    FileNotFoundError: its file is not there.
  """
  path = workdir / "tokenizer.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} is missing; restore it from a copy of the run"
    )
  return tokenizer_from_json(path.read_text(encoding="utf-8"))
