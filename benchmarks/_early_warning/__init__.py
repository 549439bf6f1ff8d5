"""The parts of `benchmarks/early_warning.py`: runs that spike, spikes, alarms."""
