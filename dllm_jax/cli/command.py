"""Parsing of one command's flags, absl's form, and its help text.

`--config.path.to.field=value` overrides a field of the configuration; other
sections (`--sampler.steps=8`) work alike. Nothing here knows any one command.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import os
import shutil
import sys
import textwrap
from typing import Any

from absl import flags
from ml_collections import config_flags, ConfigDict

from dllm_jax.config import config as configs
from dllm_jax.config import overrides
from dllm_jax.core import paths


class _Path(flags.ArgumentParser):
  """A place on disk."""

  syntactic_help = "a path"

  def parse(self, argument: str) -> str:
    return paths.expanded(argument)


class Flags:
  """absl's `DEFINE_integer` and its like as methods, for one command's flags."""

  def __init__(self, values: flags.FlagValues):
    self._values = values

  def __getattr__(self, kind: str) -> Callable[..., Any]:
    define = getattr(flags, f"DEFINE_{kind}")
    return functools.partial(define, flag_values=self._values)

  def path(self, name: str, default: str | None, text: str) -> None:
    """Defines a flag that names a place; `~` in it is the home directory."""
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(
      _Path(),
      name,
      default,
      text,
      flag_values=self._values,
      serializer=serializer,
    )

  def use_ema(self, verb: str = "use") -> None:
    """Defines --use_ema."""
    text = f"{verb} averaged parameters where the run has them"
    self.bool("use_ema", True, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """One command of `dllm`.

  Attributes:
    name: what it is called by.
    summary: one line for the list of commands.
    define: adds its flags.
    run: does it, given the arguments; returns the last line's JSON object.
    overrides: sections of the configuration that flags such as
      `--sampler.steps` override.
    sections: sections of the command's own, by name: what returns their
      defaults, a frozen dataclass.
    positional: names that the first argument may have, if it takes one.
    variant: the command with the flags that some arguments bring with them.
  """

  name: str
  summary: str
  define: Callable[[Flags], None]
  run: Callable[[list[str]], Mapping[str, Any]]
  overrides: Sequence[str] = ()
  sections: Mapping[str, Callable[[], Any]] = dataclasses.field(
    default_factory=dict
  )
  positional: Sequence[str] = ()
  variant: Callable[[Sequence[str]], "Command"] | None = None


class UsageError(ValueError):
  """The caller's mistake on the command line."""


def join() -> None:
  """Joins the other processes of a job; only the first goes on printing."""
  from dllm_jax.parallel import distributed  # pylint: disable=g-import-not-at-top

  distributed.initialise()
  if distributed.index():
    # One that is not the first has nothing to say but its errors.
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def numbers(name: str, given: list[str], kind: type) -> list:
  """Returns the numbers that a flag lists.

  Args:
    name: the flag.
    given: what was given, split at its commas.
    kind: int or float.

  Raises:
    UsageError: one is no number.
  """
  try:
    return [kind(one) for one in given]
  except ValueError as error:
    raise UsageError(
      f"--{name} are numbers with commas between, not {','.join(given)!r}"
    ) from error


def required(values: flags.FlagValues, name: str, example: str) -> Any:
  """Returns a flag's value.

  Raises:
    UsageError: it was not given.
  """
  value = values[name].value
  if value in (None, ""):
    raise UsageError(f"--{name} must be given, for example --{name}={example}")
  return value


def take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
  """Returns the value of `--name=value` or `--name value`, and what is left."""
  value, rest, waiting = None, [], False
  for arg in argv:
    flag = arg.lstrip("-") if arg.startswith("-") else None
    if waiting:
      value, waiting = arg, False
    elif flag == name:
      waiting = True
    elif flag is not None and flag.startswith(f"{name}="):
      value = flag.split("=", 1)[1]
    else:
      rest.append(arg)
  if waiting:
    raise UsageError(f"--{name} needs a value")
  return value, rest


def _overridden(argv: Sequence[str], section: str) -> list[str]:
  """Returns the paths that `--section.path=value` flags name."""
  paths = []
  for arg in argv:
    flag = arg.lstrip("-").split("=", 1)[0]
    for prefix in (f"{section}.", f"no{section}."):
      if arg.startswith("-") and flag.startswith(prefix):
        paths.append(flag[len(prefix) :])
  return paths


def define_section(
  values: flags.FlagValues, name: str, fields: ConfigDict, argv: Sequence[str]
) -> None:
  """Makes `--name.path=value` override a field.

  Raises:
    ValueError: an argument names no field.
  """
  given = _overridden(argv, name)
  if name == "config":
    chosen = [path for path in given if path.endswith(".name")]
    fields = overrides.named(
      fields, {path: take(argv, f"config.{path}")[0] for path in chosen}
    )
  overrides.check(fields, given, name)
  config_flags.DEFINE_config_dict(
    name, fields, flag_values=values, sys_argv=["dllm", *argv]
  )


def overridden(
  fields: ConfigDict, argv: Sequence[str]
) -> tuple[ConfigDict, list[str]]:
  """Returns a configuration as `--config.path=value` have it, and what is left.

  Raises:
    ValueError: an argument names no field.
    UsageError: a value is not legal.
  """
  begins = ("-config.", "--config.", "-noconfig.", "--noconfig.")
  own = [arg for arg in argv if arg.startswith(begins)]
  rest = [arg for arg in argv if not arg.startswith(begins)]
  values = flags.FlagValues()
  define_section(values, "config", fields, own)
  try:
    values(["dllm", *own])
  except flags.Error as error:
    raise UsageError(" ".join(str(error).split())) from error
  return values["config"].value, rest


