"""Adapters as the PEFT library has them on disk, read and written."""
