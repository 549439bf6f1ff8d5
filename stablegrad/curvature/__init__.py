"""Learning-rate limits from the curvature of the loss, measured before training."""
