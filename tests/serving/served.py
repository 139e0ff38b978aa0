"""Requests served by a scheduler, one round after another, beside `generate`."""

import functools

import jax
import numpy as np

from dllm_jax.core.mask import Causal
from dllm_jax.core.types import Process
from dllm_jax.parallel import make_mesh
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.policies.selection import Threshold
from dllm_jax.sampling.requests import build
from dllm_jax.serving.launch import Program
from dllm_jax.serving.requests import Committed, Draft, Finished, Request
from dllm_jax.serving.scheduler import Scheduler, Ticket
from tests.sampling import small

SEED = 5  # of `small.KEY`


def one_device() -> jax.sharding.Mesh:
  return make_mesh({"data": 1}, jax.devices()[:1])


def defaults(spec) -> RowOptions:
  """What a sampler that no configuration made does where rows say nothing."""
  rule = getattr(spec.policy, "selection", None)
  return RowOptions(
    end_ids=spec.end_ids,
    threshold=rule.value if isinstance(rule, Threshold) else None,
  )


@functools.cache
def program(spec, *, rows=3, counts=None, conditioned=False, mesh=None):
  """Returns compiled programs; equal ones are shared, and begin fresh."""
  denoiser, params = small.network(conditioned=conditioned)
  made = Program(
    spec,
    denoiser,
    params,
    Process(),
    rows=rows,
    counts=counts,
    mesh=mesh or one_device(),
    defaults=defaults(spec),
  )
  made.compile()
  return made


def templates(objective, count, *, seed=0):
  """Returns random prompts with budgets, and tokens given between.

  A causal network gets none of these, which it refuses, and rows that begin as
  its objective wants them to.
  """
  requests = small.ragged(objective, seed=seed, rows=count)
  fixed, tokens = requests.fixed, requests.tokens.copy()
  if isinstance(objective.mask_spec, Causal):
    fixed = np.cumprod(fixed, axis=1) > 0
  if objective.begin_id is not None:
    tokens[:, 0] = objective.begin_id
  return [
    tuple(
      int(token) if given else None
      for token, given, used in zip(*row, strict=True)
      if used
    )
    for row in zip(tokens, fixed, requests.valid, strict=True)
  ]


def offline(spec, rows, *, conditioned=False):
  """Returns each row's tokens by the sampling program, all in one batch."""
  requests = build(rows, objective=spec.objective, length=spec.length)
  net = small.network(conditioned=conditioned)
  made = small.sample(spec, requests, net)
  return [
    tokens[: len(row)].tolist()
    for tokens, row in zip(made.tokens, rows, strict=True)
  ]


class Heard(list):
  """Events of one request."""

  def __init__(self, template):
    super().__init__()
    self.template = template

  @property
  def reason(self):
    """Why it is over; None before that."""
    last = self[-1] if self else None
    return last.reason if isinstance(last, Finished) else None

  @property
  def tokens(self):
    """The row as far as it was told: given tokens, and None where nothing was."""
    told = list(self.template)
    for event in self:
      if isinstance(event, Committed):
        for slot, token in zip(event.slots, event.tokens, strict=True):
          told[slot] = token
    return told

  @property
  def drafts(self):
    return [event for event in self if isinstance(event, Draft)]


class Served:
  """A scheduler and what its listeners heard."""

  def __init__(self, made, *, calls=1):
    made.reset()
    self.scheduler = Scheduler(made, calls=calls)
    self.program, self.heard = made, {}

  def ticket(self, template, number, **fields):
    """Returns the ticket of a request; its events go to `heard[number]`."""
    self.heard[number] = Heard(template)
    fields = {"options": RowOptions(seed=SEED)} | fields
    request = Request(template=template, number=number, **fields)
    return Ticket(request, self.heard[number].append, lambda: None)

  def round(self, *joining):
    """One round of the engine's thread."""
    self.scheduler.cancel()
    self.scheduler.tell(
      self.scheduler.follow(self.scheduler.plan(list(joining)))
    )

  def finish(self, most=300):
    """Rounds until nobody is left."""
    for _ in range(most):
      if not self.scheduler.running:
        return
      self.round()
    raise AssertionError("rows that never end")


def at_random(made, rows, *, seed, cancels=0.1, calls=1, options=None):
  """Serves rows that join when chance has it, and of which some are cancelled.

  Returns what was heard, by number; a row that was cancelled is asked for again.
  """
  rng = np.random.default_rng(seed)
  served = Served(made, calls=calls)
  waiting = list(enumerate(rows))
  rng.shuffle(waiting)
  tickets = {}
  while waiting or served.scheduler.running:
    joining = []
    for _ in served.scheduler.free:
      if waiting and rng.random() < 0.5:
        number, row = waiting.pop()
        chosen = {} if options is None else {"options": options[number]}
        tickets[number] = served.ticket(row, number, **chosen)
        joining.append(tickets[number])
    served.round(*joining)
    for number, ticket in tickets.items():
      over = served.heard[number].reason is not None
      if not over and not ticket.cancelled and rng.random() < cancels:
        ticket.cancel()
        waiting.append((number, rows[number]))
  return served
