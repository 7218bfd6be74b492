"""Runs against the source folder; on a machine without a GPU set TRITON_INTERPRET=1."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "torch-ext"))

from vocabulary_mask import fused_typical_sample, problem, top_p_mask, typical_mask  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def smallest_set(d, p, mass):
    order = d.argsort(-1)
    last = (p.gather(1, order).cumsum(-1) < mass).sum(-1, keepdim=True)
    return d <= d.gather(1, order.gather(1, last))


def test_masks_keep_the_smallest_set_that_holds_the_mass():
    logits = torch.randn(2, 1500, device=DEVICE) * 2
    assert problem(logits) is None
    p = logits.double().softmax(-1)
    entropy = torch.special.entr(p).sum(-1, keepdim=True)
    assert torch.equal(typical_mask(logits, 0.6) > -torch.inf, smallest_set((entropy + p.log()).abs(), p, 0.6))
    assert torch.equal(top_p_mask(logits, 0.6) > -torch.inf, smallest_set(-p, p, 0.6))


def test_samples_come_from_the_typical_set():
    logits = torch.randn(5, 300, device=DEVICE) * 2
    kept = typical_mask(logits / 0.7, 0.5) > -torch.inf
    tokens = fused_typical_sample(logits, 0.5, temperature=0.7)
    assert kept.gather(1, tokens[:, None]).all()
