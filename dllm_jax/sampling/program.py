"""The one sampling program: the whole unmasking inside one XLA program.

    prior -> clamp what is fixed -> loop over blocks(
        policy.init -> loop over steps( network -> policy.step ) ) -> decode

Block k of a row covers the `block_length` slots at its own pointer, counted
from the end of its prompt or from slot 0; a block as long as the canvas is
plain diffusion. Pure functions only: the program is compiled in `launch`, a
policy decides what is revealed, `step` has the steps, `loop` their loops, and
`forward` calls the network. A row's tokens depend on its own slots, number and
noise, never on its neighbours.
"""

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import Batch, Denoiser, ModelOutputs, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.forward import Network
from dllm_jax.sampling.loop import blocks, finished, prefilled
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.sampling.speculation.rounds import speculate
from dllm_jax.sampling.speculation.sliding import slide
from dllm_jax.sampling.step import NoiseAt, Run, started
from dllm_jax.sampling.traces.trace import Trace


@struct.dataclass
class Generation:
  """What a sampler returns.

  Attributes:
    tokens: the finished canvases; unused slots hold what the request had there.
    function_evaluations: network calls that each row needed; both branches of
      guidance are one.
    revealed_at: the row's own step, from 0, at which each slot took the token
      that it has: the last such step, where tokens are masked again or
      replaced; the last step of all, where latents are vectors; -1 where
      nothing was drawn.
    log_prob: of that token at that step, in nats: under the distribution that
      it was drawn from, filters, penalties, temperature, top-k, top-p and min-p
      included, on the condition that the slot took a token (that a process
      leaves masks is no choice among tokens). Where nothing is drawn but the
      best token taken, at temperature 0, the distribution without temperature.
      This is what a policy gradient on a trajectory needs, and what OpenAI's
      clients get as `logprob`. 0 where `revealed_at` is -1, and where latents
      are vectors.
    top_ids: the likeliest tokens there, best first, as many as `policy.top`;
      None for 0.
    top_log_probs: how likely they were, under the same distribution; -inf where
      it has fewer tokens.
    trace: every step of it, if it was asked for.
  """

  tokens: Int[Array, "B T"]
  function_evaluations: Int[Array, "B"]
  revealed_at: Int[Array, "B T"]
  log_prob: Float[Array, "B T"]
  top_ids: Int[Array, "B T k"] | None = None
  top_log_probs: Float[Array, "B T k"] | None = None
  trace: Trace | None = None


def generate(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  *,
  trace: bool = False,
  noise: NoiseAt | None = None,
) -> Generation:
  """Returns samples of a batch of requests.

  Args:
    sampler: how to sample (static).
    denoiser: the network.
    params: its parameters.
    process: the arrays of the objective.
    key: the seed, for rows without their own. Noise is a function of (key,
      request, the row's own step, slot) and the kind of draw, and of nothing
      else.
    requests: what is fixed, and what is wanted.
    trace: whether every step is kept.
    noise: where randomness comes from instead, to replay that of another
      implementation.

  Raises:
    ValueError: the requests are on canvases of another length, or there is none,
      or the network cannot fill the cache.
  """
  params = denoiser.hold(params)
  run = prepared(
    sampler, denoiser, params, process, key, requests, noise, trace
  )
  objective, requests = sampler.objective, run.requests
  canvas = started(run)
  start = canvas.z
  if isinstance(sampler.policy, Speculation):
    canvas, frames = speculate(run, canvas)
  elif sampler.slides:
    canvas, frames = slide(run, canvas)
  else:
    canvas, frames = blocks(run, prefilled(run, canvas))
  record = None
  if trace:
    record = Trace(
      initial=objective.decode(process, start),
      fixed=requests.fixed,
      valid=requests.valid,
      frames=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), frames),
      mask_id=objective.mask_id,
    )
  return Generation(
    tokens=finished(run, canvas),
    function_evaluations=canvas.calls,
    revealed_at=canvas.revealed_at,
    log_prob=canvas.log_prob,
    top_ids=canvas.top_ids,
    top_log_probs=canvas.top_log_probs,
    trace=record,
  )


def law_at(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  slots: Int[Array, "B Q"],
  ids: Int[Array, "B Q N"],
) -> Float[Array, "B Q N"]:
  """Returns log p of tokens at slots, nats, after one call of the network.

  Without a cache, on whole canvases, of which all free slots are as the prior
  has them. The mask is no token.

  Args:
    sampler: what the requests are for.
    denoiser: the network.
    params: its parameters.
    process: the arrays of the objective.
    key: of the prior.
    requests: the canvases.
    slots: which slots are asked about.
    ids: which tokens at each of them.
  """
  params = denoiser.hold(params)
  run = prepared(sampler, denoiser, params, process, key, requests)
  canvas, objective = started(run), sampler.objective
  window = run.block(canvas.block)
  t = jnp.ones((slots.shape[0], 1))
  hidden, _ = run.network.look(
    canvas.z, t, window, run.requests.valid, None, False
  )
  out, _ = run.network.outputs(hidden, window, run.head)

  def look(logits, ids):
    if objective.mask_id is not None:
      is_mask = jnp.arange(logits.shape[-1]) == objective.mask_id
      logits = jnp.where(is_mask, -jnp.inf, logits)
    law = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(law, ids, axis=-1)

  return reduce(look, out, ids, window=slots - objective.shift)


def check_network(sampler: Sampler, denoiser: Denoiser) -> None:
  """Raises ValueError unless a network can fill the sampler's cache."""
  if sampler.cache != "none" and denoiser.cache is None:
    raise ValueError(
      f"cache {sampler.cache!r} with a network that keeps no keys and values: "
      "use cache 'none'"
    )


def prepared(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  noise: NoiseAt | None = None,
  trace: bool = False,
  head: ModelOutputs | None = None,
) -> Run:
  """Returns a run of held parameters, after a look at the shapes.

  The head is that of another run of the network, if there is one: to find it
  takes as long to trace as a call.
  """
  shape = requests.tokens.shape
  if shape[0] < 1:
    raise ValueError("nothing to sample: the batch of requests is empty")
  if shape[1] != sampler.length:
    raise ValueError(
      f"the requests have {shape[1]} slots a row but the sampler has a canvas "
      f"of {sampler.length}: build both with the same length"
    )
  check_network(sampler, denoiser)
  requests = jax.tree.map(jnp.asarray, requests)
  batch = Batch(
    tokens=requests.tokens,
    loss_mask=requests.valid & ~requests.fixed,
    segment_ids=requests.valid.astype(jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    cond=requests.cond,
  )
  guidance = sampler.guidance
  if guidance is not None and guidance.kind == "class" and batch.cond is None:
    raise ValueError(
      "class guidance needs a label for each request: build them with cond, or "
      "use prompt guidance"
    )
  network = Network(
    denoiser=denoiser,
    params=params,
    process=process,
    objective=sampler.objective,
    batch=batch,
    cache=sampler.cache,
    refresh=sampler.refresh,
    block=sampler.wide,
    reach=sampler.reach,
    guidance=guidance if guidance is not None and guidance.scale else None,
    resizes=sampler.policy.resizes,
  )
  options = requests.options
  if options is not None and options.seed is not None:
    key = jax.vmap(jax.random.key)(options.seed)
  if noise is None:
    noise = lambda step, slots: Keyed.at(
      key,
      request=requests.request,
      step=step,
      position=jnp.minimum(slots, sampler.length - 1),
    )
  head = network.head() if head is None else head
  return Run(sampler, network, head, requests, noise, trace)
