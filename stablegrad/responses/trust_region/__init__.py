"""The trust region: limits the length of a step by looking at the loss along it."""
