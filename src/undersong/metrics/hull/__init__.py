"""How good predicted convex hulls are: `measures` holds the functions, `hull` the `evaluate` module around them."""
