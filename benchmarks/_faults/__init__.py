"""Random faults in random places, and what is left of a run after them."""
