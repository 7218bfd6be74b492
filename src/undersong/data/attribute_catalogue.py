"""A made-up shop whose users follow attributes, not items: what recommendation from text should be able to learn.

Items are combinations of attributes (color, brand, kind, size). A user walks over kinds by a fixed random Markov chain
and keeps a favourite color and brand, so the next item is told by the texts of the last ones. Some items are held out
of every training history: for them a model has texts and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

ATTRIBUTES = {
    "color": tuple("red green blue black white yellow purple orange brown grey pink silver".split()),  # noqa: SIM905
    "brand": tuple("acme nordic lumen harbor vertex willow summit cobalt ember maple".split()),  # noqa: SIM905
    "kind": tuple(
        "kettle lamp chair table sofa rug clock mirror shelf bowl vase mug plate knife fork spoon pan pot".split()  # noqa: SIM905
    ),
    "size": ("small", "medium", "large"),
}


@dataclass(frozen=True)
class AttributeCatalogue:
    """A shop and its users.

    Attributes:
        items: attribute dictionaries; item n has row n, from 1.
        cold: rows of items that occur in no training history, ascending.
        train: histories of the training users, lists of rows, oldest first.
        test, test_targets: histories of other users and the item that came next, any item.
    """

    items: list[dict]
    cold: list[int]
    train: list[list[int]]
    test: list[list[int]]
    test_targets: list[int]
    _cold: frozenset = field(repr=False, default=frozenset())

    @property
    def titles(self):
        """Row -> text, for printing."""
        return {row: " ".join(item.values()) for row, item in enumerate(self.items, start=1)}

    def is_cold(self, row):
        return row in self._cold


def attribute_catalogue(
    num_items=400,
    num_users=1000,
    num_test_users=300,
    length=8,
    cold_share=0.5,
    faithfulness=0.8,
    seed=0,
    part=0,
):
    """Draws a catalogue and its users.

    Args:
        num_items: distinct combinations of attributes.
        num_users, num_test_users: histories to train on and to test with.
        length: items of a training history, and of a test history with its target.
        cold_share: share of items held out of training histories and of test histories; only targets are cold.
        faithfulness: probability that the next item keeps the favourite color, brand and next kind of the chain (each
            by itself).
        seed: of users, items and the chain over kinds.
        part: which slice of all combinations the items are. Shops of one seed and different parts have no item in
            common, and users who behave alike.

    Returns:
        An `AttributeCatalogue`.

    Raises:
        ValueError: more items than combinations, or a share or probability outside [0, 1].

    >>> shop = attribute_catalogue(num_items=40, num_users=5, num_test_users=3, length=4)
    >>> len(shop.items), len(shop.cold), len(shop.train), len(shop.test_targets)
    (40, 20, 5, 3)
    >>> any(shop.is_cold(row) for history in shop.train for row in history)
    False
    """
    names = list(ATTRIBUTES)
    sizes = [len(values) for values in ATTRIBUTES.values()]
    combinations = int(np.prod(sizes))
    if not num_items >= 2 or not 0 <= part < combinations // num_items:
        raise ValueError(
            f"part ({part}) of num_items ({num_items}) must lie within the {combinations} combinations there are; use"
            " fewer items."
        )
    for name, value in (("cold_share", cold_share), ("faithfulness", faithfulness)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} ({value}) must lie in [0, 1]; use 0.5.")
    if length < 2:
        raise ValueError(f"length ({length}) must be at least 2, a history and what comes next; use 8.")
    shared, rng = np.random.default_rng(seed), np.random.default_rng((seed, part))
    kinds = len(ATTRIBUTES["kind"])
    chain = shared.permutation(kinds)  # the kind that follows each kind
    chosen = shared.permutation(combinations)[part * num_items : (part + 1) * num_items]
    codes = np.stack(np.unravel_index(chosen, sizes), 1)
    cold = np.zeros(num_items, dtype=bool)
    cold[rng.permutation(num_items)[: int(cold_share * num_items)]] = True

    def draw(wanted, open_items):
        """An item that agrees with as many of the wanted attributes as one can."""
        agree = sum((codes[:, names.index(name)] == value).astype(float) for name, value in wanted.items())
        agree = np.where(open_items, agree + rng.random(num_items) * 0.5, -1.0)
        return int(agree.argmax())

    def walk(steps, last_open):
        favourite = {
            "color": rng.integers(sizes[names.index("color")]),
            "brand": rng.integers(sizes[names.index("brand")]),
        }
        kind, rows = rng.integers(kinds), []
        for step in range(steps):
            wanted = {**favourite, "kind": kind}
            wanted = {name: value for name, value in wanted.items() if rng.random() < faithfulness}
            row = draw(wanted, last_open if step == steps - 1 else ~cold)
            rows.append(row + 1)
            kind = chain[codes[row, names.index("kind")]]
        return rows

    train = [walk(length, ~cold) for _ in range(num_users)]
    tests = [walk(length, np.ones(num_items, dtype=bool)) for _ in range(num_test_users)]
    values = list(ATTRIBUTES.values())
    items = [{name: values[n][code] for n, (name, code) in enumerate(zip(names, row, strict=True))} for row in codes]
    cold_rows = [int(row) + 1 for row in cold.nonzero()[0]]
    return AttributeCatalogue(
        items, cold_rows, train, [rows[:-1] for rows in tests], [rows[-1] for rows in tests], frozenset(cold_rows)
    )


__all__ = ["ATTRIBUTES", "AttributeCatalogue", "attribute_catalogue"]
