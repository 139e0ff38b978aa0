"""Commands that train a copy of a run."""
