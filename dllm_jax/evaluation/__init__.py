"""Figures that carry their protocol and their error."""
