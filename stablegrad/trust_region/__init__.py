"""The trust region: looks along the step before it is taken, and holds its length."""
