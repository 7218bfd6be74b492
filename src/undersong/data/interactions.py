"""Who took what, in which order: interactions read from files and split for next-item recommendation.

A data set is a list of histories of item rows, oldest first, with the external ids beside it. Leave-one-out is the
protocol of SASRec, BERT4Rec (arXiv 1904.06690, section 4.1) and gSASRec: a user's last item is the test, the one
before it the validation, the rest is for training.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..tokenization.item_vocab import ItemVocab

# What the columns are called in common exports; the first name that a file has is taken.
COLUMNS = {
    "user": ("user_id", "user", "userid", "customer_id", "session_id", "visitorid"),
    "item": ("item_id", "item", "itemid", "movie_id", "movieid", "product_id", "article_id"),
    "time": ("timestamp", "time", "date", "datetime", "created_at", "t_dat"),
    "title": ("title", "movie_title", "name", "item_name", "product_name", "prod_name"),
}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Users with an item to predict.

    Args:
        users: their indices in the `Interactions`.
        histories: lists of item rows that a model may see, oldest first.
        targets: the item rows that came next.
    """

    users: list[int]
    histories: list[list[int]]
    targets: list[int]

    def __len__(self):
        return len(self.users)


@dataclasses.dataclass(frozen=True)
class Split:
    """Training histories, one for every user, and what is held out of them for validation and test."""

    train: list[list[int]]
    valid: HeldOut
    test: HeldOut


