"""A training run, from its recipe to its checkpoints and model card."""
