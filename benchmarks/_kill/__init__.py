"""A training process that is killed and started again, and what is left of its run."""
