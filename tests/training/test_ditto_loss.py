"""DITTO's loss: the set M, values and gradients by hand, and nothing outside M."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undersong.training import DittoLoss
from undersong.training import ditto as ditto_module

VOCAB = 7


def case(prefix=2, unit=3, length=12, seed=0, dtype=torch.float64):
    """Logits of one row: `prefix` tokens, then copies of `unit` tokens up to `length`."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, VOCAB, (prefix + unit,), generator=generator)
    labels = torch.cat([words[:prefix], words[prefix:].repeat(length)])[:length]
    logits = 2 * torch.randn(1, length, VOCAB, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), labels[None], torch.tensor([prefix]), torch.tensor([unit])


def by_definition(logits, labels, prefix, unit, lambda_, kind):
    """Loops over t, in the paper's indices: P[t] is the probability of the token at t + 1."""
    total, count = 0.0, 0
    for row in range(len(labels)):
        p = [logits[row, t].softmax(-1)[labels[row, t + 1]] for t in range(labels.shape[1] - 1)]
        for t in range(int(prefix[row] + unit[row]), len(p) if unit[row] else 0):
            d = p[t] - lambda_ * p[t - int(unit[row])].detach()
            total = (
                total
                + {
                    "nl": lambda d=d: -torch.log(1 - d.abs()),
                    "nl_clip": lambda d=d: -torch.log(1 - d.clamp(min=0)),
                    "mse": lambda d=d: 3 * d**2,
                }[kind]()
            )
            count += 1
    return total / count


@pytest.mark.parametrize("kind", ["nl", "nl_clip", "mse"])
@pytest.mark.parametrize("lambda_", [0.0, 0.5, 0.95, 1.0])
def test_loss_and_gradient_are_the_definitions(kind, lambda_):
    parts = [case(2, 3, 14, seed=1), case(4, 1, 14, seed=2), case(1, 6, 14, seed=3), case(3, 4, 14, seed=4)]
    logits, labels, prefix, unit = (torch.cat(x) for x in zip(*parts, strict=True))
    unit[3] = 0  # a plain row
    logits = logits.detach().requires_grad_()
    loss = DittoLoss(lambda_, kind)(logits, labels, prefix, unit)
    want = by_definition(logits, labels, prefix, unit, lambda_, kind)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, want)))


def test_two_copies_by_hand():
    # row: prefix 0, then 1 2 | 1 2; probabilities of each token given by the rows of this table
    p = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.5, 0.4], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8], [1 / 3] * 3])
    logits = p.log()[None].requires_grad_()
    labels = torch.tensor([[0, 1, 2, 1, 2]])
    # M has one element: the second 2 (t = 3, probability 0.8); its counterpart is the first 2 (t = 1, probability 0.4)
    loss = DittoLoss(0.5)(logits, labels, torch.tensor([1]), torch.tensor([2]))
    assert loss.item() == pytest.approx(-math.log(1 - (0.8 - 0.5 * 0.4)))
    loss.backward()
    # d loss / d p = 1 / (1 - 0.6) = 2.5; d p / d logits = 0.8 * (onehot - p)
    want = torch.zeros(1, 5, 3)
    want[0, 3] = 2.5 * 0.8 * (torch.tensor([0.0, 0.0, 1.0]) - p[3])
    torch.testing.assert_close(logits.grad, want)


def test_probabilities_at_the_target_carry_neither_loss_nor_gradient():
    # a model that repeats with unchanged probabilities is where lambda = 1 wants it
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    logits = row.expand(1, 12, VOCAB).clone().requires_grad_()
    _, labels, prefix, unit = case()
    for kind in ("nl", "nl_clip", "mse"):
        loss = DittoLoss(1.0, kind)(logits, labels, prefix, unit)
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_gradient_flows_only_where_m_is():
    logits, labels, prefix, unit = case(prefix=2, unit=3, length=12)
    DittoLoss()(logits, labels, prefix, unit).backward()
    carrying = logits.grad.abs().sum(-1)[0].nonzero().flatten().tolist()
    # t = 0, 1 predict the prefix and the first token, 2, 3 the first copy, 4 the first token of the second copy, whose
    # counterpart had another context; the last position predicts nothing
    assert carrying == [5, 6, 7, 8, 9, 10]


