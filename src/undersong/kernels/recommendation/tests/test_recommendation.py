"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from recommendation import linear_cross_entropy, topk_items  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_best_items_are_those_of_all_scores():
    h, E = torch.randn(3, 20, device=DEVICE), torch.randn(150, 20, device=DEVICE)
    scores, rows = topk_items(h, E, 4, exclude=torch.full((3, 1), 7, device=DEVICE))
    want = (h @ E.T).index_fill_(1, torch.tensor([7], device=DEVICE), -torch.inf).topk(4)
    torch.testing.assert_close(scores, want.values, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, want.indices)


def test_loss_and_gradients_are_those_of_all_logits():
    h, E = (torch.randn(n, 20, device=DEVICE).requires_grad_() for n in (9, 150))
    labels = torch.arange(9, device=DEVICE)
    labels[2] = -100
    got = linear_cross_entropy(h, E, labels)
    want = torch.nn.functional.cross_entropy(h @ E.T, labels, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for x, y in zip(torch.autograd.grad(got.sum(), (h, E)), torch.autograd.grad(want.sum(), (h, E)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
