"""How the state matrices of S4D and S5 start, and how continuous dynamics become steps.

HiPPO (arXiv 2008.07669) and its diagonal forms: S4D (arXiv 2206.11893, section 4) and S5 (arXiv 2208.04933, section
3.3). Real systems have eigenvalues in conjugate pairs; only the one with positive imaginary part of each is kept, so a
state of size N is N / 2 complex numbers, read out as 2 Re(C x).
"""

from __future__ import annotations

import math

import torch

from ._complex import expm1

INITIALISATIONS = ("lin", "inv", "legs")
DISCRETISATIONS = ("zoh", "bilinear")


def diagonal_init(state_size: int, method: str = "lin") -> torch.Tensor:
    """The eigenvalues that a diagonal state space model starts with (S4D, arXiv 2206.11893, section 4.3).

    lin: -1/2 + i pi n;  inv: -1/2 + i N/pi (N / (2n + 1) - 1);  legs: those of HiPPO-N, see `hippo_normal`.

    Args:
        state_size: N, even.
        method: "lin", "inv" or "legs".

    Returns:
        `[state_size / 2]` complex128 on the CPU, one of each conjugate pair.

    Raises:
        ValueError: an odd or too small state_size, or an unknown method.

    >>> diagonal_init(4, "lin")
    tensor([-0.5000+0.0000j, -0.5000+3.1416j], dtype=torch.complex128)
    """
    _check_state_size(state_size)
    if method not in INITIALISATIONS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(map(repr, INITIALISATIONS))}; use 'lin'.")
    if method == "legs":
        return hippo_blocks(state_size)[0]
    n = torch.arange(state_size // 2, dtype=torch.float64, device="cpu")
    if method == "lin":
        frequency = math.pi * n
    else:
        frequency = state_size / math.pi * (state_size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(frequency, -0.5), frequency)


def hippo_normal(state_size: int) -> torch.Tensor:
    """The normal part of HiPPO-LegS, HiPPO-N: -1/2 on the diagonal, antisymmetric beside it.

    A_nk = -sqrt(n + 1/2) sqrt(k + 1/2) for n > k, and the negative of it for n < k     (arXiv 2206.11893, section 4.1)

    Returns:
        `[state_size, state_size]` float64 on the CPU.

    >>> hippo_normal(2)
    tensor([[-0.5000,  0.8660],
            [-0.8660, -0.5000]], dtype=torch.float64)
    """
    root = (torch.arange(state_size, dtype=torch.float64, device="cpu") + 0.5).sqrt()
    outer = root[:, None] * root
    return outer.triu(1) - outer.tril(-1) - 0.5 * torch.eye(state_size, dtype=torch.float64, device="cpu")


def hippo_blocks(state_size: int, blocks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonalise a block-diagonal matrix of `blocks` equal HiPPO-N matrices (S5, arXiv 2208.04933, section 4.3).

    With A V = V diag(Lambda) and V unitary, x = V x~ turns (A, B, C) into (Lambda, V^H B, C V).

    Args:
        state_size: P, even in every block.
        blocks: J, divides the state size.

    Returns:
        Lambda `[state_size / 2]` and V `[state_size, state_size / 2]`, complex128 on the CPU: of every block the
        eigenvalues with positive imaginary part, ascending. The other half are their conjugates.

    Raises:
        ValueError: blocks that do not divide the state size into even parts.

    >>> hippo_blocks(4, blocks=2)[0]
    tensor([-0.5000+0.8660j, -0.5000+0.8660j], dtype=torch.complex128)
    """
    _check_state_size(state_size)
    if blocks < 1 or state_size % (2 * blocks):
        raise ValueError(
            f"blocks ({blocks}) must divide state_size ({state_size}) into blocks of even size; use 1, or a"
            f" state_size such as {2 * max(1, blocks) * max(1, round(state_size / (2 * max(1, blocks))))}."
        )
    size = state_size // blocks
    matrix = hippo_normal(size)
    skew = matrix + 0.5 * torch.eye(size, dtype=torch.float64, device="cpu")
    frequency, vectors = torch.linalg.eigh(-1j * skew)  # i times a Hermitian matrix: stable, unlike eig of `matrix`
    frequency, vectors = frequency[size // 2 :], vectors[:, size // 2 :]  # ascending, symmetric around 0
    eigenvalues = torch.complex(torch.full_like(frequency, -0.5), frequency)
    return eigenvalues.repeat(blocks), torch.block_diag(*[vectors] * blocks)


def discretise(A, dt, method="zoh"):
    """Steps of dx/dt = A x + B u, elementwise for a diagonal A: x_k = exp(log_a) x_{k-1} + scale * B u_k.

    zoh: log_a = dt A, scale = (exp(dt A) - 1) / A, exact for inputs that are constant within a step.
    bilinear: exp(log_a) = (1 + dt A / 2) / (1 - dt A / 2), scale = dt / (1 - dt A / 2).

    The logarithm is what is returned because powers are needed: a^k = exp(k log_a).

    Args:
        A: complex (or real), real part below 0.
        dt: positive float, broadcasts with A.
        method: "zoh" or "bilinear".

    Returns:
        `(log_a, scale)`, shaped like dt * A.

    >>> log_a, scale = discretise(torch.tensor([-1.0]), torch.tensor([0.5]))
    >>> log_a.exp(), scale
    (tensor([0.6065]), tensor([0.3935]))
    """
    if method not in DISCRETISATIONS:
        raise ValueError(f"method ({method!r}) must be one of {', '.join(map(repr, DISCRETISATIONS))}; use 'zoh'.")
    z = dt * A
    if method == "zoh":
        return z, expm1(z) / A
    # each factor lies in the right half plane, so no logarithm meets its branch cut
    return torch.log1p(z / 2) - torch.log1p(-z / 2), dt / (1 - z / 2)


def _check_state_size(state_size):
    if state_size < 2 or state_size % 2:
        raise ValueError(
            f"state_size ({state_size}) must be a positive even number, for it is kept as conjugate pairs; use"
            f" {max(2, state_size + state_size % 2)}."
        )
