"""The same network, loss and update in plain PyTorch (2.13.0).

python tests/speed/torch_step.py BATCH.npz [compile]
"""

import sys

import numpy as np
import shape
import torch
from torch import nn
import torch.nn.functional as F
from worker import serve


class Block(nn.Module):
  """Attention and perceptron."""

  def __init__(self):
    super().__init__()
    inner = shape.HEADS * shape.HEAD_DIM
    self.attention_norm = nn.RMSNorm(shape.WIDTH, eps=shape.EPS)
    self.mlp_norm = nn.RMSNorm(shape.WIDTH, eps=shape.EPS)
    self.q, self.k, self.v = (
      nn.Linear(shape.WIDTH, inner, bias=False) for _ in range(3)
    )
    self.o = nn.Linear(inner, shape.WIDTH, bias=False)
    self.gate = nn.Linear(shape.WIDTH, shape.MLP, bias=False)
    self.up = nn.Linear(shape.WIDTH, shape.MLP, bias=False)
    self.down = nn.Linear(shape.MLP, shape.WIDTH, bias=False)

  def forward(self, x, cos, sin):
    """Returns x and what the two branches add."""
    h = self.attention_norm(x)
    split = (*x.shape[:2], shape.HEADS, shape.HEAD_DIM)
    q, k, v = (
      f(h).view(split).transpose(1, 2) for f in (self.q, self.k, self.v)
    )
    y = F.scaled_dot_product_attention(
      rotate(q, cos, sin), rotate(k, cos, sin), v
    )
    x = x + self.o(y.transpose(1, 2).flatten(2))
    h = self.mlp_norm(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x, cos, sin):
  """Rotary positions."""
  a, b = x.chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Network(nn.Module):
  """The transformer."""

  def __init__(self):
    super().__init__()
    self.embed = nn.Embedding(shape.VOCAB, shape.WIDTH)
    self.layers = nn.ModuleList(Block() for _ in range(shape.LAYERS))
    self.final_norm = nn.RMSNorm(shape.WIDTH, eps=shape.EPS)
    self.unembed = nn.Linear(shape.WIDTH, shape.VOCAB, bias=False)
    half = shape.HEAD_DIM // 2
    rate = shape.THETA ** -(torch.arange(half) / half)
    angles = torch.arange(shape.LENGTH)[:, None] * rate
    self.register_buffer("cos", angles.cos())
    self.register_buffer("sin", angles.sin())

  def forward(self, tokens):
    """Returns logits."""
    x = self.embed(tokens)
    for layer in self.layers:
      x = layer(x, self.cos, self.sin)
    return self.unembed(self.final_norm(x))


def loss(network, tokens, z, weights):
  """The bound's integrand, a token."""
  logits = network(z)
  logits[..., shape.MASK] = -torch.inf
  terms = F.cross_entropy(
    logits.flatten(0, 1), tokens.flatten(), reduction="none"
  )
  return (weights.flatten() * terms).sum() / tokens.numel()


def load(network, data):
  """Copies the library's parameters."""
  with torch.no_grad():
    network.embed.weight.copy_(data["embed/embedding"])
    network.unembed.weight.copy_(data["unembed/kernel"].T)
    network.final_norm.weight.copy_(data["final_norm/scale"])
    for i, block in enumerate(network.layers):
      for name in ("attention_norm", "mlp_norm"):
        getattr(block, name).weight.copy_(data[f"layers/{name}/scale"][i])
      for name in "qkv":
        kernel = data[f"layers/attention/{name}/kernel"][i].flatten(1)
        getattr(block, name).weight.copy_(kernel.T)
      out = data["layers/attention/o/kernel"][i].flatten(0, 1)
      block.o.weight.copy_(out.T)
      for name in ("gate", "up", "down"):
        kernel = data[f"layers/mlp/{name}/kernel"][i]
        getattr(block, name).weight.copy_(kernel.T)


def main(path: str, form: str = "plain") -> None:
  """Reads parameters and a batch from the file, then serves.

  Args:
    path: the file.
    form: "plain", or "compile" for `torch.compile` of network and loss.
  """
  data = {k: torch.from_numpy(v) for k, v in np.load(path).items()}
  tokens, z = data["tokens"].long(), data["z"].long()
  network = Network()
  load(network, data)
  optimizer = torch.optim.AdamW(
    network.parameters(),
    lr=shape.LEARNING_RATE,
    betas=shape.BETAS,
    weight_decay=0.0,
    fused=True,
  )

  of_step = torch.compile(loss) if form == "compile" else loss

  def step():
    u = (torch.rand(()) + torch.arange(shape.BATCH)) / shape.BATCH
    t = (shape.TIME_EPSILON + (1 - shape.TIME_EPSILON) * u)[:, None]
    masked = torch.rand(tokens.shape) < t
    z, weights = torch.where(masked, shape.MASK, tokens), masked / t
    optimizer.zero_grad()
    of_step(network, tokens, z, weights).backward()
    nn.utils.clip_grad_norm_(network.parameters(), shape.CLIP)
    optimizer.step()

  def steps(n):
    for _ in range(n):
      step()

  def value():
    with torch.no_grad():
      return loss(network, tokens, z, data["weights"]).item()

  serve(value, steps)


if __name__ == "__main__":
  main(*sys.argv[1:])
