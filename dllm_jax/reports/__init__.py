"""Measurements and comparisons of runs, as tables, plots and pages."""
