"""The name table of each published family; `convert` reads them both ways."""

import numpy as np

from dllm_jax.models import dit, DiTConfig
from dllm_jax.pretrained.convert import Name, Table


def _inverse_frequencies(config: DiTConfig) -> np.ndarray:
  dim = config.head_dim
  exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
  return np.float32(1) / np.float32(config.rope_theta) ** exponent


def _affine(theirs: str, ours: str) -> tuple[Name, Name]:
  return (
      Name(f"{theirs}.weight", f"{ours}/kernel", contracts=1),
      Name(f"{theirs}.bias", f"{ours}/bias"),
  )


_BLOCK = "blocks.{i}."

DIT = Table(
    family="DiT",
    network=dit,
    names=(
        Name("vocab_embed.embedding", "embed/embedding", vocabulary=True),
        *_affine("sigma_map.mlp.0", "time/hidden"),
        *_affine("sigma_map.mlp.2", "time/out"),
        Name("cond_map.embedding_table.weight", "classes/embedding"),
        Name(_BLOCK + "norm1.weight", "layers/attention_norm/scale"),
        Name(
            _BLOCK + "attn_qkv.weight",
            tuple(f"layers/attention/{x}/kernel" for x in "qkv"),
            contracts=1,
        ),
        Name(
            _BLOCK + "attn_out.weight",
            "layers/attention/o/kernel",
            contracts=2,
        ),
        Name(_BLOCK + "norm2.weight", "layers/mlp_norm/scale"),
        *_affine(_BLOCK + "mlp.0", "layers/mlp/up"),
        *_affine(_BLOCK + "mlp.2", "layers/mlp/down"),
        *_affine(_BLOCK + "adaLN_modulation", "layers/modulation"),
        Name("output_layer.norm_final.weight", "final_norm/scale"),
        *_affine("output_layer.adaLN_modulation", "final_modulation"),
        Name(
            "output_layer.linear.weight",
            "unembed/kernel",
            contracts=1,
            vocabulary=True,
        ),
        Name("output_layer.linear.bias", "unembed/bias", vocabulary=True),
    ),
    prefixes=("backbone.",),
    tied=("output_layer.linear.weight", "vocab_embed.embedding"),
    derived={"rotary_emb.inv_freq": _inverse_frequencies},
    ignored=("sampling_eps_(min|max)",),
)
"""MDLM, SEDD, BD3-LM and UDLM: bare, or under "backbone." as exported."""
