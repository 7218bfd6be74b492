"""Losses of recommenders against their definitions, in float64."""

import pytest
import torch
from torch.nn import functional as F

from undersong.modeling import recommendation_losses
from undersong.modeling.bert4rec.configuration_bert4rec import SequentialRecConfig
from undersong.modeling.recommendation_losses import (
    draw_negatives,
    gbce,
    negative_scores,
    positive_scores,
    recommendation_loss,
    sampled_softmax,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def case(positions=6, items=40, width=5, negatives=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h, table = (torch.randn(n, width, dtype=dtype, generator=generator) for n in (positions, items))
    bias = torch.randn(items, dtype=dtype, generator=generator)
    rows = torch.randint(items, (positions,), generator=generator)
    drawn = torch.randint(items, (positions, negatives), generator=generator)
    return h, table, bias, rows, drawn


@pytest.mark.parametrize("t", [0.0, 0.5, 0.75, 1.0])
def test_gbce_is_bce_of_the_transformed_logits(t):
    """The definition: the positive has probability sigmoid(s)^beta, whose logit is -log(sigmoid(s)^-beta - 1)."""
    h, table, bias, rows, drawn = case()
    positive, negative = positive_scores(h, table, rows, bias), negative_scores(h, table, drawn, bias)
    alpha = drawn.shape[1] / (len(table) - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    transformed = -torch.log(torch.sigmoid(positive) ** -beta - 1)
    logits = torch.cat([transformed[:, None], negative], 1)
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    want = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    got = gbce(positive, negative, len(table), t)
    assert (got - want).abs().max() < 1e-9


def test_gbce_keeps_its_gradient_where_the_transform_saturates():
    positive = torch.tensor([60.0, -60.0], requires_grad=True)
    gbce(positive, torch.zeros(2, 4), 1000, 0.75).sum().backward()
    assert torch.isfinite(positive.grad).all()
    assert positive.grad[1] < -0.01


def test_more_negatives_than_items_count_as_all_of_them():
    positive, negative = torch.tensor([1.0]), torch.zeros(1, 9)
    assert torch.equal(gbce(positive, negative, 4, 0.5), gbce(positive, negative, 4, 0.0))


@pytest.mark.parametrize("items", [40, 200], ids=["scores of all items", "gathered rows"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_negative_scores_have_the_right_values_and_gradients(items, with_bias, monkeypatch):
    monkeypatch.setattr(recommendation_losses, "_AT_ONCE_CPU", 90)  # several chunks, the last one smaller
    h, table, bias, _, drawn = case(positions=7, items=items)
    bias = bias if with_bias else None
    inputs = [x.requires_grad_() for x in (h, table, bias) if x is not None]
    want = (h @ table.T + (0 if bias is None else bias)).gather(1, drawn)
    got = negative_scores(h, table, drawn, bias)
    assert (got - want).abs().max() < 1e-12
    upstream = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-12
    function = (
        (lambda *x: negative_scores(x[0], x[1], drawn, x[2]))
        if with_bias
        else (lambda *x: negative_scores(x[0], x[1], drawn))
    )
    assert torch.autograd.gradcheck(function, inputs)


def test_gradcheck_of_gbce():
    h, table, bias, rows, drawn = case(positions=3, items=8)

    def loss(h, table, bias):
        return gbce(positive_scores(h, table, rows, bias), negative_scores(h, table, drawn, bias), len(table), 0.75)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in (h, table, bias)])


def test_half_precision_scores_are_summed_in_float32():
    h, table, bias, rows, drawn = case(dtype=torch.float32)
    want = negative_scores(h, table, drawn, bias)
    got = negative_scores(h.bfloat16(), table, drawn, bias)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1 * want.abs().max()
    assert positive_scores(h.bfloat16(), table.bfloat16(), rows).dtype == torch.float32


def test_sampled_softmax_of_every_item_is_the_softmax():
    h, table, bias, rows, _ = case(positions=4, items=9)
    others = torch.arange(9).expand(4, 9)  # the item itself among them: it counts once
    scores = h @ table.T + bias
    got = sampled_softmax(scores.gather(1, rows[:, None])[:, 0], scores, rows, others)
    assert (got - F.cross_entropy(scores, rows, reduction="none")).abs().max() < 1e-12


def test_log_q_corrects_for_how_negatives_are_drawn():
    """With s(i) - log q(i), sums over draws estimate sums over items: popular and rare items count alike."""
    items, draws = 8, 40_000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(items, dtype=torch.float64, generator=generator)
    q = torch.softmax(2 * torch.randn(items, dtype=torch.float64, generator=generator), 0)
    drawn = torch.multinomial(q, draws, replacement=True, generator=generator)
    estimate = (scores - q.log())[drawn].logsumexp(0) - torch.tensor(float(draws)).log()
    assert abs(estimate - scores.logsumexp(0)) < 0.05
    rows = torch.tensor([0])
    loss = sampled_softmax(scores[:1], scores[drawn][None], rows, drawn[None], q.log())
    others = torch.arange(items) != 0
    rest = (scores[others].exp().sum() * draws).log()
    want = torch.logaddexp(scores[0] - q[0].log(), rest) - (scores[0] - q[0].log())
    assert abs(loss - want) < 0.05


def test_popular_negatives_are_drawn_in_proportion():
    torch.manual_seed(0)
    drawn = draw_negatives((1000, 20), 4, "cpu", torch.tensor([1.0, 3.0, 0.0, 6.0]))
    shares = drawn.flatten().bincount(minlength=4) / drawn.numel()
    assert (shares - torch.tensor([0.1, 0.3, 0.0, 0.6])).abs().max() < 0.02


@pytest.mark.parametrize("loss_type", ["ce", "sampled_softmax", "bce", "gbce"])
def test_loss_is_the_mean_over_positions_or_the_sum_over_what_trainer_counts(loss_type):
    config = SequentialRecConfig(num_items=40, loss_type=loss_type, num_negatives=5)
    h, table, bias, rows, _ = case()
    losses = []
    for counted in (None, 12, torch.tensor(12)):
        torch.manual_seed(0)
        losses.append(recommendation_loss(h, rows, table, bias, config, num_items_in_batch=counted))
    assert torch.allclose(losses[1], losses[0] * 6 / 12)
    assert torch.equal(losses[2], losses[1])
    nothing = recommendation_loss(h[:0], rows[:0], table.requires_grad_(), bias, config)
    nothing.backward()
    assert nothing == 0
    assert table.grad.eq(0).all()


def test_cross_entropy_is_that_of_all_items():
    h, table, bias, rows, _ = case()
    config = SequentialRecConfig(num_items=40, label_smoothing=0.1)
    want = F.cross_entropy(h @ table.T + bias, rows, label_smoothing=0.1)
    assert (recommendation_loss(h, rows, table, bias, config) - want).abs() < 1e-12
