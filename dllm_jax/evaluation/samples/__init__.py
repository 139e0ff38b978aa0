"""Judges of samples, and what samples cost."""
