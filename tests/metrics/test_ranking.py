"""Ranks and their means by hand, the protocol in every name, and the `evaluate` module."""

import math
from pathlib import Path

import pytest
import torch

from tests.metrics.evaluate_module import compute
from undersong.metrics.ranking import measures
from undersong.metrics.ranking.measures import rank_of, ranking_scores

SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.5, 0.2]])


@pytest.mark.parametrize(
    ("target", "exclude", "ties", "rank"),
    [
        (1, None, "pessimistic", 1.0),
        (2, None, "pessimistic", 3.0),
        (2, None, "mean", 2.5),
        (2, [1], "pessimistic", 2.0),
        (2, [1, 3], "pessimistic", 1.0),
        (2, [1, -1, -1, 1], "mean", 1.5),
        (0, None, "pessimistic", 5.0),
        (0, [0], "pessimistic", 5.0),
    ],
)
def test_five_items_by_hand(target, exclude, ties, rank):
    exclude = None if exclude is None else torch.tensor([exclude])
    assert rank_of(SCORES, torch.tensor([target]), exclude, ties).tolist() == [rank]


def test_an_untrained_model_is_last_not_first():
    """Equal scores everywhere: the pessimistic rank is the worst one, the mean one that of chance."""
    scores = torch.zeros(1, 101)
    assert rank_of(scores, torch.tensor([0])).item() == 101
    assert rank_of(scores, torch.tensor([0]), ties="mean").item() == 51


def test_nan_never_helps():
    scores = torch.tensor([[0.5, torch.nan, 0.1], [torch.nan, 0.3, 0.1]])
    assert rank_of(scores, torch.tensor([0, 0])).tolist() == [2.0, 3.0]


def test_rows_are_independent():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 30, generator=generator)
    targets, seen = torch.randint(30, (6,), generator=generator), torch.randint(-1, 30, (6, 5), generator=generator)
    together = rank_of(scores, targets, seen)
    for row in range(6):
        one = slice(row, row + 1)
        others = [i for i in range(30) if i != targets[row] and i not in seen[row].tolist()]
        want = 1 + sum(scores[row, i] >= scores[row, targets[row]] for i in others)
        assert together[row] == want == rank_of(scores[one], targets[one], seen[one])[0]


def test_means_by_hand():
    scores = ranking_scores([1, 2, 7, 100], ks=(1, 5, 10))
    gains = [1.0, 1 / math.log2(3), 1 / 3]
    assert scores == pytest.approx(
        {
            "hr@1/full/unseen": 1 / 4,
            "hr@5/full/unseen": 2 / 4,
            "hr@10/full/unseen": 3 / 4,
            "ndcg@1/full/unseen": 1 / 4,
            "ndcg@5/full/unseen": sum(gains[:2]) / 4,
            "ndcg@10/full/unseen": sum(gains) / 4,
            "mrr/full/unseen": (1 + 1 / 2 + 1 / 7 + 1 / 100) / 4,
        }
    )
    assert ranking_scores([1], ks=(3,))["ndcg@3/full/unseen"] == 1.0


@pytest.mark.parametrize("protocol", measures.PROTOCOLS)
@pytest.mark.parametrize("seen_filtered", [True, False])
def test_every_name_says_the_protocol(protocol, seen_filtered):
    names = ranking_scores([1], protocol=protocol, seen_filtered=seen_filtered)
    assert {name.partition("/")[2] for name in names} == {f"{protocol}/{'unseen' if seen_filtered else 'all'}"}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([],), {}, "ranks must hold at least one rank"),
        (([2, 0],), {}, "ranks must be at least 1, but one is 0"),
        (([math.nan],), {}, "ranks must be at least 1, but one is nan"),
        (([1],), {"ks": ()}, r"ks \(\(\)\) must be lengths of at least 1"),
        (([1],), {"ks": (0, 5)}, r"ks \(\(0, 5\)\) must be lengths of at least 1"),
        (([1],), {"protocol": "sampled"}, r"protocol \('sampled'\) must be one of full, pop100, uniform100"),
    ],
)
def test_what_cannot_be_averaged_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ranking_scores(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((SCORES[0], torch.tensor([0])), {}, r"scores \(torch.float32 \[5\]\) must be a float \[batch, N\]"),
        ((SCORES, torch.tensor([0, 1])), {}, r"target \(torch.int64 \[2\]\) must be an int64 \[batch\] with"),
        ((SCORES, torch.tensor([5])), {}, r"target \(5\) must be a column of scores, 0 to 4"),
        ((SCORES, torch.tensor([0]), torch.tensor([1])), {}, r"exclude \(torch.int64 \[1\]\) must be an int64"),
        ((SCORES, torch.tensor([0])), {"ties": "first"}, r"ties \('first'\) must be 'pessimistic' or 'mean'"),
    ],
)
def test_what_cannot_be_ranked_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rank_of(*arguments, **options)


@pytest.mark.slow  # a fresh process that imports evaluate
def test_the_evaluate_module_gives_the_same_and_stands_alone(tmp_path):
    calls = [
        {"predictions": [1, 2, 7, 100], "protocol": "pop100"},
        {"predictions": SCORES.tolist() * 2, "targets": [2, 0], "exclude": [[1], []], "ties": "mean", "ks": [2]},
    ]
    got = compute(Path(measures.__file__).parent, calls, tmp_path)
    assert got == [ranking_scores([1, 2, 7, 100], protocol="pop100"), ranking_scores([1.5, 5], ks=(2,))]
