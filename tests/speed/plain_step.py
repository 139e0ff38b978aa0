"""The same network, loss and update in plain JAX and optax, layers written out.

python tests/speed/plain_step.py BATCH.npz
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shape
from worker import serve


def norm(x, scale):
  """RMSNorm."""
  rms = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + shape.EPS)
  return x * rms * scale


def rotate(x, cos, sin):
  """Rotary positions."""
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(p, tokens):
  """The network."""
  half = shape.HEAD_DIM // 2
  rate = shape.THETA ** -(jnp.arange(half) / half)
  angles = jnp.arange(tokens.shape[1])[:, None] * rate
  cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
  x = p["embed/embedding"][tokens]
  for i in range(shape.LAYERS):
    w = {k[7:]: v[i] for k, v in p.items() if k.startswith("layers/")}
    h = norm(x, w["attention_norm/scale"])
    q, k, v = (
      jnp.einsum("btd,dhk->bthk", h, w[f"attention/{n}/kernel"]) for n in "qkv"
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y = jax.nn.dot_product_attention(q, k, v)
    x += jnp.einsum("bthk,hkd->btd", y, w["attention/o/kernel"])
    h = norm(x, w["mlp_norm/scale"])
    h = jax.nn.silu(h @ w["mlp/gate/kernel"]) * (h @ w["mlp/up/kernel"])
    x += h @ w["mlp/down/kernel"]
  return norm(x, p["final_norm/scale"]) @ p["unembed/kernel"]


def loss(p, tokens, z, weights):
  """The bound's integrand, a token."""
  out = logits(p, z).at[..., shape.MASK].set(-jnp.inf)
  terms = optax.softmax_cross_entropy_with_integer_labels(out, tokens)
  return jnp.sum(weights * terms) / tokens.size


def main(path: str) -> None:
  """Reads parameters and a batch from the file, then serves."""
  data = {k: jnp.asarray(v) for k, v in np.load(path).items()}
  tokens, z, weights = (data.pop(k) for k in ("tokens", "z", "weights"))
  optimizer = optax.chain(
    optax.clip_by_global_norm(shape.CLIP),
    optax.adamw(shape.LEARNING_RATE, *shape.BETAS, weight_decay=0.0),
  )
  state = data, optimizer.init(data), jnp.zeros((), jnp.int32)

  def step(state, tokens):
    params, moments, i = state
    key_t, key_z = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    u = (jax.random.uniform(key_t) + jnp.arange(len(tokens))) / len(tokens)
    t = (shape.TIME_EPSILON + (1 - shape.TIME_EPSILON) * u)[:, None]
    masked = jax.random.uniform(key_z, tokens.shape) < t
    z, weights = jnp.where(masked, shape.MASK, tokens), masked / t
    value, gradient = jax.value_and_grad(loss)(params, tokens, z, weights)
    updates, moments = optimizer.update(gradient, moments, params)
    return (optax.apply_updates(params, updates), moments, i + 1), value

  step = jax.jit(step, donate_argnums=0)

  def steps(n):
    nonlocal state
    for _ in range(n):
      state, value = step(state, tokens)
    jax.block_until_ready((state, value))

  serve(lambda: float(jax.jit(loss)(state[0], tokens, z, weights)), steps)


if __name__ == "__main__":
  main(sys.argv[1])
