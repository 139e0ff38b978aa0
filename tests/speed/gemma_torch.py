"""DiffusionGemma in transformers: random weights, and its own `generate`.

python tests/speed/gemma_torch.py FOLDER
"""

import pathlib
import sys

from decode_worker import serve
import numpy as np
import torch
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

FIELDS = {
  "canvas_length": 64,
  "text_config": {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 96,
    "num_experts": 16,
    "top_k_experts": 4,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "num_global_key_value_heads": 1,
    "sliding_window": 64,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "rope_parameters": {
      "full_attention": {
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
        "rope_type": "proportional",
      },
      "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
  },
  "vision_config": {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 8,
  },
}
PROMPT, CANVASES, STEPS = 64, 2, 16


def prompts(rows: int) -> np.ndarray:
  """Returns the prompts of both programs."""
  rng = np.random.default_rng(0)
  return rng.integers(1, FIELDS["text_config"]["vocab_size"], (rows, PROMPT))


def canvas(rows: int) -> np.ndarray:
  """Returns the canvas whose logits are compared."""
  size = FIELDS["canvas_length"]
  vocab = FIELDS["text_config"]["vocab_size"]
  return np.random.default_rng(1).integers(1, vocab, (rows, size))


def main(folder: str) -> None:
  """Writes the folder if it is not there, then serves."""
  if not pathlib.Path(folder).exists():
    torch.manual_seed(0)
    config = DiffusionGemmaConfig(**FIELDS)
    model = DiffusionGemmaForBlockDiffusion(config)
    model.save_pretrained(folder)
  load = DiffusionGemmaForBlockDiffusion.from_pretrained
  model = load(folder, dtype=torch.float32).eval()

  @torch.no_grad()
  def generate(kind, rows):
    given = torch.from_numpy(prompts(rows))
    if kind == "logits":
      z = torch.from_numpy(canvas(rows))
      return model(input_ids=given, decoder_input_ids=z).logits.numpy()
    found = model.generate(
      given,
      max_new_tokens=CANVASES * FIELDS["canvas_length"],
      max_denoising_steps=STEPS,
      confidence_threshold=1e-12,
    )
    return found.sequences[:, PROMPT:].numpy()

  serve(generate)


if __name__ == "__main__":
  main(sys.argv[1])
