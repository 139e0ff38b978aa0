"""The tasks of `dllm evaluate`, one a file; `registry` finds them."""
