"""`python -m dllm_jax` is `dllm`."""

from dllm_jax.cli.main import console

if __name__ == "__main__":
  console()
