"""The commands of `dllm`, one a file that holds `COMMAND`."""
