"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

import state_space  # noqa: E402
from state_space import layers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape):
    return torch.randn(shape, device=DEVICE)


def test_convolution_equals_torchs():
    x, weight, bias = normal(2, 50, 24), normal(24, 4), normal(24)
    y, window = state_space.causal_conv1d(x, weight, bias, "silu")
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    want = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=24))
    torch.testing.assert_close(y, want.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(window, x[:, -4:].transpose(1, 2))


def test_mamba_scan_and_its_steps_agree():
    u, delta, z = (normal(2, 40, 24) for _ in range(3))
    A, B, C, D = -normal(24, 16).exp(), normal(2, 40, 16), normal(2, 40, 16), normal(24)
    y, state = state_space.selective_scan(u, delta, A, B, C, D, z, D, True)
    stepped = torch.zeros_like(state)
    for t in range(40):
        step = (u[:, t], delta[:, t], A, B[:, t], C[:, t], D, z[:, t], D, True)
        out, stepped = state_space.selective_state_update(stepped, *step, inplace=True)
        torch.testing.assert_close(out, y[:, t], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stepped, state, rtol=1e-4, atol=1e-4)


def test_mamba2_scan_and_its_steps_agree():
    x, dt = normal(2, 40, 4, 16), normal(2, 40, 4)
    A, B, C, D = -normal(4).exp(), normal(2, 40, 2, 32), normal(2, 40, 2, 32), normal(4)
    layer = layers.SSD()
    y, state = layer(x, dt, A, B, C, D, dt_bias=D, dt_softplus=True, return_final_state=True)
    stepped = torch.zeros_like(state)
    for t in range(40):
        step = (x[:, t], dt[:, t], A, B[:, t], C[:, t], D, None, D, True)
        out, stepped = state_space.selective_state_update(stepped, *step, inplace=True)
        torch.testing.assert_close(out, y[:, t], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stepped, state, rtol=1e-3, atol=1e-3)


def test_controlled_mamba2_scans_and_their_steps_agree():
    x, dt = normal(2, 40, 4, 16), normal(2, 40, 4)
    A, B, C, D = -normal(4).exp() / 50, normal(2, 40, 2, 32), normal(2, 40, 2, 32), normal(4)
    for function, control in (
        (state_space.ssd_threshold, torch.full((4,), 20.0, device=DEVICE)),
        (state_space.ssd_window, 1),
    ):
        options = None, D, True, (0.0, float("inf")), 16, control
        y, state = function(x, dt, A, B, C, D, *options)
        out, stepped = function(*(t[:, :1] for t in (x, dt)), A, *(t[:, :1] for t in (B, C)), D, *options)
        for t in range(40):
            if t:
                now = slice(t, t + 1)
                position = torch.full((2,), t, device=DEVICE)
                out, stepped = function(
                    x[:, now], dt[:, now], A, B[:, now], C[:, now], D, *options, stepped, position, inplace=True
                )
            torch.testing.assert_close(out[:, 0], y[:, t], rtol=1e-3, atol=1e-3)
        for got, want in zip(stepped, state):  # noqa: B905 - python 3.9
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
