"""How typical a text is under a model: `measures` holds the functions, `epsilon_gap` the `evaluate` module."""
