"""How long a step may be: looking along it before it is taken."""
