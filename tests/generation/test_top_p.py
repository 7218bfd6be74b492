"""The sort-free top-p warper keeps what the stock warper keeps, with tied tokens together."""

import pytest
import torch
from transformers import TopPLogitsWarper as StockTopPLogitsWarper

from undersong.generation import TopPLogitsWarper

from .tiny_llama import left_padded, tiny_llama

INF = float("inf")


def make_scores(scale, rows=6, vocab=1003, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def at_boundary(scores, top_p):
    """Rows whose running sum, from the best token on, passes within 1e-6 of `top_p`."""
    held = scores.double().softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    return ((held - top_p).abs() < 1e-6).any(-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("min_tokens", [1, 5])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.95, 0.99])
def test_keeps_what_stock_keeps(top_p, min_tokens, scale):
    scores = make_scores(scale)
    got = TopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens)(None, scores)
    want = StockTopPLogitsWarper(top_p, min_tokens_to_keep=min_tokens)(None, scores)
    boundary = at_boundary(scores, top_p)
    assert torch.equal(got[~boundary], want[~boundary])
    assert boundary.sum() <= 1, "nearly every row must be compared"


def test_tied_tokens_stay_together():
    scores = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    assert (TopPLogitsWarper(0.5)(None, scores) > -INF).all()
    assert (TopPLogitsWarper(0.3)(None, scores) > -INF).tolist() == [[True, False, False, False]]
    stock = StockTopPLogitsWarper(0.5)(None, scores) > -INF
    assert stock.sum() == 2, "stock cuts through them"


def test_masked_tokens_stay_masked_and_one_keeps_everything():
    scores = torch.tensor([[0.0, -INF, -0.1, -7.0]])
    assert TopPLogitsWarper(0.5, filter_value=-1e4)(None, scores).tolist() == [[0.0, -INF, -1e4, -1e4]]
    assert TopPLogitsWarper(1.0)(None, scores) is scores


def test_per_row_values_equal_a_loop():
    scores = make_scores(2.0)
    got = TopPLogitsWarper([0.2, 0.9, 1.0])(None, scores)  # 6 rows: two per value
    want = [TopPLogitsWarper([0.2, 0.9, 1.0][row // 2])(None, scores[row : row + 1]) for row in range(6)]
    assert torch.equal(got, torch.cat(want))


def test_generate_writes_what_stock_writes():
    model, texts = tiny_llama(), []
    for processor in (TopPLogitsWarper(0.6), StockTopPLogitsWarper(0.6)):
        torch.manual_seed(0)
        texts.append(
            model.generate(
                **left_padded([[5, 6, 7], [11, 12]]), max_new_tokens=12, do_sample=True, top_k=0,
                logits_processor=[processor],
            )
        )  # fmt: skip
    assert torch.equal(*texts)


def test_continuous_batching_only_without_per_row_values():
    assert TopPLogitsWarper(0.5).supports_continuous_batching
    assert not TopPLogitsWarper([0.5]).supports_continuous_batching


def test_invalid_rows_raise_when_debugging(monkeypatch):
    scores = make_scores(2.0, rows=2)
    scores[1] = -INF
    assert torch.equal(TopPLogitsWarper(0.3)(None, scores)[1], scores[1])
    monkeypatch.setenv("UNDERSONG_DEBUG", "1")
    with pytest.raises(ValueError, match=r"scores\[1\] must hold a finite score"):
        TopPLogitsWarper(0.3)(None, scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), r"top_p \(-0.1\) must lie in \[0, 1\]"),
        (([0.5, 1.5],), r"top_p\[1\] \(1.5\) must lie in \[0, 1\]"),
        ((0.5, -INF, 0), r"min_tokens_to_keep \(0\) must be a positive integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopPLogitsWarper(*arguments)


def test_per_row_values_must_fit_the_batch():
    with pytest.raises(ValueError, match="top_p has 4 values but scores have 6 rows; pass one value per prompt"):
        TopPLogitsWarper([0.5] * 4)(None, make_scores(1.0))
