"""Amazon Beauty: BERT4Rec by the paper's protocol, 100 negatives sampled by popularity, and by full ranking beside it.

    python benchmarks/bench_beauty.py --data beauty.txt --device cuda
    python benchmarks/bench_beauty.py --fast          # generated data, seconds, no record

`beauty.txt` is the preprocessed set of the BERT4Rec paper (FeiSun/BERT4Rec, `data/beauty.txt`), a `user item` pair a
line. Leave-one-out; the model is chosen by full-ranking NDCG@10 on the validation items. Negatives are drawn without
replacement in proportion to how often an item occurs in the training part, the user's history excluded, seed 0.
The paper (arXiv 1904.06690, table 2) gives HR@10 0.3025 and NDCG@10 0.1862.
"""

from __future__ import annotations

import argparse
import time
import warnings

import harness
import torch
from bench_movielens import circles

from undersong.data.interactions import Interactions, count_items, sample_negatives
from undersong.metrics.ranking.measures import ranking_scores
from undersong.training.full_rank_eval import full_ranks
from undersong.training.recommenders import popularity_ranks, sampled_ranks, train_recommender

PAPER = {"hr@10/pop100/unseen": 0.3025, "ndcg@10/pop100/unseen": 0.1862}
GOALS = {"hr@10/pop100/unseen": 0.30, "ndcg@10/pop100/unseen": 0.186}
SHARE, MINUTES = 0.95, 20
CONFIG = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 50}
CLOZE = {"mask_prob": 0.6, "max_predictions": 30, "last_item_prob": 0.1}
TRAINING = {"max_epochs": 250, "epochs_per_evaluation": 5, "patience": 6, "batch_size": 256, "learning_rate": 1e-3}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="path of beauty.txt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="generated data, no record")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    if not (options.data or options.fast):
        parser.error("--data is needed: the path of beauty.txt")
    begin = time.perf_counter()
    data = circles() if options.fast else Interactions.read(options.data)
    split = data.leave_one_out()
    print(f"{len(data):,} interactions, {len(data.user_ids):,} users, {data.num_items:,} items", flush=True)
    training = TRAINING | ({"max_epochs": 4, "epochs_per_evaluation": 2} if options.fast else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "histories are cut")
        trained = train_recommender(
            split, data.vocab, "bert4rec", config=CONFIG, cloze=CLOZE, seed=options.seed,
            device="cpu" if options.device == "cpu" else None, workers=0 if options.fast else options.workers,
            **training,
        )  # fmt: skip
        held, count = split.test, 20 if options.fast else 100
        negatives = sample_negatives(held, count_items(split.train, data.num_items), count)
        figures = ranking_scores(sampled_ranks(trained.model, held, negatives), protocol="pop100")
        figures |= ranking_scores(full_ranks(trained.model, held.histories, held.targets))
    popularity = ranking_scores(popularity_ranks(split.train, held, data.num_items))
    minutes = (time.perf_counter() - begin) / 60
    for name, value in figures.items():
        print(f"{name}: {value:.4f}" + (f" (paper {PAPER[name]})" if name in PAPER else ""))
    print(f"best epoch {trained.best_epoch:g}, converged {trained.converged}, {minutes:.1f} minutes")
    if options.fast:
        return
    record = harness.run_record("beauty", options.device)
    record |= {
        "settings": {"config": CONFIG, "cloze": CLOZE, "training": training, "seed": options.seed},
        "test": figures, "popularity": popularity, "paper": PAPER, "curve": trained.curve,
        "best_epoch": trained.best_epoch, "converged": trained.converged,
        "acceptance": {
            f"{name}, as a share of the paper's": {"value": figures[name] / goal, "goal": SHARE}
            for name, goal in GOALS.items()
        } | {"minutes (at most)": {"value": minutes, "goal": MINUTES}},
    }  # fmt: skip
    kind = options.device.partition(":")[0]
    harness.write_json(options.out or f"benchmarks/results/beauty_{kind}.json", record)


if __name__ == "__main__":
    main()
