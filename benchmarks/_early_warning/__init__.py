"""Runs that spike, spikes, and alarms: what `benchmarks/early_warning.py` is made of."""
