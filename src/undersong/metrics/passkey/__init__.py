"""Passkey retrieval: `measures` holds the functions, `passkey` the `evaluate` module around them."""
