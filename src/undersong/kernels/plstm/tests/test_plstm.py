"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

import plstm  # noqa: E402
from plstm import layers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape):
    return torch.randn((2, 12, 2, *shape), device=DEVICE)


def test_a_sequence_and_its_tokens_agree():
    x = normal(16, 1), normal(16, 1), normal(16, 1), normal(1, 1, 1), torch.tanh(normal(1, 1)), normal(1, 1, 1)
    x = *x, normal(1, 1, 1, 1)
    y, state = layers.PLSTM1D()(*x, return_final_state=True)
    stepped = None
    for t in range(12):
        out, stepped = plstm.plstm1d(*(tensor[:, t : t + 1] for tensor in x), stepped)
        torch.testing.assert_close(out, y[:, t : t + 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stepped, state, rtol=1e-3, atol=1e-3)