@given(prefix=st.integers(1, 6), unit=st.integers(1, 8), length=st.integers(9, 40))
def test_m_counts_full_copies_but_the_first_and_the_rest(prefix, unit, length):
    logits, labels, prefix_len, unit_len = case(prefix, unit, length)
    copies, rest = divmod(length - 1 - prefix, unit)
    terms = DittoLoss().terms(logits, labels, prefix_len, unit_len)
    assert terms.count.item() == max(0, unit * (copies - 1) + rest if copies else 0)


def test_a_batch_without_units_has_loss_zero():
    logits, labels, prefix, unit = case()
    loss = DittoLoss()(logits, labels, prefix, torch.zeros_like(unit))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_terms_tell_probability_and_baseline():
    logits, labels, prefix, unit = case()
    terms = DittoLoss().terms(logits, labels, prefix, unit)
    p = logits.log_softmax(-1)[0, :-1].gather(1, labels[0, 1:, None]).exp().squeeze()
    torch.testing.assert_close(terms.probability, p[5:].sum())
    torch.testing.assert_close(terms.baseline, p[2:-3].sum())


def test_authors_mse_also_lowers_the_prefix():
    logits, labels, prefix, unit = case()
    p = logits.log_softmax(-1)[0, :-1].gather(1, labels[0, 1:, None]).exp().squeeze()
    want = 3 * (p[:5].square().sum() + (p[5:] - 0.5 * p[2:-3].detach()).square().sum()) / 6
    torch.testing.assert_close(DittoLoss(0.5, "mse", legacy_mse=True)(logits, labels, prefix, unit), want)


def test_half_precision_is_computed_in_single():
    logits, labels, prefix, unit = case(dtype=torch.bfloat16)
    loss = DittoLoss()(logits, labels, prefix, unit)
    assert loss.dtype == torch.float32
    wide = logits.detach().double().requires_grad_()
    want = DittoLoss()(wide, labels, prefix, unit)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    loss.backward()
    want.backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-2, atol=1e-6)  # bf16 keeps 8 bits


def test_chunks_change_nothing(monkeypatch):
    logits, labels, prefix, unit = case(length=40)
    whole = torch.autograd.grad(DittoLoss()(logits, labels, prefix, unit), logits)[0]
    monkeypatch.setattr(ditto_module, "_CHUNK_BYTES", 4 * VOCAB * 4)  # four positions
    torch.testing.assert_close(torch.autograd.grad(DittoLoss()(logits, labels, prefix, unit), logits)[0], whole)


def test_certain_repetitions_have_finite_gradients():
    # from impossible in the first copy to certain in the second: |d| = 1 in float32
    logits = torch.zeros(1, 9, VOCAB)
    labels = torch.tensor([[0, 1, 2, 1, 2, 1, 2, 1, 2]])
    logits[0, 1, 2], logits[0, 2, 1] = -200, -200
    for t in range(3, 8):
        logits[0, t, labels[0, t + 1]] = 200
    logits.requires_grad_()
    loss = DittoLoss()(logits, labels, torch.tensor([1]), torch.tensor([2]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_padding_in_pseudo_rows_is_refused():
    logits, labels, prefix, unit = case()
    labels[0, -1] = -100
    with pytest.raises(ValueError, match=r"labels must hold no padding in rows with a unit, but rows \[0\] do"):
        DittoLoss()(logits, labels, prefix, unit)
    DittoLoss()(logits, labels, prefix, torch.zeros_like(unit))  # plain rows may


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_": 1.5}, r"lambda_ \(1.5\) must lie in \[0, 1\]"),
        ({"lambda_": -0.1}, r"lambda_ \(-0.1\) must lie in \[0, 1\]"),
        ({"kind": "kl"}, r"kind \('kl'\) must be one of 'nl', 'nl_clip', 'mse'"),
        ({"eps": 0.0}, r"eps \(0.0\) must lie between 0 and 1"),
        ({"legacy_mse": True}, r"legacy_mse \(True\) needs kind='mse', but kind is 'nl'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DittoLoss(**arguments)
