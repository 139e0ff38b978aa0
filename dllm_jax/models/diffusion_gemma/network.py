r"""DiffusionGemma: one set of weights that reads text and restores canvases.

Text is read causally (`mask` `Causal`), a canvas both ways (`Full`) and with it
what of the text lies before its first slot: all of it in `full` layers, the last
W - 1 slots, the same for all of its positions, in the others. Only text is kept
in a cache. With h the embeddings times sqrt(D), and a canvas told before (s, the
mean embeddings; 0 if nothing was said)

    h = h sqrt(D),    canvas: h = u(h + MLP(norm(s sqrt(D)))),   u(x) = x / rms(x),

a layer, of which each norm but u has weights of its own, is

    x = x + norm(attention(norm(x)))
    x = c (x + norm(norm(MLP(norm(x))) + norm(experts(norm(x); x)))),

c one number for text and one for canvases; the router sees u(x) * s / sqrt(D).
Queries and keys have norms, scores are not divided, values are divided by their
root mean square, in full layers they are the keys before norm and rotation. Logits
are 30 tanh(. / 30). No paper: after transformers 5.24.0 (`diffusion_gemma`).

The stack of each kind, N layers (`run0` is windowed, `run1` full: 5 to 1); H heads,
G of keys, K features of a head are the kind's own:

    embed/embedding                        [V, D]
    self_conditioning/norm/scale           [D]
    self_conditioning/mlp/{gate,up,down}/kernel
    period/RUN/layers/{attention,mlp,routed}_norm/scale         [N, D]
    period/RUN/layers/{attention,mlp,routed,sum}_post_norm/scale [N, D]
    period/RUN/layers/attention/{q,k,v}/kernel [N, D, H or G, K] (no v if full)
    period/RUN/layers/attention/{q,k}_norm/scale [N, K]
    period/RUN/layers/attention/o/kernel   [N, H, K, D]
    period/RUN/layers/mlp/{gate,up,down}/kernel
    period/RUN/layers/routed/router/{kernel,scale,expert_scale} [N, D, E], [N, D], [N, E]
    period/RUN/layers/routed/experts/{gate,up,down}  [N, E, D, F] or [N, E, F, D]
    period/RUN/layers/{text,canvas}_scale  [N, 1]
    final_norm/scale                       [D]
"""

import functools

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import Denoiser, KVCache, ModelInputs, ModelOutputs
from dllm_jax.models import layers, moe
from dllm_jax.models.attention import past as beside
from dllm_jax.models.attention.dispatch import attention
from dllm_jax.models.block import (
  between,
  denoiser,
  projected,
  projected_back,
  within,
)
from dllm_jax.models.cache import query_slots, store
from dllm_jax.models.diffusion_gemma.config import GemmaConfig, Kind
from dllm_jax.models.layers import RMSNorm, unit_rms, Weight
from dllm_jax.models.perceptron import gelu_tanh, SwiGLU


def gemma(config: GemmaConfig) -> Denoiser:
  """Returns the network as `(init, apply)`.

  A call whose mask is `Causal` reads text: it is written to the cache, if there is
  one, and `past` comes back. One whose mask is `Full` is a canvas: what it sees of
  the cache, or of `ModelInputs.past`, lies before its `slot`.
  """
  periods = config.layers // config.period

  def by_period(params, fold):
    """Returns parameters whose stacks have an axis of periods before, or not."""
    lead = lambda x: (periods, -1) if fold else (x.shape[0] * x.shape[1],)
    own = lambda x: x.reshape(*lead(x), *x.shape[1 if fold else 2 :])
    return params | {"period": jax.tree.map(own, params["period"])}

  fold = functools.partial(by_period, fold=True)
  whole = denoiser(_Gemma(config), config.param_dtype, fold)

  def init(key, inputs):
    # A canvas's pass has all parameters.
    params = whole.init(key, inputs.replace(mask=Full(), past=None, slot=None))
    return by_period(params, fold=False)

  return whole._replace(init=init)


@struct.dataclass
class _Told:
  """What the layers of a kind are told of a call.

  Attributes:
    tables: cosines and sines.
    sight: what its positions see; None where nothing is kept.
  """

  tables: tuple[Array, Array]
  sight: beside.Sight | None = None


@struct.dataclass
class _Shared:
  """What all layers read: the call's segments, and what each stack is told."""

  segment_ids: Array
  told: tuple[_Told, ...]
  text: bool = struct.field(pytree_node=False)


