"""Words of permutations: after every letter, what is the product so far?

The word problem of the symmetric group is what a recurrence whose transitions are numbers cannot solve at any length,
and one with matrices can (pLSTM, arXiv 2506.11997, section 3.1; "The Illusion of State in State-Space Models",
arXiv 2404.08819). A row is what a causal language model reads: the next token of a word is its product.
"""

from __future__ import annotations

import itertools

import torch

__all__ = ["multiplication_table", "permutation_words"]


def multiplication_table(things: int) -> torch.Tensor:
    """`[things!, things!]` int64: entry (a, b) is the permutation that does b first, then a.

    Permutations are numbered in lexicographic order; 0 changes nothing.

    Raises:
        ValueError: things outside 2 to 5.

    >>> multiplication_table(2).tolist()
    [[0, 1], [1, 0]]
    """
    if not isinstance(things, int) or not 2 <= things <= 5:
        raise ValueError(
            f"things ({things!r}) must be an integer from 2 to 5, which have 2 to 120 permutations; use 3."
        )
    elements = list(itertools.permutations(range(things)))
    number = {element: n for n, element in enumerate(elements)}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


def permutation_words(
    batch: int, length: int, things: int = 3, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random words of permutations, and their products after every letter.

    Args:
        batch, length: number of words and of letters in each.
        things: how many things are permuted; 3 gives the group S3 of 6 elements, with tokens 0 to 5. One more token,
            `things!`, stands at the begin of a word.
        generator: source of randomness; its device is where the tensors are made.

    Returns:
        `input_ids` `[batch, length + 2]`: the token of begin, the letters, and the product of all of them; and
        `labels` of the same shape, of which entry t + 1 is the product of the letters up to entry t: what a language
        model, whose loss compares its output at t with the label at t + 1, should say there. Labels of the begin and
        of the first letter are -100.

    Raises:
        ValueError: length 0, or things outside 2 to 5.

    >>> ids, labels = permutation_words(1, 4, things=2, generator=torch.Generator().manual_seed(0))
    >>> ids.tolist(), labels.tolist()  # of two things, the product is the parity
    ([[2, 0, 1, 1, 0, 0]], [[-100, -100, 0, 1, 0, 0]])
    """
    if length < 1:
        raise ValueError(f"length ({length}) must be at least 1 letter; use 32.")
    device = generator.device if generator is not None else "cpu"
    table = multiplication_table(things).to(device)
    letters = torch.randint(len(table), (batch, length), generator=generator, device=device)
    products = [letters[:, 0]]
    for letter in letters[:, 1:].unbind(1):
        products.append(table[letter, products[-1]])
    begin, unasked = torch.full_like(letters[:, :1], len(table)), torch.full_like(letters[:, :1], -100)
    labels = torch.cat([unasked, unasked, torch.stack(products, 1)], 1)
    return torch.cat([begin, letters, labels[:, -1:]], 1), labels
