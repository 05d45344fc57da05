"""Two-stage post-training on TRL."""
