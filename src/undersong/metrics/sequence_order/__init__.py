"""How close an order is to the right one: `measures` holds the functions, `sequence_order` the `evaluate` module."""
