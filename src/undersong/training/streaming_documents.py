"""Long documents as streams of consecutive windows, for training that carries a recurrent state from step to step.

Every row of a batch reads one document after the other; the batch of one step holds the windows that follow those of
the step before (truncated backpropagation through time, as in "Stuffed Mamba", arXiv 2410.07145, section 5). The
order is a plain sampler over windows, so workers, several processes and resuming work as for any `Trainer`.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, cycle, islice

import torch
from torch.utils.data import Dataset, Sampler

_IGNORED = -100  # the label that causal LM losses leave out


class DocumentWindows(Dataset):
    """Documents cut into windows; the last token of each window knows the first of the next one.

    Args:
        documents: sequences of token ids, or mappings that hold one as `input_ids`.
        window: tokens a window holds; the last one of a document may be shorter. A token that would be alone in the
            last one, with nothing to predict, is only the label of the one before.
        min_length: shorter documents are left out, such as those that fit into one window and carry no state on.

    Raises:
        ValueError: a window below 1, a `min_length` below 2, or no document of `min_length` tokens.

    >>> windows = DocumentWindows([[1, 2, 3, 4, 5], [6, 7]], window=3)
    >>> [windows[i] for i in range(len(windows))][1]
    {'input_ids': [4, 5], 'shift_labels': [5, -100], 'doc_start': False}
    """

    def __init__(self, documents: Sequence, window: int, min_length: int = 2):
        if window < 1:
            raise ValueError(f"window ({window}) must be at least 1 token; use what the model trains on, e.g. 2048.")
        if min_length < 2:
            raise ValueError(f"min_length ({min_length}) must be at least 2, because one token predicts nothing.")
        lengths = [len(_tokens(document)) for document in documents]
        self.documents, self.window = documents, window
        self.kept = [index for index, length in enumerate(lengths) if length >= min_length]
        if not self.kept:
            raise ValueError(
                f"documents must hold one of at least min_length ({min_length}) tokens, but the longest of"
                f" {len(lengths)} has {max(lengths, default=0)}; pass longer texts or a smaller min_length."
            )
        # first[i] is the index of the first window of the i-th kept document
        self.first = [0, *accumulate(-(-(lengths[index] - 1) // window) for index in self.kept)]

    def __len__(self):
        return self.first[-1]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index ({index}) must lie in 0..{len(self) - 1}, the windows of this dataset.")
        place = bisect.bisect_right(self.first, index) - 1
        tokens = _tokens(self.documents[self.kept[place]])
        begin = (index - self.first[place]) * self.window
        following = list(tokens[begin + 1 : begin + self.window + 1])
        ids = list(tokens[begin : begin + self.window])
        following += [_IGNORED] * (len(ids) - len(following))  # nothing follows the last token of a document
        return {"input_ids": ids, "shift_labels": following, "doc_start": begin == 0}


class DocumentStreamSampler(Sampler[int]):
    """The order in which `rows` parallel readers go through the windows: index s * rows + r is reader r at step s.

    The reader that is done first takes the next document of a random order. All epochs have `len(windows) // rows`
    steps: where lengths do not come out even, some readers stop inside a document, and others begin the order again.

    Args:
        windows: a `DocumentWindows`.
        rows: readers: rows of a batch, times the processes that train.
        seed: of the order of documents; `set_epoch` changes it too.

    Raises:
        ValueError: more readers than documents.

    >>> windows = DocumentWindows([[1] * 6, [2] * 4, [3] * 2], window=2)
    >>> order = list(DocumentStreamSampler(windows, rows=2))
    >>> [windows[i]["input_ids"][0] for i in order[0::2]], [windows[i]["input_ids"][0] for i in order[1::2]]
    ([3, 2, 2], [1, 1, 1])
    """

    def __init__(self, windows: DocumentWindows, rows: int, seed: int = 0):
        if not 1 <= rows <= len(windows.kept):
            raise ValueError(
                f"rows ({rows}) must lie in 1..{len(windows.kept)}, the documents there are, because every row reads"
                " one of its own; use smaller batches, or cut the documents into parts."
            )
        self.windows, self.rows, self.seed, self.epoch = windows, rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return len(self.windows) // self.rows * self.rows

    def __iter__(self) -> Iterator[int]:
        steps = len(self.windows) // self.rows
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = cycle(torch.randperm(len(self.windows.kept), generator=generator).tolist())
        parts: list[list[range]] = [[] for _ in range(self.rows)]
        readers = [(0, reader) for reader in range(self.rows)]  # a heap of (windows read, reader)
        while readers[0][0] < steps:
            read, reader = readers[0]
            part = range(*self.windows.first[(document := next(order)) : document + 2])
            parts[reader].append(part)
            heapq.heapreplace(readers, (read + len(part), reader))
        streams = (chain.from_iterable(part) for part in parts)
        return chain.from_iterable(islice(zip(*streams, strict=False), steps))


class StreamingDocumentCollator:
    """Makes batches of `DocumentWindows`' items, padded on the right.

    Args:
        pad_token_id: what short windows are filled with; the mask hides it.
        window: the length every batch is padded to; by default that of its longest row.

    Returns (when called with a list of items):
        `input_ids`, `attention_mask` `[rows, length]`.
        `labels`, `shift_labels` `[rows, length]`: what a causal language model takes; `shift_labels` at a position is
            the token after it, also where that one begins the next window, and -100 at the end of a document.
        `doc_start` `[rows]` bool: whether the row's window begins a document.

    Raises:
        ValueError: an item longer than `window`.

    >>> windows = DocumentWindows([[1, 2, 3, 4, 5], [6, 7]], window=3)
    >>> batch = StreamingDocumentCollator(pad_token_id=0)([windows[0], windows[2]])
    >>> batch["shift_labels"].tolist(), batch["doc_start"].tolist()
    ([[2, 3, 4], [7, -100, -100]], [True, True])
    """

    def __init__(self, pad_token_id: int = 0, window: int | None = None):
        self.pad_token_id, self.window = pad_token_id, window

    def __call__(self, features: Sequence[dict]) -> dict[str, torch.Tensor]:
        longest = max(len(feature["input_ids"]) for feature in features)
        if self.window is not None and longest > self.window:
            raise ValueError(f"window ({self.window}) must be at least {longest}, the tokens of the longest item.")
        length = self.window or longest
        ids = [_filled(feature["input_ids"], length, self.pad_token_id) for feature in features]
        mask = [_filled([1] * len(feature["input_ids"]), length, 0) for feature in features]
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, _IGNORED),
            "shift_labels": torch.tensor([_filled(f["shift_labels"], length, _IGNORED) for f in features]),
            "doc_start": torch.tensor([bool(feature["doc_start"]) for feature in features]),
        }


def _tokens(document):
    return document["input_ids"] if hasattr(document, "keys") else document


def _filled(values, length, value):
    return [*values, *[value] * (length - len(values))]


__all__ = ["DocumentStreamSampler", "DocumentWindows", "StreamingDocumentCollator"]
