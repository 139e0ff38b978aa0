"""What PEFT makes of a small Qwen2; runs where torch, transformers and peft are.

python tests/pretrained/peft/record.py            # writes the folders beside it
python tests/pretrained/peft/record.py logits BASE ADAPTER OUT.npy

`base` is a published folder, `lora` and `dora` what PEFT writes beside it, and
`logits.npz` what it computes with each.
"""

import pathlib
import sys

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path(__file__).parent
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 12))
ADAPTERS = {
  "lora": {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
  },
  "dora": {
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "up_proj"],
    "rank_pattern": {"up_proj": 3},
    "alpha_pattern": {"up_proj": 5},
    "use_rslora": True,
    "use_dora": True,
  },
}


def base() -> transformers.PreTrainedModel:
  """Returns a network whose numbers are all of about one."""
  config = transformers.Qwen2Config(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    bos_token_id=40,
    eos_token_id=41,
  )
  torch.manual_seed(0)
  model = transformers.Qwen2ForCausalLM(config).float().eval()
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(1.0 if "norm" in name else 0.0, 0.2)
  return model


def logits(model: torch.nn.Module) -> np.ndarray:
  """Returns what a model makes of the tokens."""
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


def record() -> None:
  """Writes everything."""
  base().save_pretrained(HERE / "base")
  found = {"tokens": TOKENS, "base": logits(base())}
  for name, fields in ADAPTERS.items():
    model = peft.get_peft_model(base(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
      for key, x in model.named_parameters():
        if "lora_magnitude" in key:
          x.mul_(1 + 0.2 * torch.rand_like(x))
        elif "lora_" in key:
          x.normal_(0.0, 0.2)
    model.save_pretrained(HERE / name)
    (HERE / name / "README.md").unlink(missing_ok=True)
    found[name] = logits(model)
  np.savez(HERE / "logits.npz", **found)


if __name__ == "__main__":
  if len(sys.argv) == 1:
    record()
  else:
    _, _, folder, adapter, out = sys.argv
    whole = transformers.Qwen2ForCausalLM.from_pretrained(folder).float().eval()
    np.save(out, logits(peft.PeftModel.from_pretrained(whole, adapter).eval()))