def _told(kind: Kind, inputs: ModelInputs, past: KVCache | None, places):
  """Returns what the layers of a kind are told; `places` they have in the past."""
  tables, text = kind.tables(inputs.positions), isinstance(inputs.mask, Causal)
  if past is None or inputs.slot is None:
    return _Told(tables=tables)
  segments, q = inputs.segment_ids, query_slots(inputs)
  own = kind.spec(text).allowed(q[:, :, None], q[:, None, :])
  own &= segments[:, :, None] == segments[:, None, :]
  start = inputs.slot[:, None]
  if past.slots is None or kind.window is None:
    k = jnp.broadcast_to(jnp.arange(places), (segments.shape[0], places))
  else:
    k = past.slots
  there = (k >= 0) & (k < start)
  if kind.window is not None and not text:
    # A canvas's last position sees as far back as its first.
    there &= start - k < kind.window
  held = jnp.clip(k, 0, past.segment_ids.shape[1] - 1)
  held = jnp.take_along_axis(past.segment_ids, held, axis=1)
  held = jnp.where(there, held, 0)
  seen = there[:, None, :] & (segments[:, :, None] == held[:, None, :])
  if kind.window is not None and text:
    seen &= q[:, :, None] - k[:, None, :] < kind.window
  # The kernel has no gradient: what comes without a cache is trained through.
  alike = not text and inputs.past is None
  sight = beside.Sight(own, seen, (segments, held) if alike else None)
  return _Told(tables=tables, sight=sight)


