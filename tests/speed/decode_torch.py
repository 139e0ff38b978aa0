"""The same network in plain PyTorch under Fast-dLLM's generation.

python tests/speed/decode_torch.py EXCHANGE.npz FAST_DLLM

The network is called and keeps its cache as Fast-dLLM's LLaDA does: a pair of
unrotated keys and values a layer, in which `replace_position` says what the
given positions replace; keys are rotated at each call. The mask, the last
token, has no logit, so that it is never drawn.
"""

import pathlib
import sys
import types

from decode_worker import serve
import numpy as np
import torch
from torch import nn
import torch.nn.functional as F


class Norm(nn.Module):
  """RMSNorm as that of PyTorch."""

  def __init__(self, scale, eps):
    super().__init__()
    self.weight, self.eps = nn.Parameter(scale), eps

  def forward(self, x):
    """Returns x, normalised."""
    return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(kernel):
  """Returns x W of a kernel `[in, out]`."""
  layer = nn.Linear(*kernel.shape, bias=False)
  layer.weight = nn.Parameter(kernel.T.contiguous())
  return layer


def rotate(x, cos, sin):
  """Rotary positions."""
  a, b = x.chunk(2, -1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
  """Attention and perceptron of one layer."""

  def __init__(self, data, eps):
    super().__init__()
    self.heads = data["attention/q/kernel"].shape[1]
    self.attention_norm = Norm(data["attention_norm/scale"], eps)
    self.mlp_norm = Norm(data["mlp_norm/scale"], eps)
    self.q, self.k, self.v = (
      linear(data[f"attention/{name}/kernel"].flatten(1)) for name in "qkv"
    )
    self.o = linear(data["attention/o/kernel"].flatten(0, 1))
    self.gate, self.up, self.down = (
      linear(data[f"mlp/{name}/kernel"]) for name in ("gate", "up", "down")
    )

  def forward(self, x, tables, past, at):
    """Returns x with both branches, and the layer's keys and values."""
    h = self.attention_norm(x)
    split = (*x.shape[:2], self.heads, -1)
    q, k, v = (
      f(h).view(split).transpose(1, 2) for f in (self.q, self.k, self.v)
    )
    if past is not None:
      past[0][:, :, at], past[1][:, :, at] = k, v
      k, v = past
    cos, sin = tables
    end = k.shape[2] if at is None else at.max() + 1
    here = slice(end - q.shape[2], end)
    y = F.scaled_dot_product_attention(
      rotate(q, cos[here], sin[here]), rotate(k, cos, sin), v
    )
    x = x + self.o(y.transpose(1, 2).flatten(2))
    h = self.mlp_norm(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h)), (k, v)


class Network(nn.Module):
  """The transformer, called as Fast-dLLM calls its LLaDA."""

  device = torch.device("cpu")

  def __init__(self, data):
    super().__init__()
    eps, mask = float(data["eps"]), int(data["mask_id"])
    layers = {
      name.removeprefix("layers/"): x
      for name, x in data.items()
      if name.startswith("layers/")
    }
    count = len(layers["attention_norm/scale"])
    self.embed = nn.Embedding.from_pretrained(data["embed/embedding"])
    self.layers = nn.ModuleList(
      Block({name: x[i] for name, x in layers.items()}, eps)
      for i in range(count)
    )
    self.final_norm = Norm(data["final_norm/scale"], eps)
    self.unembed = linear(data["unembed/kernel"][:, :mask])
    half = layers["attention/q/kernel"].shape[-1] // 2
    rate = float(data["theta"]) ** -(torch.arange(half) / half)
    angles = torch.arange(int(data["length"]))[:, None] * rate
    self.tables = angles.cos(), angles.sin()

  def forward(
    self, x, past_key_values=None, use_cache=False, replace_position=None
  ):
    """Returns logits and the kept keys and values."""
    at = None
    if replace_position is not None:
      at = replace_position[0].nonzero()[:, 0]
    x, kept = self.embed(x), []
    for i, layer in enumerate(self.layers):
      past = None if past_key_values is None else past_key_values[i]
      x, own = layer(x, self.tables, past, at)
      kept.append(own)
    return types.SimpleNamespace(
      logits=self.unembed(self.final_norm(x)),
      past_key_values=kept if use_cache else None,
    )


def fast_dllm(folder: str):
  """Returns Fast-dLLM's module `llada/generate.py`, able to take several rows.

  Its canvas has one row whatever the prompt has; here as many. What it imports
  of the published network is left out.
  """
  module = types.ModuleType("generate")
  for name in ("transformers", "model.modeling_llada"):
    sys.modules[name] = types.SimpleNamespace(
      AutoTokenizer=None, AutoModel=None, LLaDAModelLM=None
    )
  path = pathlib.Path(folder) / "llada" / "generate.py"
  rows = "torch.full((prompt.shape[0], "
  text = path.read_text(encoding="utf-8").replace("torch.full((1, ", rows)
  exec(compile(text, path, "exec"), vars(module))
  return module


def main(path: str, folder: str) -> None:
  """Reads the network and prompts from the file, then serves."""
  data = dict(np.load(path))
  dtype = getattr(torch, str(data.pop("dtype")))
  data = {name: torch.from_numpy(x) for name, x in data.items()}
  functions = fast_dllm(folder)
  network = Network(data).eval().to(dtype)
  network.tables = tuple(table.to(dtype) for table in network.tables)
  prompts, length = data["prompts"], int(data["length"])
  new, block = length - prompts.shape[1], int(data["block_length"])
  settings = {
    "steps": int(data["steps"]) * (new // block),
    "gen_length": new,
    "block_length": block,
    "mask_id": int(data["mask_id"]),
  }

  def generate(kind, rows):
    cached = functions.generate_with_dual_cache
    fn = functions.generate if kind == "none" else cached
    size = 1 if kind == "alone" else rows
    parts = prompts[:rows].split(size)
    found = [fn(network, part, **settings)[0] for part in parts]
    return torch.cat(found).numpy()

  serve(generate)


if __name__ == "__main__":
  main(*sys.argv[1:])
