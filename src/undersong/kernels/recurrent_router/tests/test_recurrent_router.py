"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from recurrent_router import layers, problem, recurrent_router  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind, tokens, size, experts):
    cell = kind(size, size, device=DEVICE)
    u, h = torch.randn(2, tokens, size, device=DEVICE)
    return u, h, cell, torch.randn(experts, size, device=DEVICE)


def parameters(cell):
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


@pytest.mark.parametrize("kind", [torch.nn.GRUCell, torch.nn.RNNCell])
def test_state_is_the_cells_and_weights_are_of_the_most_likely(kind):
    u, h, cell, W2 = make(kind, 21, 40, 9)
    new, scores, weights, experts = recurrent_router(u, h, *parameters(cell), W2, 3)
    want = cell.double()(u.double(), h.double())
    torch.testing.assert_close(new.double(), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.double(), want @ W2.double().T, rtol=0, atol=2e-5)
    chosen, order = scores.topk(3)
    assert torch.equal(experts, order)
    torch.testing.assert_close(weights, chosen.softmax(-1))


def test_layer_differentiates():
    u, h, cell, W2 = make(torch.nn.GRUCell, 4, 8, 4)
    leaves = [x.requires_grad_() for x in (u, h, W2)]
    new, _, weights, _ = layers.RecurrentRouter()(u, h, parameters(cell), W2, 2)
    gradients = torch.autograd.grad(new.sum() + weights[:, 0].sum(), [*leaves, *cell.parameters()])
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_too_many_experts_are_named():
    u, h, cell, _ = make(torch.nn.GRUCell, 4, 8, 4)
    W2 = torch.zeros(257, 8, device=DEVICE)
    assert problem(u, h, *parameters(cell), W2) == "experts (257) and router size (8) must be at most 256"
