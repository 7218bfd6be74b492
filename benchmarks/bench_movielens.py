"""MovieLens-100k by full ranking: popularity, BERT4Rec, SASRec and gSASRec over three seeds, and RecBole's own scores.

    python benchmarks/bench_movielens.py --device cuda
    python benchmarks/bench_movielens.py --device cpu --jobs bert4rec   # some of the models
    python benchmarks/bench_movielens.py --fast                         # generated data, seconds, no record
    python benchmarks/bench_movielens.py --write-recbole FOLDER         # the data for recbole_scores.py
    python benchmarks/bench_movielens.py --device cuda --recbole a.npz b.npz

Leave-one-out; a model is chosen by NDCG@10 on the validation items, the test is looked at once. Test figures are given
with the items of the history left out ("unseen") and competing ("all"). SASRec is the gSASRec model with one negative
and t = 0. Calibration: the expected calibration error of sigmoid(score) over all items of the test users, and how far
the sum of the probabilities is from the one item that is right.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings
from pathlib import Path

import harness
import numpy as np
import torch

from undersong.data.interactions import Interactions
from undersong.data.movielens import movielens_100k
from undersong.metrics.ranking.measures import rank_of, ranking_scores
from undersong.tokenization.item_vocab import left_pad
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recommenders import popularity_ranks, train_recommender

SEEDS = (0, 1, 2)
FIGURE = "ndcg@10/full/unseen"
SIZES = {"hidden_size": 64, "max_position_embeddings": 100, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "bert4rec": ("bert4rec", SIZES, {"cloze": {"mask_prob": 0.2, "last_item_prob": 0.2}}),
    "sasrec": ("sasrec", SIZES | {"tie_word_embeddings": True}, {}),
    "gsasrec": ("gsasrec", SIZES | {"tie_word_embeddings": True}, {}),
}
TRAINING = {"max_epochs": 600, "epochs_per_evaluation": 5, "patience": 20, "batch_size": 64, "learning_rate": 1e-3}


def circles(users=60, items=40):
    """Generated users who each walk around a circle of items."""
    generator, events = random.Random(0), []
    for user in range(users):
        start = generator.randrange(items)
        events += [(user, (start + step) % items) for step in range(10)]
    return Interactions.from_events(*zip(*events, strict=True))


def both_ways(model, held):
    figures = {}
    for filter_seen in (True, False):
        ranks = full_ranks(model, held.histories, held.targets, filter_seen=filter_seen)
        figures |= ranking_scores(ranks, seen_filtered=filter_seen)
    return figures


def calibration(model, held, bins=20):
    """Expected calibration error of sigmoid(score), and the mean sum of a user's probabilities."""
    confidence, correct, sums = [], [], []
    with torch.no_grad():
        table, bias = model.item_table()
        for users in torch.arange(len(held)).split(256):
            ids = left_pad([held.histories[user] for user in users]).to(model.device)
            scores = model.encode_histories(ids).float() @ table.float().T
            p = (scores if bias is None else scores + bias).sigmoid().cpu().double()
            right = torch.zeros_like(p)
            right[torch.arange(len(users)), torch.tensor([held.targets[user] for user in users]) - 1] = 1
            confidence.append(p.flatten())
            correct.append(right.flatten())
            sums.append(p.sum(1))
    confidence, correct = torch.cat(confidence), torch.cat(correct)
    cell = (confidence * bins).long().clamp(max=bins - 1)
    count, mean, rate = (
        torch.zeros(bins, dtype=torch.float64).index_add_(0, cell, x)
        for x in (torch.ones_like(confidence), confidence, correct)
    )
    error = ((mean - rate).abs().sum() / count.sum()).item()
    return {"calibration_error": error, "sum_of_probabilities": torch.cat(sums).mean().item()}


def run(data, split, name, seed, device, training):
    kind, config, extra = MODELS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "histories are cut")  # what is ranked is read by its most recent items
        trained = train_recommender(
            split, data.vocab, kind, config=config, seed=seed, device=device, **training | extra
        )
        figures = both_ways(trained.model, split.test)
        figures |= calibration(trained.model, split.test)
    facts = {"best_epoch": trained.best_epoch, "epochs": trained.curve[-1]["epoch"], "converged": trained.converged}
    valid = max(row[FIGURE] for row in trained.curve)
    print(f"{name}, seed {seed}: test {FIGURE} {figures[FIGURE]:.4f}, validation {valid:.4f}, {facts}", flush=True)
    return figures | facts | {"seed": seed, "seconds": round(trained.seconds, 1), f"valid_{FIGURE}": valid}