def load_config(argv: Sequence[str]) -> tuple[ConfigDict | None, list[str]]:
  """Returns the configuration that the arguments name, and what is left."""
  name, rest = take(argv, "config")
  names = {}
  for section in ("objective", "model"):
    value, _ = take(argv, f"config.{section}.name")
    if value is not None:
      names[section] = value
  return (configs.load(name, names) if name else None), rest


def _stored(workdir: str | None) -> ConfigDict | None:
  """Returns the configuration of a run that exists, else None."""
  if workdir and (paths.place(workdir) / "config.json").is_file():
    return configs.stored(workdir)
  return None


def _sections(command: Command) -> dict[str, ConfigDict]:
  """Returns the defaults of all sections but the configuration itself."""
  given = [name for name in command.overrides if name != "config"]
  fields = {name: configs.resolve({})[name] for name in given}
  own = {
    name: ConfigDict(dataclasses.asdict(defaults()))
    for name, defaults in command.sections.items()
  }
  return fields | own


def parse(command: Command, argv: Sequence[str]) -> flags.FlagValues:
  """Returns the parsed flags of a command.

  Raises:
    UsageError: a flag is unknown or has an illegal value.
  """
  values = flags.FlagValues()
  command.define(Flags(values))
  rest = list(argv)
  try:
    if "config" in command.overrides:
      fields, rest = load_config(rest)
      workdir, _ = take(rest, "workdir")
      if fields is None and _overridden(rest, "config"):
        fields = _stored(workdir)
      if fields is not None:
        define_section(values, "config", fields, rest)
      else:
        flags.DEFINE_string("config", None, "", flag_values=values)
        if _overridden(rest, "config"):
          none = f"; there is no run in {workdir}" if workdir else ""
          raise UsageError(
            "--config.* fields need a --config to override, for example "
            f"--config=shakespeare{none}"
          )
    for section, fields in _sections(command).items():
      define_section(values, section, fields, rest)
    left = values(["dllm", *rest])[1:]
  except flags.Error as error:
    message = " ".join(str(error).split()) + _meant(command, error)
    raise UsageError(f"{message} (see dllm {command.name} --help)") from error
  if left:
    raise UsageError(
      f"unexpected argument {left[0]!r}; dllm {command.name} takes flags only "
      f"(see dllm {command.name} --help)"
    )
  return values


def _meant(command: Command, error: flags.Error) -> str:
  """Returns which flags set a field that was named without its section."""
  name = getattr(error, "flagname", "")
  sections = _sections(command).items()
  found = [f"--{section}.{name}" for section, x in sections if name in x]
  return f"; did you mean {' or '.join(found)}?" if found else ""


def sampler(
  values: flags.FlagValues, argv: Sequence[str], configured: Any
) -> Any:
  """Returns a run's sampler with the fields that the arguments name replaced."""
  names = {path for path in _overridden(argv, "sampler")}
  if "preset" in names and values["sampler"].value.preset != configured.preset:
    configured = type(configured)()  # another preset: its own defaults
  fields = values["sampler"].value
  return dataclasses.replace(configured, **{n: fields[n] for n in names})


def trained(
  workdir: str | os.PathLike, summary: Mapping[str, Any]
) -> Mapping[str, Any]:
  """Returns the last line of a command that trains, and says if it was stopped.

  Args:
    workdir: the directory of what was trained.
    summary: of the training.
  """
  if summary["interrupted"]:
    print(
      f"stopped at step {summary['step']} and saved; the same command "
      "continues from there",
      flush=True,
    )
  return {"workdir": str(workdir), **summary}


def help_text(command: Command) -> str:
  """Returns what `dllm COMMAND --help` prints."""
  values = flags.FlagValues()
  command.define(Flags(values))
  width = max(40, min(shutil.get_terminal_size().columns, 88))
  lines = [
    f"usage: dllm {command.name} "
    + (f"{{{','.join(command.positional)}}} " if command.positional else "")
    + "[--flag=value ...]",
    "",
    *textwrap.wrap(command.summary, width),
    "",
    "flags:",
  ]
  for name in values:
    flag = values[name]
    lines.append(f"  --{name}")
    default = (
      "" if flag.default in (None, "") else f" (default: {flag.default})"
    )
    lines += textwrap.wrap(
      " ".join(flag.help.split()) + default,
      width,
      initial_indent="      ",
      subsequent_indent="      ",
    )
  if "config" in command.overrides:
    lines += [
      "  --config=FILE or a bundled name (see `dllm configs`)",
      "  --config.path.to.field=value",
      "      overrides any field of the configuration, for example",
      "      --config.training.steps=100",
    ]
  for section, fields in _sections(command).items():
    lines.append(f"  --{section}.FIELD=value")
    lines += textwrap.wrap(
      ", ".join(f"{k}={v}" for k, v in fields.to_dict().items()),
      width,
      initial_indent="      ",
      subsequent_indent="      ",
    )
  return "\n".join(lines)
