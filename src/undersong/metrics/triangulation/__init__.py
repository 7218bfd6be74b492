"""How good predicted triangulations are: `measures` holds the functions, `triangulation` the `evaluate` module."""