class _Gemma(nn.Module):
  config: GemmaConfig
  apart: bool = False

  @nn.compact
  def __call__(self, inputs: ModelInputs, cache: KVCache | None):
    c = self.config
    text = isinstance(inputs.mask, Causal)
    if not text and not isinstance(inputs.mask, Full):
      raise ValueError(
        f"DiffusionGemma reads text (Causal) or a canvas (Full), not {inputs.mask}"
      )
    shape = (c.padded_vocab, c.width)
    init = nn.initializers.normal(c.embedding_std)
    embedding = Weight("embedding", shape, init, name="embed")()
    scale = jnp.asarray(c.width**0.5, c.dtype)
    x = layers.lookup(embedding, inputs.latent).astype(c.dtype) * scale
    if not text:
      said = inputs.self_conditioning
      said = jnp.zeros_like(x) if said is None else said.astype(c.dtype) * scale
      x = _SelfConditioning(c, name="self_conditioning")(x, said)
    past = inputs.past
    if cache is not None:  # A call may be of its first rows.
      rows = x.shape[0]
      past = cache.over_rows(lambda a: a[:, :rows])
    x, kept, aux = self._layers(between(x), inputs, past, text)
    if "balance" in aux and c.balance_weight:
      aux["loss"] = c.balance_weight * jnp.mean(aux["balance"])
    if text and cache is not None:
      cache = store(cache, *kept, inputs)
    x = RMSNorm(c.norm_eps, name="final_norm")(x)
    out = ModelOutputs(
      hidden=within(x),
      unembed=embedding.T,
      aux=aux,
      past=KVCache(*kept, inputs.segment_ids) if text else None,
      vocab_size=c.vocab_size,
      softcap=c.softcap,
      tied=True,
    )
    return out, cache

  def _layers(self, x, inputs, past, text):
    """Returns hidden states, keys and values of each stack, and reports."""
    c = self.config
    periods, runs = c.layers // c.period, c.runs
    old = [None] * len(runs)
    if past is not None and inputs.slot is not None:
      old = list(zip(past.key, past.value, strict=True))
    told = tuple(
      _told(c.kind(run), inputs, past, one and one[0].shape[3])
      for run, one in zip(runs, old, strict=True)
    )
    shared = _Shared(inputs.segment_ids, told, text)
    if self.apart:
      return _Apart(c, name="period")(x, shared, old)

    def fold(pair):  # each layer's own is a stack of one
      key, value = (a.reshape(periods, -1, 1, *a.shape[1:]) for a in pair)
      return beside.Past(key, value, jnp.zeros(key.shape[:2], jnp.int32))

    unroll = max(c.unroll // c.period, 1)
    blocks = layers.stack(_Period, layers=periods, remat="none", unroll=unroll)
    blocks = blocks((c,), name="period")
    x, (new, aux) = blocks(x, shared, [pair and fold(pair) for pair in old])
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    kept = jax.tree.map(flat, new) if text else None
    aux = {
      key: flat(jnp.concatenate([one[key] for one in aux], axis=1))
      for key in aux[0]
    }
    return x, kept and tuple(zip(*kept, strict=True)), aux


class _Apart(nn.Module):
  """All layers, the parameters of each by themselves."""

  config: GemmaConfig

  @nn.compact
  def __call__(self, x, shared: _Shared, old):
    """Returns what `_Gemma._layers` does."""
    c = self.config
    runs = [
      _RunApart(c, c.kind(run), run.layers, name=_name(run)) for run in c.runs
    ]
    order = sorted(
      (number, r, i)
      for r, run in enumerate(c.runs)
      for i, number in enumerate(run.numbers)
    )
    kept, reports = [[] for _ in runs], []
    for _, r, i in order:
      told = (shared.told[r],)
      past = old[r] and beside.Past(*old[r], jnp.asarray(i))
      x, (new, aux) = runs[r](i, x, shared.replace(told=told), past)
      kept[r].append(new)
      reports.append(aux)
    kept = list(map(layers.stacked, kept)) if shared.text else None
    kept = kept and tuple(zip(*kept, strict=True))
    return x, kept, layers.stacked(reports)


class _RunApart(nn.Module):
  """The layers of one kind."""

  config: GemmaConfig
  kind: Kind
  number: int

  def setup(self):
    fields = self.config, self.kind
    self.layers = layers.Apart(_Block, self.number, fields)

  def __call__(self, i: int, x, shared: _Shared, past):
    return self.layers.layer(i, x, shared, past)


def _name(run) -> str:
  return run.name.removeprefix("period/")


class _Period(nn.Module):
  """The layers of a period, each run of equal ones a stack."""

  config: GemmaConfig

  @nn.compact
  def __call__(self, x, shared: _Shared, old):
    c, kept, reports = self.config, [], []
    for run, told, past in zip(c.runs, shared.told, old, strict=True):
      x, (new, aux) = _Run(c, c.kind(run), run.each, name=_name(run))(
        x, shared.replace(told=(told,)), past
      )
      kept.append(new)
      reports.append(aux)
    return x, (kept, reports)


class _Run(nn.Module):
  """Neighbouring layers of one kind."""

  config: GemmaConfig
  kind: Kind
  layers: int

  @nn.compact
  def __call__(self, x, shared: _Shared, past):
    c = self.config
    blocks = layers.stack(
      _Block, layers=self.layers, remat=c.remat, unroll=c.unroll
    )
    return blocks((c, self.kind), name="layers")(x, shared, past)


class _Block(nn.Module):
  config: GemmaConfig
  kind: Kind

  @nn.compact
  def __call__(self, x, shared: _Shared, past):
    """Returns x, and (keys and values of text, what the experts report)."""
    c, real = self.config, shared.segment_ids > 0
    norm = lambda name: RMSNorm(c.norm_eps, name=name)
    drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
    attend = _Attention(c, self.kind, name="attention")
    y, new = attend(within(norm("attention_norm")(x)), shared, past)
    x = between(x + drop(norm("attention_post_norm")(y)))
    mlp = SwiGLU(c, activation=gelu_tanh, name="mlp")
    routed = moe.Experts(c, gelu_tanh, scaled=True, name="routed")
    y = norm("mlp_post_norm")(mlp(within(norm("mlp_norm")(x)), real)[0])
    more, aux = routed(within(norm("routed_norm")(x)), real, within(x))
    y = norm("sum_post_norm")(y + norm("routed_post_norm")(more))
    scales = {
      name: self.param(f"{name}_scale", nn.initializers.ones, (1,))
      for name in ("text", "canvas")
    }
    scale = scales["text" if shared.text else "canvas"]
    return between((x + drop(y)) * scale.astype(x.dtype)), (new, aux)


class _Attention(nn.Module):
  config: GemmaConfig
  kind: Kind

  @nn.compact
  def __call__(self, x, shared: _Shared, past):
    """Returns the mixed values, and keys and values `[B, G, T, K]` of text."""
    c, kind, (told,) = self.config, self.kind, shared.told
    q, k, v = projected(
      c,
      kind.kv_heads,
      kind.head_dim,
      x,
      told.tables,
      values="own" if kind.window else "keys",
      unit_values=True,
      scaled=False,
    )
    if past is None:
      y = attention(
        q,
        k,
        v,
        mask=kind.spec(shared.text),
        q_segments=shared.segment_ids,
        k_segments=shared.segment_ids,
        implementation=c.attention,
        context=c.context,
      )
    else:
      y = beside.attention(q, k, v, past, told.sight, c.attention)
    kept = lambda a: jnp.swapaxes(a, 1, 2)
    new = (kept(k), kept(v)) if shared.text else None
    return projected_back(c, kind.head_dim, y), new


class _SelfConditioning(nn.Module):
  """A canvas's embeddings, with what was said of it added, of unit size."""

  config: GemmaConfig

  @nn.compact
  def __call__(self, x, said: Float[Array, "B T D"]):
    c = self.config
    y = RMSNorm(c.norm_eps, name="norm")(said)
    y, _ = SwiGLU(c, activation=gelu_tanh, name="mlp")(y, None)
    return unit_rms(x + y, c.norm_eps).astype(x.dtype)
