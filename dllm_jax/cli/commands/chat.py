"""`dllm chat`: talks to a model that has a chat template, in the terminal."""

from collections.abc import Mapping
import sys
from typing import Any

from dllm_jax.cli import command as commands


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run to talk to")
  flag.integer("new_tokens", 128, "tokens of an answer, at most", lower_bound=1)
  flag.string("system", "", "what the model is told first")
  flag.integer("seed", 0, "seed of the answers")
  flag.use_ema()
  flag.bool("watch", False, "play each answer as it was unmasked")


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/llada")

  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top
  from dllm_jax.sampling import requests  # pylint: disable=g-import-not-at-top
  from dllm_jax.sampling.traces import terminal  # pylint: disable=g-import-not-at-top

  run = Run.open(workdir)
  if getattr(run.tokenizer, "chat_template", None) is None:
    raise commands.UsageError(
      f"the model in {workdir} has no chat template: use dllm sample, or a "
      "model that was tuned to talk"
    )
  sampler = commands.sampler(values, argv, run.config.sampler)
  # A sampler that cannot be is refused before anything is typed.
  run.generator.plan([[None] * values.new_tokens], length=None, sampler=sampler)
  messages = []
  if values.system:
    messages.append({"role": "system", "content": values.system})
  print(
    "Type a message; an empty line, Ctrl-D or Ctrl-C ends.", file=sys.stderr
  )
  answers, calls = [], 0
  while text := _ask():
    messages.append({"role": "user", "content": text})
    row = [int(i) for i in run.tokenizer.chat(messages)]
    row += [None] * values.new_tokens
    try:
      sampled = run.sample_rows(
        [row],
        seed=values.seed + len(answers),
        sampler=sampler,
        use_ema=values.use_ema,
        trace=values.watch,
      )
    except ValueError as error:  # such as a mask token in the message
      print(f"dllm: {error}", file=sys.stderr)
      messages.pop()
      continue
    if values.watch:
      terminal.play(sampled.generation.trace, run.tokenizer.decode)
    new = requests.answered(sampled.rows[0], row, run.tokenizer.end_ids)
    answer = run.tokenizer.decode(new).strip()
    messages.append({"role": "assistant", "content": answer})
    answers.append(answer)
    calls += int(sampled.generation.function_evaluations[0])
    print(answer, flush=True)
  return {"answers": answers, "function_evaluations": calls}


def _ask() -> str:
  """Returns the next message, "" at the end of input or at Ctrl-C."""
  sys.stderr.write("> ")
  sys.stderr.flush()
  try:
    line = sys.stdin.readline()
  except KeyboardInterrupt:
    line = ""
  if not line.endswith("\n"):
    sys.stderr.write("\n")  # The terminal is left on a line of its own.
  return line.strip()


COMMAND = commands.Command(
  name="chat",
  summary="Talks to a model that has a chat template.",
  define=_define,
  run=_run,
  overrides=("sampler",),
)
