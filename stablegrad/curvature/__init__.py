"""How far a step may go: curvature of the loss, measured before training."""
