"""Tokens whose joint distribution is known, to see which order of writing them is easy to learn.

Two sources from "Order Matters: Sequence to sequence for sets" (arXiv 1511.06391, sec. 5): sentences of a Markov chain
(where the paper has 5-grams of text), and a star, a hidden head that its leaves depend on. Any order of the tokens has
the same entropy. What differs is what has to be learned for it: every factor of the natural order is a small table,
those of other orders are sums over what is not yet known.
"""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

__all__ = ["BOS", "EOS", "FIRST_TOKEN", "SCRAMBLED", "JointTokenDataset", "MarkovSentences", "Star"]

BOS, EOS, FIRST_TOKEN = 1, 2, 3  # 0 pads
SCRAMBLED = (4, 0, 2, 3, 1)  # the paper's other order of five words: 5, 1, 3, 4, 2


class MarkovSentences:
    """Sentences in which every word depends on the one before, by one table for all places.

    The first word is uniform; the probabilities that follow a word are a draw from a Dirichlet distribution.

    Args:
        words: size of the vocabulary.
        length: words of a sentence.
        concentration: of the Dirichlet distribution; the smaller, the more predictable a next word.
        seed: of the table.

    Attributes:
        vocab_size: token ids there are, special ones included.
        entropy: nats of a sentence, exact.

    >>> source = MarkovSentences(words=6, seed=1)
    >>> source.sample(2, torch.Generator().manual_seed(0)).shape, round(source.entropy, 2)
    (torch.Size([2, 5]), 2.58)
    """

    def __init__(self, words: int = 16, length: int = 5, concentration: float = 0.1, seed: int = 0):
        if words < 2 or length < 1:
            raise ValueError(f"words ({words}) must be at least 2 and length ({length}) at least 1; use 16 and 5.")
        if not concentration > 0:
            raise ValueError(f"concentration ({concentration}) must be positive; use 0.1.")
        generator = torch.Generator().manual_seed(seed)
        alpha = torch.full((words, words), concentration, dtype=torch.float64)
        gamma = torch._standard_gamma(alpha, generator=generator).clamp(min=1e-30)
        self.table = gamma / gamma.sum(1, keepdim=True)
        self.words, self.length = words, length
        self.vocab_size = FIRST_TOKEN + words
        place = torch.full((words,), 1 / words, dtype=torch.float64)
        self.entropy = torch.special.entr(place).sum().item()
        step = torch.special.entr(self.table).sum(1)
        for _ in range(length - 1):
            self.entropy += (place * step).sum().item()
            place = place @ self.table

    def sample(self, batch: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Sentences `[batch, length]` of token ids, on the generator's device."""
        device = generator.device if generator is not None else "cpu"
        table = self.table.to(device, torch.float32)
        words = [torch.randint(self.words, (batch,), generator=generator, device=device)]
        for _ in range(self.length - 1):
            words.append(table[words[-1]].multinomial(1, generator=generator).squeeze(1))
        return torch.stack(words, 1) + FIRST_TOKEN


class Star:
    """A binary head, and binary leaves that are independent of each other once the head is known.

    Every variable has token ids of its own, so a set of tokens is an assignment.

    Args:
        leaves: how many.
        flip: probability that a leaf differs from the head.

    Attributes:
        vocab_size, entropy: as those of `MarkovSentences`.

    >>> Star(leaves=3).sample(1, torch.Generator().manual_seed(0)) - FIRST_TOKEN  # the head, then the leaves
    tensor([[0, 2, 5, 6]])
    """

    def __init__(self, leaves: int = 8, flip: float = 0.1):
        if leaves < 1:
            raise ValueError(f"leaves ({leaves}) must be at least 1; use 8.")
        if not 0 < flip < 1:
            raise ValueError(f"flip ({flip}) must lie between 0 and 1; use 0.1.")
        self.leaves, self.flip = leaves, flip
        self.length = leaves + 1
        self.vocab_size = FIRST_TOKEN + 2 * self.length
        noise = torch.special.entr(torch.tensor([flip, 1 - flip], dtype=torch.float64)).sum().item()
        self.entropy = torch.tensor(2.0, dtype=torch.float64).log().item() + leaves * noise

    def sample(self, batch: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Assignments `[batch, leaves + 1]` as token ids, the head first."""
        device = generator.device if generator is not None else "cpu"
        head = torch.randint(2, (batch, 1), generator=generator, device=device)
        flipped = torch.rand(batch, self.leaves, generator=generator, device=device) < self.flip
        return torch.cat([head, head ^ flipped], 1) + 2 * torch.arange(self.length, device=device) + FIRST_TOKEN


class JointTokenDataset(Dataset):
    """Rows for causal language models: BOS, the tokens in one order, EOS; the label of BOS is -100.

    Args:
        source: `MarkovSentences` or `Star`.
        size: number of rows, made once at the start.
        seed: of all draws.
        order: places of the source's tokens in the order to write them in; None for the natural one.

    Raises:
        ValueError: an order that is no permutation, or no rows.

    >>> row = JointTokenDataset(MarkovSentences(words=6), size=4, order=SCRAMBLED)[0]
    >>> row["input_ids"].shape, row["labels"][0].item()
    (torch.Size([7]), -100)
    """

    def __init__(self, source, size: int, seed: int = 0, order=None):
        if size < 1:
            raise ValueError(f"size ({size}) must be at least 1.")
        order = list(range(source.length)) if order is None else list(order)
        if sorted(order) != list(range(source.length)):
            raise ValueError(
                f"order ({order}) must be a permutation of 0 to {source.length - 1} because a row has {source.length}"
                " tokens."
            )
        tokens = source.sample(size, torch.Generator().manual_seed(seed))[:, order]
        ends = torch.tensor([[BOS, EOS]]).expand(size, 2)
        self.input_ids = torch.cat([ends[:, :1], tokens, ends[:, 1:]], 1)
        self.labels = self.input_ids.masked_fill(self.input_ids == BOS, -100)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}
