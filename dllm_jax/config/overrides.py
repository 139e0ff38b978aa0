"""Fields of a resolved configuration that are given anew, by their paths."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from dllm_jax.config import config as configs


def check(
  config: ConfigDict, paths: Sequence[str], root: str = "config"
) -> None:
  """Checks that `a.b.c` paths name fields of a resolved config.

  Args:
    config: the resolved config, or a section of one.
    paths: paths inside it.
    root: what the config is called, for messages.

  Raises:
    ValueError: one does not; the message names the legal fields there.
  """
  for path in paths:
    node, where = config, root
    for part in path.split("."):
      if not isinstance(node, ConfigDict):
        raise ValueError(f"{where} is a value and has no field {part!r}")
      configs.check_names("field", [part], list(node.keys()), where)
      node, where = node[part], f"{where}.{part}"


def named(config: ConfigDict, names: Mapping[str, str]) -> ConfigDict:
  """Returns a resolved config in which other choices have their own fields.

  A field that has a name, such as `objective.schedule`, is one of several
  dataclasses. Where another one is named, the fields of the one before give way to
  its defaults. Names of sections are `config.load`'s matter.

  Args:
    config: the resolved config.
    names: names by path, `objective.schedule.name`.

  Raises:
    ValueError: there is no such choice.
  """
  for path, name in sorted(names.items(), key=lambda one: one[0].count(".")):
    *above, field, _ = path.split(".")
    given = node = config.to_dict()
    for part in above:
      node = node.get(part, {}) if isinstance(node, dict) else {}
    chosen = node.get(field)
    if above and isinstance(chosen, dict) and chosen.get("name", name) != name:
      node[field] = {"name": name}
      config = configs.resolve(given)
  return config
