"""What is normal: the thresholds, each a rule over one signal."""
