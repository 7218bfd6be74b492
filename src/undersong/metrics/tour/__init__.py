"""How good predicted round trips are: `measures` holds the functions, `tour` the `evaluate` module around them."""
