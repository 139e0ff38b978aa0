"""An autoregressive transformer on OpenWebText: published perplexity 17.54.

The twin of MDLM and BD3-LM (arXiv:2406.07524, table 2; arXiv:2503.09573, table 4).

The recipe of owt_mdlm.py, data prepared as it says.

    dllm train --config=configs/owt_autoregressive.py \
        --workdir=runs/owt_autoregressive \
        --config.data.path=owt_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "owt_mdlm",
    "objective": {"name": "autoregressive"},
  })
