"""Whether an answer holds the gold: `measures` holds the functions, `contains` the `evaluate` module around them."""
