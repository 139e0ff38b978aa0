"""Our configs of recorded cases."""

from dllm_jax.models import DiTConfig
from tests.golden_cases import Case


def dit_config(case: Case) -> DiTConfig:
  """Returns our config of a case whose network is the DiT."""
  model = case.config["config"]["model"]
  data = case.config["config"].get("data", {})
  return DiTConfig(
      vocab_size=case.config.get("vocab_size") or case.config["dim"],
      width=model["hidden_size"],
      layers=model["n_blocks"],
      heads=model["n_heads"],
      cond_dim=model["cond_dim"],
      num_classes=data.get("num_classes") or 0,
      tied=model.get("tie_word_embeddings", False),
      dropout=model["dropout"],
  )
