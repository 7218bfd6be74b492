"""How repetitive code is: `measures` holds the functions, `code_repetition` the `evaluate` module around them."""
