"""How frequencies fall with rank: `measures` holds the functions, `zipf` the `evaluate` module around them."""
