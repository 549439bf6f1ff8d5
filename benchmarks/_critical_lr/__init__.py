"""The parts of `critical_lr.py`."""
