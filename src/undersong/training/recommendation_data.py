"""Batches for recommenders: histories with masked items (BERT4Rec) or with the item that follows (gSASRec, SASRec).

A random window of every history is cut and masked anew each time it comes up. Negatives are not drawn here but in the
loss, on the device (see `undersong.modeling.recommendation_losses`).
"""

import torch
from torch.utils.data import get_worker_info

from ..modeling.recommend import check_item_ids
from ..tokenization.item_vocab import left_pad


class _HistoryCollator:
    """Cuts windows; `self.generator()` gives the randomness."""

    def __init__(self, num_items, window, seed):
        if window < 1:
            raise ValueError(f"window ({window}) must be at least 1; use the model's max_position_embeddings.")
        self.num_items, self.window, self.seed = num_items, window, seed
        self._generator, self._owner = None, None

    def generator(self):
        """None is torch's own generator, which Trainer seeds and which differs between workers and epochs."""
        if self.seed is None:
            return None
        worker = get_worker_info()
        owner = None if worker is None else worker.seed  # another one for each worker and epoch
        if self._generator is None or owner != self._owner:
            self._generator = torch.Generator().manual_seed((self.seed + (owner or 0)) % 2**63)
            self._owner = owner
        return self._generator

    def history(self, example):
        """(items as int64 `[length]`, the item to predict behind them or None) of a list or a dict."""
        target = example.get("target") if isinstance(example, dict) else None
        items = torch.as_tensor(example["input_ids"] if isinstance(example, dict) else example, dtype=torch.int64)
        if target is None and len(items) < self.shortest:
            raise ValueError(
                f"a history of {len(items)} items has nothing to train on; leave out histories shorter than"
                f" {self.shortest}."
            )
        both = items if target is None else torch.cat([items, torch.tensor([int(target)])])
        check_item_ids("a history", both, self.num_items, self.num_items)
        if not both.all():
            raise ValueError("a history holds id 0, which is padding; pass histories without padding.")
        return items, target

    def cut(self, items, size):
        """A window of `size` items that ends anywhere from item `size` on; the whole history if it is shorter."""
        spare = len(items) - size
        if spare <= 0:
            return items
        end = len(items) - int(torch.randint(spare + 1, (1,), generator=self.generator()))
        return items[end - size : end]


class DataCollatorForCloze(_HistoryCollator):
    """Masks items of histories for BERT4Rec (arXiv 1904.06690, section 3.5).

    Of a window of n items, m = clip(round(mask_prob n), 1, max_predictions) become the mask and labels. In a share of
    `last_item_prob` of the windows only the last item does, which is what inference asks for.

    Args:
        num_items: size N of the catalogue; the mask is N + 1.
        window: most items of a row, `config.max_position_embeddings` or less.
        mask_prob: share of items masked; more for short histories and sparse data (the authors: 0.2 for MovieLens,
            0.4 for Steam, 0.6 for Beauty).
        max_predictions: most masks of a row.
        last_item_prob: share of rows with just the last item masked.
        seed: of a generator of its own; None uses torch's, which Trainer seeds.

    Examples are lists of item ids, oldest first, or dicts with `input_ids` and, for evaluation, `target`: then the row
    is the end of the history and a mask whose label is the target.

    Returns:
        `input_ids`, `attention_mask`, `labels` (-100 where nothing is masked), int64 `[batch, length]`, left-padded.

    Raises:
        ValueError: options out of range, an empty history without a target, ids outside 1..N.

    >>> collator = DataCollatorForCloze(num_items=9, window=4, last_item_prob=1.0)
    >>> batch = collator([[1, 2, 3], [4, 5]])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[1, 2, 10], [0, 4, 10]], [[-100, -100, 3], [-100, -100, 5]])
    """

    shortest = 1

    def __init__(self, num_items, window=200, *, mask_prob=0.2, max_predictions=20, last_item_prob=0.1, seed=None):
        super().__init__(num_items, window, seed)
        for name, value in (("mask_prob", mask_prob), ("last_item_prob", last_item_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} ({value}) must lie in [0, 1]; use 0.2.")
        if max_predictions < 1:
            raise ValueError(f"max_predictions ({max_predictions}) must be at least 1; use 20.")
        self.mask_prob, self.max_predictions, self.last_item_prob = mask_prob, max_predictions, last_item_prob

    def __call__(self, examples):
        rows = [self._row(example) for example in examples]
        return _batch(*zip(*rows, strict=True))

    def _row(self, example):
        items, target = self.history(example)
        if target is not None:
            items = torch.cat([items[max(0, len(items) - self.window + 1) :], torch.tensor([int(target)])])
            masked = torch.tensor([len(items) - 1])
        else:
            items = self.cut(items, self.window)
            masked = self._choose(len(items))
        inputs, labels = items.clone(), torch.full_like(items, -100)
        inputs[masked], labels[masked] = self.num_items + 1, items[masked]
        return inputs, labels

    def _choose(self, length):
        generator = self.generator()
        if torch.rand((), generator=generator) < self.last_item_prob:
            return torch.tensor([length - 1])
        count = min(max(round(self.mask_prob * length), 1), self.max_predictions)
        return torch.randperm(length, generator=generator)[:count]


class DataCollatorForNextItem(_HistoryCollator):
    """Histories and, as labels, the item that follows each position, for gSASRec and SASRec.

    Args:
        num_items: size N of the catalogue.
        window: most items of a row, `config.max_position_embeddings` or less.
        seed: of a generator of its own; None uses torch's, which Trainer seeds.

    Examples are lists of at least two item ids, oldest first, or dicts with `input_ids` and, for evaluation, `target`:
    then only the last position has a label, the target.

    Returns:
        `input_ids`, `attention_mask`, `labels` (-100 for padding), int64 `[batch, length]`, left-padded.

    Raises:
        ValueError: an option out of range, a history with nothing to predict, ids outside 1..N.

    >>> batch = DataCollatorForNextItem(num_items=9, window=3)([[1, 2, 3], [4, 5]])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[1, 2], [0, 4]], [[2, 3], [-100, 5]])
    """

    shortest = 2

    def __init__(self, num_items, window=200, *, seed=None):
        super().__init__(num_items, window, seed)

    def __call__(self, examples):
        rows = [self._row(example) for example in examples]
        return _batch(*zip(*rows, strict=True))

    def _row(self, example):
        items, target = self.history(example)
        if target is None:
            items = self.cut(items, self.window + 1)
            return items[:-1], items[1:]
        if not len(items):
            raise ValueError("an empty history has no position that could predict target; leave it out.")
        items = items[-self.window :]
        labels = torch.full_like(items, -100)
        labels[-1] = int(target)
        return items, labels


def _batch(inputs, labels):
    input_ids = left_pad(inputs)
    return {
        "input_ids": input_ids,
        "attention_mask": input_ids.ne(0).long(),
        "labels": left_pad(labels, input_ids.shape[1], value=-100),
    }


__all__ = ["DataCollatorForCloze", "DataCollatorForNextItem"]
