"""Tasks, methods and reports of the benchmark on learning-rate sensitivity."""
