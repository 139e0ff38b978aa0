"""Families by how they denoise; `families` has them in one list."""