@dataclasses.dataclass(frozen=True)
class Interactions:
    """A data set of interactions in memory.

    Args:
        user_ids: external ids of the users.
        histories: for each user the rows (1..N) of the items in time order, oldest first.
        vocab: external item ids and their rows.
        titles: row -> text, for items that have one.
        attributes: row -> {name: text}, for items that have any.
    """

    user_ids: list[str]
    histories: list[list[int]]
    vocab: ItemVocab
    titles: dict[int, str] = dataclasses.field(default_factory=dict)
    attributes: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_events(cls, users: Sequence, items: Sequence, times: Sequence | None = None, catalogue=None):
        """From parallel lists with an entry for each interaction.

        Args:
            users, items: external ids, strings or integers.
            times: anything that sorts; equal ones stay in the order given. None: the order given is that of time.
            catalogue: {item id: {"title": ..., and other attributes}}; items nobody took are left out.

        Raises:
            ValueError: lists of different lengths, or empty ones.

        >>> data = Interactions.from_events(["ann", "bob", "ann"], ["kiwi", "lime", "plum"], [7, 8, 5])
        >>> data.user_ids, data.histories, data.vocab.decode(data.histories[0])
        (['ann', 'bob'], [[3, 1], [2]], ['plum', 'kiwi'])
        """
        for name, values in (("items", items), ("times", times)):
            if values is not None and len(values) != len(users):
                raise ValueError(f"{name} ({len(values)}) must be as many as users ({len(users)}).")
        if not len(users):
            raise ValueError("users must hold at least one interaction.")
        histories = {user: [] for user in users}
        order = range(len(users)) if times is None else sorted(range(len(users)), key=times.__getitem__)
        for n in order:
            histories[users[n]].append(items[n])
        vocab = ItemVocab.from_histories(histories.values())
        known = {vocab.encode([item])[0]: dict(facts) for item, facts in (catalogue or {}).items() if item in vocab}
        titles = {row: facts.pop("title") for row, facts in known.items() if facts.get("title")}
        return cls(
            list(histories),
            [vocab.encode(history) for history in histories.values()],
            vocab,
            titles,
            {row: facts for row, facts in known.items() if facts},
        )

    @classmethod
    def read(cls, path: str | Path, items: str | Path | None = None, **columns: str | None) -> Interactions:
        """From a file: RecBole's `.inter`, a table with a header (`.csv`, `.tsv`), or `.txt` with `user item` a line.

        Ids are strings. RecBole's files are tab-separated with a type behind each name ("user_id:token"). Tables are
        split at tabs, semicolons or commas, whichever their header has. A `.txt` is in time order per user already.

        Args:
            path: the interactions.
            items: a `.item` file or a table with the items' ids, titles and attributes.
            columns: `user`, `item`, `time`, `title`: the names of these columns where they are not in `COLUMNS`.

        Raises:
            ValueError: no such column, a line that has no user and item, an unknown keyword, nothing in the file.
            OSError: the file cannot be read.
        """
        if unknown := columns.keys() - COLUMNS.keys():
            raise ValueError(f"{min(unknown)} must be one of {', '.join(COLUMNS)}; these are the columns that count.")
        path = Path(path)
        if path.suffix == ".txt":
            users, taken = _read_pairs(path)
            times = None
        else:
            table = _read_table(path)
            users, taken = (table[_find(table, what, columns, path)] for what in ("user", "item"))
            time = _find(table, "time", columns, path, needed=columns.get("time") is not None)
            times = None if time is None else _numbers(table[time])
        return cls.from_events(users, taken, times, None if items is None else _read_items(Path(items), columns))

    @property
    def num_items(self) -> int:
        return len(self.vocab)

    def __len__(self):
        """How many interactions there are."""
        return sum(map(len, self.histories))

    def popularity(self) -> list[int]:
        """How often each item was taken, by row; entry 0, the padding, is 0."""
        return count_items(self.histories, self.num_items)

    def core(self, minimum: int) -> Interactions:
        """What is left when users and items with fewer interactions are taken out until there are none.

        >>> data = Interactions.from_events("aabbc", ["x", "y", "x", "y", "z"])
        >>> data.core(2).vocab.items, data.core(2).user_ids
        (['x', 'y'], ['a', 'b'])
        """
        histories = dict(zip(self.user_ids, self.histories, strict=True))
        while True:
            counts = count_items(histories.values(), self.num_items)
            kept = {user: [row for row in rows if counts[row] >= minimum] for user, rows in histories.items()}
            kept = {user: rows for user, rows in kept.items() if len(rows) >= minimum}
            if sum(map(len, kept.values())) == sum(map(len, histories.values())):
                break
            histories = kept
        if not kept:
            raise ValueError(f"minimum ({minimum}) leaves no interaction; use a smaller one.")
        events = [(user, item) for user, rows in kept.items() for item in self.vocab.decode(rows)]
        catalogue = {
            self.vocab.decode([row])[0]: {"title": self.titles.get(row)} | self.attributes.get(row, {})
            for row in self.titles.keys() | self.attributes.keys()
        }
        return Interactions.from_events(*zip(*events, strict=True), catalogue=catalogue)

    def leave_one_out(self) -> Split:
        """A user's last item for the test, the one before for validation, the rest for training.

        The history of a test holds the validation item. Users with fewer than three items only train.

        >>> data = Interactions.from_events(["a"] * 4 + ["b"], ["w", "x", "y", "z", "z"])
        >>> split = data.leave_one_out()
        >>> split.train, split.valid.histories, split.valid.targets, split.test.histories, split.test.targets
        ([[1, 2], [4]], [[1, 2]], [3], [[1, 2, 3]], [4])
        """
        held = [user for user, history in enumerate(self.histories) if len(history) >= 3]
        train = [history[:-2] if len(history) >= 3 else history for history in self.histories]
        valid, test = (
            HeldOut(
                held,
                [self.histories[user][:last] for user in held],
                [self.histories[user][last] for user in held],
            )
            for last in (-2, -1)
        )
        return Split(train, valid, test)


def count_items(histories: Iterable[Sequence[int]], num_items: int) -> list[int]:
    """How often each item row occurs, `[num_items + 1]`; entry 0 is the padding's.

    >>> count_items([[1, 2], [2]], 3)
    [0, 1, 2, 0]
    """
    counts = collections.Counter(row for history in histories for row in history)
    return [counts[row] for row in range(num_items + 1)]


