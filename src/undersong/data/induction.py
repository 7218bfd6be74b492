"""Induction heads and selective copying, the synthetic tasks of Gu and Dao, "Mamba" (arXiv 2312.00752, section 4.1).

Both ask for tokens that only their content marks as worth keeping, at places that differ from row to row, so a
recurrence whose gates do not see the input cannot solve them. Rows are what a causal language model reads: the answer
is the end of the row, and `labels` are -100 everywhere else.
"""

from __future__ import annotations

import torch

__all__ = ["induction_heads", "selective_copying"]


def induction_heads(
    batch: int, length: int, vocab_size: int = 16, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, among them once the special token 0, at any place; after its second appearance, near the end of
    the row, the token that followed the first must be said again.

    Args:
        batch, length: shape of the result; the special token returns at `length - 2`, the answer is the last token.
        vocab_size: the special token and `vocab_size - 1` others, 16 in the paper.
        generator: source of randomness; its device is where the tensors are made.

    Returns:
        `input_ids` `[batch, length]` and `labels`, which are -100 except at the answer.

    Raises:
        ValueError: a row too short for both appearances, or fewer than 2 tokens to tell apart.

    >>> ids, labels = induction_heads(1, 8, generator=torch.Generator().manual_seed(0))
    >>> ids.tolist(), labels.tolist()
    ([[...]], [[-100, -100, -100, -100, -100, -100, -100, ...]])
    """
    if length < 4:
        raise ValueError(
            f"length ({length}) must be at least 4: the special token and the token to remember, then both again."
        )
    if vocab_size < 3:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least 3: the special token and 2 others; use 16.")
    device = generator.device if generator is not None else "cpu"
    ids = torch.randint(1, vocab_size, (batch, length), generator=generator, device=device)
    place = torch.randint(length - 3, (batch, 1), generator=generator, device=device)
    answer = ids.gather(1, place + 1)
    ids.scatter_(1, place, 0)
    ids[:, -2] = 0
    ids[:, -1:] = answer
    labels = torch.full_like(ids, -100)
    labels[:, -1:] = answer
    return ids, labels


def selective_copying(
    batch: int,
    length: int,
    tokens: int = 16,
    vocab_size: int = 16,
    *,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A few data tokens at random places among noise, token 0; after token 1 they must be said in their order.

    Args:
        batch, length: shape of the result. The paper hides 16 data tokens in 4,096.
        tokens: data tokens to remember; with token 1 they are the last `tokens + 1` of a row.
        vocab_size: noise, token 1 and `vocab_size - 2` kinds of data.
        generator: source of randomness; its device is where the tensors are made.

    Returns:
        `input_ids` `[batch, length]` and `labels`, which are -100 except at the answers.

    Raises:
        ValueError: a row too short for the data and its copy, or fewer than 2 kinds of data.

    >>> ids, labels = selective_copying(1, 8, tokens=2, generator=torch.Generator().manual_seed(0))
    >>> ids[0, 5].item(), torch.equal(ids[0, :5][ids[0, :5] > 1], ids[0, 6:]), (labels != -100).sum().item()
    (1, True, 2)
    """
    if tokens < 1 or length < 2 * tokens + 1:
        raise ValueError(
            f"length ({length}) must be at least {2 * tokens + 1} for {tokens} tokens: the data, the token that asks,"
            " and the copy; tokens must be at least 1."
        )
    if vocab_size < 4:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least 4: noise, token 1 and 2 kinds of data; use 16.")
    device = generator.device if generator is not None else "cpu"
    body = length - tokens - 1
    data = torch.randint(2, vocab_size, (batch, tokens), generator=generator, device=device)
    places = torch.rand(batch, body, generator=generator, device=device).argsort(1)[:, :tokens].sort(1).values
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    ids.scatter_(1, places, data)
    ids[:, body] = 1
    ids[:, body + 1 :] = data
    labels = torch.full_like(ids, -100)
    labels[:, body + 1 :] = data
    return ids, labels
