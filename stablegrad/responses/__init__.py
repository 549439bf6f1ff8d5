"""What to do about a step that is not normal: the responses of a guard."""
