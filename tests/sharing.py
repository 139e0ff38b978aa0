"""What is equal is traced and compiled once a process, whoever asks for it.

Every run, generator and scorer jits programs of its own, so that a test that
makes a second run of one configuration would compile it all again. Here a program
is kept under what it is made of, and handed to whoever is made of the same.
Nothing is kept whose parts cannot be told by their names.
"""

from collections.abc import Callable
import functools
import json
from typing import Any

from dllm_jax.evaluation.likelihood.scorer import Scorer
from dllm_jax.parallel.compilation import step_options
from dllm_jax.pretrained.load import Pretrained
from dllm_jax.run.run import Run
from dllm_jax.sampling.generator import Generator
from dllm_jax.sampling.launch import Launcher
from dllm_jax.training.held_out import HeldOut

# The part of a configuration that no program depends on.
_ASIDE = ("checkpoint", "logging", "evaluation", "sampler", "mesh", "data")
_ASIDE_OF_TRAINING = ("hang_seconds", "heartbeat_seconds", "profile_steps")

_kept: dict[Any, Any] = {}
_networks: dict[int, Any] = {}  # The id of a kept network to its name.


def _keep(key: tuple, make: Callable[[], Any]) -> Any:
  """Returns what was made for an equal key, or makes it."""
  name = repr(key)
  if " at 0x" in name or "..." in name:  # told by no name
    return make()
  if name not in _kept:
    _kept[name] = make()
  return _kept[name]


def _network(denoiser) -> str:
  """Returns the name of a network: that of a kept one, or one of no other."""
  return _networks.get(id(denoiser), f"a network at 0x{id(denoiser):x}")


def _places(mesh) -> tuple | None:
  """Returns the sizes of a mesh and its devices."""
  return mesh and (mesh.shape, [d.id for d in mesh.devices.flat])


def _configured(run: Run) -> tuple:
  """Returns what a train step is made of."""
  given = run.resolved.to_dict()
  given = {k: v for k, v in given.items() if k not in _ASIDE}
  training = dict(given.pop("training"))
  optimizer = run.config.optimizer
  if optimizer.schedule == "constant":  # of its length, the warm-up reads some
    training["steps"] = min(training["steps"], optimizer.warmup_steps)
  for name in _ASIDE_OF_TRAINING:
    del training[name]
  text = json.dumps([given, training], sort_keys=True, default=repr)
  length, network = run.config.data.length, _network(run.denoiser)
  places = _places(run.mesh), step_options(run.mesh)
  return text, repr(run.objective), length, network, places


def _scored(scorer: Scorer) -> tuple:
  """Returns what a scorer is made of, its guidance apart."""
  objective, places = scorer.objective, _places(scorer._mesh)
  return objective, scorer.estimator, places, _network(scorer.denoiser)


def _wrap(patch, cls, name: str, key: Callable[[Any], tuple]) -> None:
  """Makes a cached property of a class one for all whose keys are equal."""
  own = cls.__dict__[name].func
  shared = functools.cached_property(
    lambda self: _keep((cls.__name__, name, key(self)), lambda: own(self))
  )
  shared.__set_name__(cls, name)
  patch.setattr(cls, name, shared)


def share(patch) -> None:
  """Lets equal programs be one.

  Args:
    patch: a `pytest.MonkeyPatch`.
  """
  begin, score, launcher = Run.__init__, Scorer.__init__, Generator._launcher
  flops = Run.model_flops

  def of_run(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    name = (type(self.network).__name__, self.network)
    self.denoiser = _keep(("network", name), lambda: self.denoiser)
    self.generator.denoiser = self.denoiser
    _networks.setdefault(id(self.denoiser), repr(name))

  def of_scorer(self, **kwargs):
    score(self, **kwargs)
    key = "score", _scored(self), self._scale
    self._program = _keep(key, lambda: self._program)

  def of_generator(self, sampler, trace) -> Launcher:
    made = launcher(self, sampler, trace)
    key = "launch", sampler, trace, _places(self.mesh), _network(self.denoiser)
    made._program = _keep(key, lambda: made._program)
    return made

  patch.setattr(Run, "__init__", of_run)
  patch.setattr(Scorer, "__init__", of_scorer)
  patch.setattr(Generator, "_launcher", of_generator)
  patch.setattr(
    Run,
    "model_flops",
    lambda self: _keep(("flops", _configured(self)), lambda: flops(self)),
  )
  _wrap(patch, Run, "program", _configured)
  _wrap(patch, Run, "served", _configured)
  of_text = lambda self: (
    self.objective,
    _network(self.denoiser),
    _places(self.mesh),
  )
  _wrap(patch, Scorer, "_two_streams", _scored)
  _wrap(patch, HeldOut, "_sums", of_text)
  _wrap(patch, HeldOut, "_measures", of_text)
  _wrap(
    patch,
    Pretrained,
    "_program",
    lambda self: (
      self.family.name,
      self.config,
      self.objective,
      _places(self.mesh),
    ),
  )
