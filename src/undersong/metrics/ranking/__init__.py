"""Ranking of a catalogue for users: `measures` holds the functions, `ranking` the `evaluate` module around them."""
