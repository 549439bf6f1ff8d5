"""The parts of `cost.py`."""
