"""How far a small model's decisions can be trusted, on a task that is generated.

    python -m tests.sampling.decisions.calibration --workdir=runs/coins

A row is eight flips of a coin with a chance of its own, and the question how it
falls next; whoever counts right is sure by (heads + 1) / 10, and is right as
often. The model sees few rows, many times, so that it is too sure. `dllm train`
and `dllm decide --fit` do the work: half of some questions that no row has had fit a
temperature, the others say the expected calibration error with it and without.
Prints JSON.
"""

import argparse
import json
import pathlib
import random

from dllm_jax.cli.main import main as dllm
from dllm_jax.run.run import Run
from dllm_jax.sampling.decisions import laid_out, Question

QUESTION = Question(instructions="next?", labels=("h", "t"))
FLIPS = 8


def coins(count: int, seed: int) -> list[tuple[str, str]]:
  """Returns the flips of some coins, and the next one of each."""
  draw, found = random.Random(seed), []
  for _ in range(count):
    chance = draw.random()
    flip = lambda chance=chance: "h" if draw.random() < chance else "t"
    found.append(("".join(flip() for _ in range(FLIPS)), flip()))
  return found


def row(flips: str, after: str) -> str:
  """Returns a coin as decisions have it on their canvas."""
  return f"{flips}\n\nQ1: next? [h; t]\nA1: {after}\n"


def trained(folder: pathlib.Path, rows: int, steps: int) -> None:
  """Trains a model on coins, each a row."""
  text = [row(*coin) for coin in coins(rows, seed=0)]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "coins.txt").write_text("".join(text), encoding="utf-8")
  held_out = [row(*coin) for coin in coins(200, seed=1)]
  (folder / "held_out.txt").write_text("".join(held_out), encoding="utf-8")
  fields = {
    "data.path": folder / "coins.txt",
    "data.held_out_path": folder / "held_out.txt",
    "data.length": len(text[0]),
    "training.steps": steps,
    "training.batch_size": 64,
    "optimizer.learning_rate": 2e-3,
    "checkpoint.every_steps": steps,
    "logging.progress": "false",
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  where = f"--workdir={folder / 'run'}"
  if dllm(["train", "--config=configs/smoke.py", where, *flags]):
    raise SystemExit("training failed")


def checked(folder: pathlib.Path) -> None:
  """Raises SystemExit unless rows are what decisions ask for."""
  run = Run.open(folder / "run")
  made = laid_out("h" * FLIPS, [QUESTION], run.tokenizer)
  wanted = run.tokenizer.encode(row("h" * FLIPS, "h")).tolist()
  free = [i for i, token in enumerate(made.row) if token is None]
  same = [made.row[i] for i in range(len(wanted)) if i not in free]
  if same != [wanted[i] for i in range(len(wanted)) if i not in free]:
    raise SystemExit(
      "decisions lay out another text than the model has learned"
    )


def main() -> None:
  """Trains, decides and prints."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("--workdir", required=True)
  flags.add_argument("--rows", type=int, default=400)
  flags.add_argument("--steps", type=int, default=1500)
  flags.add_argument("--questions", type=int, default=4000)
  args = flags.parse_args()
  folder = pathlib.Path(args.workdir)
  trained(folder, args.rows, args.steps)
  checked(folder)
  asked = coins(args.questions, seed=2)
  lines = [
    {
      "context": flips,
      "question": QUESTION.instructions,
      "labels": QUESTION.labels,
      "answer": after,
    }
    for flips, after in asked
  ]
  file = folder / "questions.jsonl"
  file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
  if dllm(["decide", f"--workdir={folder / 'run'}", f"--fit={file}"]):
    raise SystemExit("dllm decide failed")
  best = [
    (flips.count("h") * 2 >= FLIPS) == (after == "h") for flips, after in asked
  ]
  print(json.dumps({"accuracy_of_counting": sum(best) / len(best)}))


if __name__ == "__main__":
  main()