def sample_negatives(held: HeldOut, weights: Sequence[float], count: int = 100, seed: int = 0) -> np.ndarray:
    """Items for the sampled protocols: drawn one after the other without replacement, none the user ever took.

    Args:
        held: the users; their histories and targets are not drawn.
        weights: by item row from 0, the padding, whose weight must be 0: how often the items occur in the training
            part for "pop100", ones for "uniform100".
        count: how many for each user.
        seed: of the draws.

    Returns:
        `[users, count]` int64 item rows.

    Raises:
        ValueError: the padding has a weight, or a user is left with fewer items than `count`.

    >>> sample_negatives(HeldOut([0], [[1, 2]], [3]), [0, 9, 9, 9, 1, 1], count=2).tolist()
    [[4, 5]]
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights[0] != 0:
        raise ValueError(f"weights[0] ({weights[0]:g}) must be 0 because row 0 is the padding.")
    generator = np.random.default_rng(seed)
    ends = weights.cumsum()
    drawn = np.empty((len(held), count), dtype=np.int64)
    positive = np.count_nonzero(weights)
    for n, (history, target) in enumerate(zip(held.histories, held.targets, strict=True)):
        taken = {*history, target}
        if positive - sum(weights[row] > 0 for row in taken) < count:
            raise ValueError(
                f"count ({count}) is more than the items left for user {held.users[n]}, who took {len(taken)} of "
                f"{positive}; use a smaller count."
            )
        chosen = {}  # successive draws, repetitions ignored, are draws without replacement
        while len(chosen) < count:
            rows = np.searchsorted(ends, generator.random(2 * count) * ends[-1], side="right")
            chosen |= dict.fromkeys(row for row in rows.tolist() if row not in taken)
        drawn[n] = list(chosen)[:count]
    return drawn


def _read_pairs(path):
    users, items = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 2:
            raise ValueError(
                f"line {number} of {path.name} ({line!r}) must be a user and an item with a space between."
            )
        users.append(parts[0])
        items.append(parts[1])
    return users, items


def _read_table(path):
    """{column: values} of a table with a header."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        separator = next((mark for mark in "\t;" if mark in header), ",")
        quoting = csv.QUOTE_NONE if path.suffix in (".inter", ".item") else csv.QUOTE_MINIMAL
        rows = csv.reader(file, delimiter=separator, quoting=quoting)
        names = next(rows, [])
        body = [row for row in rows if row]
    for number, row in enumerate(body, start=2):
        if len(row) != len(names):
            raise ValueError(
                f"row {number} of {path.name} has {len(row)} fields, but the header has {len(names)}; mend the file."
            )
    names = [name.partition(":")[0].strip() for name in names] if quoting == csv.QUOTE_NONE else names
    return dict(zip(names, zip(*body, strict=True), strict=True)) if body else dict.fromkeys(names, ())


def _find(table, what, columns, path, needed=True):
    """The name of the table's column for `what`."""
    if (given := columns.get(what)) is not None:
        found = given if given in table else None
    else:
        lower = {name.lower(): name for name in reversed(table)}
        found = next((lower[name] for name in COLUMNS[what] if name in lower), None)
    if found is None and needed:
        raise ValueError(
            f"{path.name} has no column for {what} ({given or 'none of ' + ', '.join(COLUMNS[what])}) among "
            f"{', '.join(table)}; name it with {what}=."
        )
    return found


def _numbers(values):
    """Times as numbers if all are, else as the texts they are, which ISO dates sort by."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return values


def _read_items(path, columns):
    table = _read_table(path)
    item = _find(table, "item", columns, path)
    title = _find(table, "title", columns, path, needed=columns.get("title") is not None)
    names = {name: "title" if name == title else name for name in table if name != item}
    rows = zip(*(table[name] for name in names), strict=True) if names else [()] * len(table[item])
    return {
        key: {name: value for name, value in zip(names.values(), row, strict=True) if value}
        for key, row in zip(table[item], rows, strict=True)
    }
