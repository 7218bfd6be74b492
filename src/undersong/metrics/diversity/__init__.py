"""How varied a text is: `measures` holds the functions, `diversity` the `evaluate` module around them."""
