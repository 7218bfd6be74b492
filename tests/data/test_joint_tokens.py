"""Samples follow the distributions that the entropies are of; orders only permute."""

import math

import pytest
import torch

from undersong.data.joint_tokens import (
    BOS,
    EOS,
    FIRST_TOKEN,
    SCRAMBLED,
    JointTokenDataset,
    MarkovSentences,
    Star,
)


def drawn(source, count=40_000):
    return source.sample(count, torch.Generator().manual_seed(0))


def test_markov_entropy_is_that_of_all_sentences():
    source = MarkovSentences(words=3, length=3, concentration=0.5)
    p = (source.table[:, :, None] * source.table[None] / 3).flatten()  # p(a) p(b | a) p(c | b)
    assert source.entropy == pytest.approx(torch.special.entr(p).sum().item())


def test_markov_samples_follow_the_table():
    source = MarkovSentences(words=4, length=3, concentration=0.5, seed=2)
    words = drawn(source) - FIRST_TOKEN
    pairs = torch.zeros(4, 4).index_put_((words[:, 1], words[:, 2]), torch.ones(()), accumulate=True)
    torch.testing.assert_close((pairs / pairs.sum(1, keepdim=True)).double(), source.table, atol=0.02, rtol=0)
    assert torch.allclose(words[:, 0].bincount(minlength=4) / len(words), torch.tensor(0.25), atol=0.02)
    assert source.vocab_size == FIRST_TOKEN + 4


def test_star_samples_and_entropy():
    source = Star(leaves=4, flip=0.2)
    values = drawn(source) - FIRST_TOKEN - 2 * torch.arange(5)
    assert set(values.unique().tolist()) == {0, 1}
    differs = (values[:, 1:] != values[:, :1]).float()
    assert torch.allclose(differs.mean(0), torch.tensor(0.2), atol=0.01)
    assert torch.allclose(differs.T.cov().fill_diagonal_(0), torch.tensor(0.0), atol=0.01)
    assert source.entropy == pytest.approx(math.log(2) - 4 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8)))
    assert source.vocab_size == FIRST_TOKEN + 10


def test_rows_stand_between_their_ends_and_orders_permute_them():
    source = MarkovSentences()
    natural, scrambled = (JointTokenDataset(source, 30, seed=1, order=order) for order in (None, SCRAMBLED))
    for a, b in zip(natural, scrambled, strict=True):
        assert a["input_ids"][[0, -1]].tolist() == [BOS, EOS]
        assert a["labels"][0] == -100
        assert torch.equal(a["labels"][1:], a["input_ids"][1:])
        assert torch.equal(b["input_ids"][1:-1], a["input_ids"][1:-1][list(SCRAMBLED)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MarkovSentences(words=1), r"words \(1\) must be at least 2 and length \(5\)"),
        (lambda: MarkovSentences(concentration=0), r"concentration \(0\) must be positive"),
        (lambda: Star(0), r"leaves \(0\) must be at least 1"),
        (lambda: Star(flip=1.0), r"flip \(1.0\) must lie between 0 and 1"),
        (lambda: JointTokenDataset(Star(), 0), r"size \(0\) must be at least 1"),
        (
            lambda: JointTokenDataset(Star(2), 3, order=(0, 1)),
            r"order \(\[0, 1\]\) must be a permutation of 0 to 2 because a row has 3",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
