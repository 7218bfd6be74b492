"""The training recipe, the baseline, the sampled protocol, and the run behind `undersong recommend`."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from undersong.cli import app
from undersong.data.interactions import HeldOut, Interactions
from undersong.metrics.ranking.measures import ranking_scores
from undersong.modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recommend_run import recommend_run, render
from undersong.training.recommenders import (
    KINDS,
    build_recommender,
    popularity_ranks,
    sampled_ranks,
    train_recommender,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"hidden_size": 16, "max_position_embeddings": 8}
FIGURE = "ndcg@10/full/unseen"


def circles(users=40, items=25, length=8):
    """Everybody walks around a circle of items, so what comes next is known."""
    events = [(f"u{user}", f"i{(3 * user + step) % items:02}") for user in range(users) for step in range(length)]
    titles = {f"i{n:02}": {"title": f"Film <{n}>"} for n in range(items)}
    return Interactions.from_events(*zip(*events, strict=True), catalogue=titles)


@pytest.fixture(scope="module")
def data():
    return circles()


def test_a_training_ends_with_the_weights_that_were_best_on_validation(data):
    split = data.leave_one_out()
    trained = train_recommender(
        split, data.vocab, "sasrec", config=SMALL, max_epochs=40, epochs_per_evaluation=4, patience=3, batch_size=20,
        learning_rate=1e-2, device="cpu",
    )  # fmt: skip
    values = {row["epoch"]: row[FIGURE] for row in trained.curve}
    assert trained.best_epoch == max(values, key=values.get)
    ranks = full_ranks(trained.model, split.valid.histories, split.valid.targets)
    assert ranking_scores(ranks)[FIGURE] == pytest.approx(max(values.values()))
    test = split.test
    found = ranking_scores(full_ranks(trained.model, test.histories, test.targets))[FIGURE]
    assert found > 1.5 * ranking_scores(popularity_ranks(split.train, test, data.num_items))[FIGURE]
    epochs = list(values)
    assert trained.converged == (epochs.index(trained.best_epoch) == len(epochs) - 4)
    assert not trained.model.training
    assert trained.model.item_vocab == data.vocab


def test_the_same_seed_gives_the_same_model(data):
    def weights(seed):
        trained = train_recommender(
            data.leave_one_out(), data.vocab, config=SMALL, max_epochs=1, epochs_per_evaluation=1, seed=seed,
            device="cpu",
        )  # fmt: skip
        assert not trained.converged
        return trained.model.state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_ranks_are_ranks_among_the_sampled(data, kind):
    torch.manual_seed(0)
    model = build_recommender(kind, data.vocab, **SMALL)
    held = HeldOut([0, 1], [[1, 2], [3]], [4, 5])
    everything = np.array([[row for row in range(1, 26) if row != target] for target in held.targets])
    whole = full_ranks(model, held.histories, held.targets, filter_seen=False)
    assert torch.equal(sampled_ranks(model, held, everything), whole)
    few = sampled_ranks(model, held, everything[:, :5])
    assert few.le(whole).all()
    assert few.le(6).all()


def test_popularity_by_hand():
    train = [[1, 1, 1, 2, 2, 3, 4]]
    held = HeldOut([0, 1, 2], [[1], [], [2]], [2, 3, 1])
    assert popularity_ranks(train, held, 5).tolist() == [1.0, 4.0, 1.0]  # 3 and 4 tie: the worse rank
    assert popularity_ranks(train, held, 5, filter_seen=False).tolist() == [2.0, 4.0, 1.0]


def test_what_cannot_be_trained_is_refused(data):
    with pytest.raises(ValueError, match=r"kind \('als'\) must be one of bert4rec, gsasrec, sasrec"):
        build_recommender("als", data.vocab)
    short = Interactions.from_events(["u", "u"], ["a", "b"])
    with pytest.raises(ValueError, match="split holds no user with an item to validate on"):
        train_recommender(short.leave_one_out(), short.vocab)


def test_a_run_saves_a_model_and_a_report(data, tmp_path):
    report = recommend_run(
        data, tmp_path, "bert4rec", k=3, examples=2, console=Console(quiet=True), config=SMALL, max_epochs=4,
        epochs_per_evaluation=2, device="cpu",
    )  # fmt: skip
    model = BertForSequentialRecommendation.from_pretrained(tmp_path)
    test = data.leave_one_out().test
    again = ranking_scores(full_ranks(model, test.histories, test.targets))
    assert again == pytest.approx(report["test"]["bert4rec"])
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (tmp_path / "report.html").read_text()
    assert page == render(report)
    assert page.count("<polyline") == 2
    for row in report["examples"]:
        assert len(row["recommended"]) == 3
        assert not set(row["recommended"]) & set(row["history"])
        assert all(name.startswith("Film <") for name in row["recommended"])
        assert row["next"].replace("<", "&lt;").replace(">", "&gt;") in page
    assert "<script" not in page


def test_the_command_line_from_a_table_to_a_model(data, tmp_path):
    lines = ["who,what", *(f"{u},{i}" for u, h in zip(data.user_ids, data.histories, strict=True)
                           for i in data.vocab.decode(h))]  # fmt: skip
    (tmp_path / "x.csv").write_text("\n".join(lines))
    arguments = [str(tmp_path / "x.csv"), "--user", "who", "--item", "what", "--output", str(tmp_path / "out")]
    sizes = ["--model", "gsasrec", "--epochs", "2", "--hidden-size", "16", "--max-length", "8", "--device", "cpu"]
    result = CliRunner().invoke(app, ["recommend", *arguments, *sizes, "--min-count", "2"])
    assert result.exit_code == 0, result.output
    assert "320 interactions of 40 users with 25 items" in result.output
    assert "ndcg@10/full/unseen" in result.output
    assert (tmp_path / "out" / "item_vocab.json").exists()
    again = CliRunner().invoke(app, ["recommend", *arguments, *sizes])
    assert again.exit_code == 1
    assert "must be a new or empty folder; name another, or move what is there" in " ".join(again.output.split())
    refused = CliRunner().invoke(app, ["recommend", *arguments, "--time", "when"])
    assert refused.exit_code == 1
    assert "x.csv has no column for time (when) among who, what" in refused.output
