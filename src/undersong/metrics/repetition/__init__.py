"""How repetitive a text is: `measures` holds the functions, `repetition` the `evaluate` module around them."""
