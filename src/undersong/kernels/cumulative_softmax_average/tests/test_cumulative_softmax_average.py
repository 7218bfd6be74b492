"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from cumulative_softmax_average import cumulative_softmax_average, layers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_equals_softmax_over_each_prefix():
    s, v = torch.randn(2, 150, 2, device=DEVICE) * 20, torch.randn(2, 150, 2, 16, device=DEVICE)
    o, _ = cumulative_softmax_average(s, v)
    for t in (0, 63, 64, 149):
        weights = s[:, : t + 1].double().softmax(1)
        want = (weights[..., None] * v[:, : t + 1].double()).sum(1)
        torch.testing.assert_close(o[:, t].double(), want, rtol=0, atol=1e-5)


def test_layer_hands_a_state_on():
    layer = layers.CumulativeSoftmaxAverage()
    s, v = torch.randn(1, 40, 2, device=DEVICE), torch.randn(1, 40, 2, 16, device=DEVICE)
    first, state = layer(s[:, :25], v[:, :25], return_final_state=True)
    second = layer(s[:, 25:], v[:, 25:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), layer(s, v), rtol=0, atol=1e-5)
