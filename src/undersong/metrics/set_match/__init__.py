"""Whether two sets agree: `measures` holds the functions, `set_match` the `evaluate` module around them."""
