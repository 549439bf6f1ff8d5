"""The parts of `no_harm.py`: healthy runs, methods, and what became of them."""
