"""lm-evaluation-harness: the model class, and published protocols."""
