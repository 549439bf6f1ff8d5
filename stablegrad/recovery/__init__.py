"""States from elsewhere: of runs without a guard, and of other guards."""
