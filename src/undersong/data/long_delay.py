"""A token at the start of a series that must be named after thousands of steps of noise.

The synthetic test of long memory: only the first moments matter, everything after them tries to wash them out. A
recurrence must hold a number for thousands of steps, and its training must find that out through as many steps.
"""

from __future__ import annotations

import torch

__all__ = ["long_delay"]


def long_delay(
    series: int,
    delay: int = 4096,
    *,
    classes: int = 4,
    token_steps: int = 16,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Series of one token, then noise: a channel per class, 1 for the first steps if it is the class, then 0, and one
    channel of noise from the first step to the last.

    Args:
        series: how many.
        delay: steps of noise after the token; the length is `token_steps + delay`.
        classes: kinds of tokens, drawn with equal chance.
        token_steps: how long the token stands.
        noise: standard deviation of the last channel.
        generator: source of randomness; its device is where the tensors are made.

    Returns:
        `past_values` `[series, token_steps + delay, classes + 1]` float32 and `labels` `[series]` int64.

    Raises:
        ValueError: fewer than 2 classes, a token without steps, or a negative delay.

    >>> values, labels = long_delay(3, delay=10, token_steps=2, generator=torch.Generator().manual_seed(0))
    >>> values.shape, torch.equal(values[:, 1, :4].argmax(-1), labels)
    (torch.Size([3, 12, 5]), True)
    """
    if classes < 2:
        raise ValueError(f"classes ({classes}) must be at least 2, or there is nothing to tell apart; use 4.")
    if token_steps < 1 or delay < 0:
        raise ValueError(f"token_steps ({token_steps}) must be at least 1 and delay ({delay}) not negative.")
    device = generator.device if generator is not None else "cpu"
    labels = torch.randint(classes, (series,), generator=generator, device=device)
    values = torch.zeros(series, token_steps + delay, classes + 1, device=device)
    values[:, :token_steps, :-1] = torch.nn.functional.one_hot(labels, classes).unsqueeze(1).to(values.dtype)
    values[..., -1] = noise * torch.randn(values.shape[:2], generator=generator, device=device)
    return values, labels
