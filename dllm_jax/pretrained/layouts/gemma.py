"""DiffusionGemma: text that is read causally, canvases that are read both ways."""

from typing import Any

from dllm_jax.models import GemmaConfig
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma
from dllm_jax.pretrained import names, networks
from dllm_jax.pretrained.family import Family, Ids
from dllm_jax.pretrained.fields import Fields


def _image(f: Fields) -> int | None:
  """Returns the token that stands for pictures, or None."""
  name = "image_token_id"
  return None if f.get(name) is None else f.integer(name)


FAMILIES = (
  Family(
    name="diffusion_gemma",
    table=names.GEMMA,
    model_types=("diffusion_gemma",),
    architectures=("DiffusionGemmaForBlockDiffusion",),
    network=networks.gemma,
    objective=DiffusionGemma,
    settings=lambda f: {
      "canvas": f.integer("canvas_length", default=256),
      "image_id": _image(f),
    },
    renamed={"canvas": "canvas_length", "image_id": "image_token_id"},
    sampler="diffusion_gemma",
    sampling={
      "max_denoising_steps": "steps",
      "t_max": "hot",
      "t_min": "cold",
      "entropy_bound": "entropy_bound",
      "stability_threshold": "stable",
      "confidence_threshold": "rest",
    },
    ids=Ids(mask=None, end=1, pad=0, begin=2),
    masked=False,
    # What reads images is carried along.
    harmless=("vision_config", "boi_token_id", "eoi_token_id"),
  ),
)


def described(c: GemmaConfig) -> dict[str, Any]:
  """Returns the published config of a network, its canvas aside."""
  kinds = ("sliding_attention", "full_attention")
  own = {"head_dim": c.full_head_dim, "num_key_value_heads": c.full_kv_heads}
  text = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": c.vocab_size,
    "hidden_size": c.width,
    "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "head_dim": c.head_dim,
    "layer_types": [kinds[i in c.full_layers] for i in range(c.layers)],
    "per_layer_config": {str(i): own for i in c.full_layers},
    "sliding_window": c.window,
    "intermediate_size": c.mlp_dim,
    "num_experts": c.experts,
    "top_k_experts": c.experts_per_token,
    "moe_intermediate_size": c.expert_dim,
    "rms_norm_eps": c.norm_eps,
    "rope_parameters": {
      kinds[0]: {"rope_type": "default", "rope_theta": c.rope_theta},
      kinds[1]: {
        "rope_type": "proportional",
        "partial_rotary_factor": c.full_rotary_share,
        "rope_theta": c.full_rope_theta,
      },
    },
    "final_logit_softcapping": c.softcap,
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": "vision",
    "tie_word_embeddings": True,
  }
  return {"text_config": text, "tie_word_embeddings": True}
