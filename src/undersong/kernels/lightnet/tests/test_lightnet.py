"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from lightnet import layers, lightnet_attention, lightnet_attention_bidirectional  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(length, spread):
    q, k, v = (torch.randn(2, length, 2, 16, device=DEVICE) for _ in range(3))
    return q, k * spread, v


def test_equals_softmax_over_each_prefix():
    q, k, v = inputs(70, 20.0)
    o, _ = lightnet_attention(q, k, v, 0.25)
    for t in (0, 31, 32, 69):
        khat = k[:, : t + 1].double().softmax(1)
        want = 0.25 * torch.einsum("bhc,bshc,bshv->bhv", q[:, t].double(), khat, v[:, : t + 1].double())
        torch.testing.assert_close(o[:, t].double(), want, rtol=0, atol=1e-4)


def test_without_order_equals_softmax_over_all():
    q, k, v = inputs(70, 20.0)
    want = 0.25 * torch.einsum("bthc,bshc,bshv->bthv", q.double(), k.double().softmax(1), v.double())
    o = lightnet_attention_bidirectional(q, k, v, 0.25)
    torch.testing.assert_close(o.double(), want, rtol=0, atol=1e-4)


def test_layer_hands_a_state_on():
    layer = layers.LightNetAttention()
    q, k, v = inputs(40, 1.0)
    first, state = layer(q[:, :25], k[:, :25], v[:, :25], return_final_state=True)
    second = layer(q[:, 25:], k[:, 25:], v[:, 25:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), layer(q, k, v), rtol=0, atol=1e-4)
