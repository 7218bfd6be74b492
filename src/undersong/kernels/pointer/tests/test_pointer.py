"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from pointer import additive_pointer_attention, layers  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_equals_the_definition():
    We, Wd, v = (torch.randn(shape, device=DEVICE) for shape in ((2, 19, 40), (2, 9, 40), (40,)))
    want = torch.tanh(We[:, None].double() + Wd[:, :, None].double()) @ v.double()
    torch.testing.assert_close(additive_pointer_attention(We, Wd, v).double(), want, rtol=0, atol=1e-5)


def test_layer_masks_and_differentiates():
    layer = layers.AdditivePointerAttention()
    We, Wd, v = (torch.randn(shape, device=DEVICE).requires_grad_() for shape in ((2, 5, 8), (2, 1, 8), (8,)))
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=DEVICE)
    logits = layer(We, Wd, v, mask)
    assert logits[1, :, 3:].eq(-torch.inf).all()
    logits.softmax(-1)[..., 0].sum().backward()
    assert We.grad[1, 3:].eq(0).all()
    assert Wd.grad.isfinite().all()
