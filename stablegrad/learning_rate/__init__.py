"""The learning rate: lowered after explosions and on plateaus, never raised."""