def of_recbole(path, data, split):
    """Figures of a file of `recbole_scores.py` by our evaluator; the split is checked to be the same."""
    file = np.load(path)
    columns = data.vocab.encode(file["items"].tolist())
    scores = torch.full((len(file["users"]), data.num_items), -torch.inf)
    scores[:, torch.tensor(columns) - 1] = torch.from_numpy(file["scores"])
    held = {data.user_ids[user]: n for n, user in enumerate(split.test.users)}
    order = [held[user] for user in file["users"].tolist()]
    targets = torch.tensor([split.test.targets[n] for n in order])
    if data.vocab.encode(file["targets"].tolist()) != targets.tolist() or len(order) != len(held):
        raise ValueError(f"{Path(path).name} holds out other items than we do; write the data with --write-recbole.")
    seen = left_pad([split.test.histories[n] for n in order]) - 1
    figures = ranking_scores(rank_of(scores, targets - 1, seen))
    figures |= ranking_scores(rank_of(scores, targets - 1), seen_filtered=False)
    return figures | {name: file[name].item() for name in ("epochs", "stopped", "seed")}


def write_recbole(data, folder):
    """The interactions with a counter in place of the time."""
    path = Path(folder) / "ml-100k" / "ml-100k.inter"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, history in zip(data.user_ids, data.histories, strict=True):
        lines += [f"{user}\t{item}\t{time}" for time, item in enumerate(data.vocab.decode(history))]
    path.write_text("\n".join(lines) + "\n")
    print(f"{len(lines) - 1} interactions are in {path}")


def mean(runs, key):
    return statistics.mean(run[key] for run in runs)


def acceptance(record) -> dict:
    models, figures = record["models"], {}

    def goal(name, value, goal):
        figures[name] = {"value": value, "goal": goal}

    if "bert4rec" in models:
        ratio = mean(models["bert4rec"], FIGURE) / record["popularity"][FIGURE]
        goal("BERT4Rec's NDCG@10 as a multiple of popularity's", ratio, 1.5)
    if {"gsasrec", "sasrec"} <= models.keys():
        ours, plain = models["gsasrec"], models["sasrec"]
        goal("gSASRec's NDCG@10 as a multiple of SASRec's", mean(ours, FIGURE) / mean(plain, FIGURE), 1.15)
        error = mean(ours, "calibration_error") / mean(plain, "calibration_error")
        goal("gSASRec's calibration error as a share of SASRec's (at most)", error, 1.0)
    for peer, mine in (("BERT4Rec", "bert4rec"), ("SASRec", "gsasrec")):
        if peer in record["recbole"] and mine in models:
            values = [run[FIGURE] for run in models[mine]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            theirs = record["recbole"][peer][FIGURE]
            goal(f"{mine}'s NDCG@10 + 1 sd, beside RecBole's {peer}", statistics.mean(values) + spread, theirs)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="generated data, one seed, no record")
    parser.add_argument("--jobs", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument("--recbole", nargs="*", default=[], help="files of recbole_scores.py")
    parser.add_argument("--write-recbole", metavar="FOLDER", help="write the data for recbole_scores.py and stop")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    device = "cpu" if options.device == "cpu" else None
    data = circles() if options.fast else movielens_100k()
    if options.write_recbole:
        return write_recbole(data, options.write_recbole)
    split = data.leave_one_out()
    training = TRAINING | ({"max_epochs": 4, "epochs_per_evaluation": 2} if options.fast else {})
    record = harness.run_record("movielens-100k", options.device) | {"training": training, "settings": MODELS}
    record["popularity"] = {}
    for filter_seen in (True, False):
        ranks = popularity_ranks(split.train, split.test, data.num_items, filter_seen=filter_seen)
        record["popularity"] |= ranking_scores(ranks, seen_filtered=filter_seen)
    print(f"popularity: test {FIGURE} {record['popularity'][FIGURE]:.4f}", flush=True)
    record["recbole"] = {np.load(path)["model"].item(): of_recbole(path, data, split) for path in options.recbole}
    seeds = SEEDS[:1] if options.fast else SEEDS
    record["models"] = {
        name: [run(data, split, name, seed, device, training) for seed in seeds] for name in options.jobs
    }
    record["acceptance"] = acceptance(record)
    for name, row in record["acceptance"].items():
        print(f"{name}: {row['value']:.4f} (goal {row['goal']:.4f})")
    if not options.fast:
        kind = options.device.partition(":")[0]
        harness.write_json(options.out or f"benchmarks/results/movielens_{kind}.json", record)
    return None


if __name__ == "__main__":
    main()
