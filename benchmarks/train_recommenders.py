"""Trains the published recommenders of films by the benchmark's recipe; writes their Hub repos, cards included.

python benchmarks/train_recommenders.py --device cuda            # writes hub_configs/{bert4rec,gsasrec}-movielens-100k
python benchmarks/train_recommenders.py --fast --output FOLDER   # generated data, a few steps
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import harness
import torch
from bench_movielens import FIGURE, MODELS, TRAINING, both_ways, circles

from undersong.data.movielens import movielens_100k
from undersong.hub.cards import model_card
from undersong.training.recommenders import train_recommender

FOLDER = Path(__file__).parents[1] / "hub_configs"
KINDS = ("bert4rec", "gsasrec")
SHOWN = ("hr@10", "ndcg@10", "mrr")
TERMS = (
    "MovieLens-100k (Harper and Konstan, ACM TiiS 5, 2015; [GroupLens](https://grouplens.org/datasets/movielens/100k/))"
    ": 943 users, 1682 films, 100,000 ratings between 1997 and 1998, every rating an interaction. GroupLens' terms: "
    "the data may not be redistributed, nor used for commercial or revenue-bearing purposes, without permission; no "
    "endorsement by the University of Minnesota or GroupLens may be stated or implied; publications acknowledge the "
    "data. Ids are those of the data set; titles are not in this repository. "
)
LIMITS = (
    "It ranks 1682 films of the years up to 1998 for people like the raters of that site, who rated many films in "
    "one sitting: what comes next is partly the order in which the site showed films. Figures are of full ranking and "
    "must not be compared with those of sampled negatives. It is a demonstration, not a service."
)


def card(name, model, trained, figures, hardware, command):
    number = {
        "task_type": "sequential-recommendation", "dataset_type": "movielens-100k",
        "dataset_name": "MovieLens-100k, leave-one-out", "dataset_split": "test",
    }  # fmt: skip
    results = [
        number | {"metric_type": key, "metric_value": round(value, 4)}
        for key, value in figures.items()
        if key.partition("/")[0] in SHOWN
    ]
    return model_card(
        model,
        repo_id=f"undersong/{name}",
        results={"hardware": hardware, "command": command, "results": results},
        training_data=TERMS
        + f"The last item of a user is the test, the one before chose the weights (epoch {trained.best_epoch:g}).",
        limitations=LIMITS,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="generated data, a few steps; needs --output")
    parser.add_argument("--output", type=Path, default=None, help="folder of the repos; by default hub_configs")
    options = parser.parse_args()
    if options.fast and options.output is None:
        parser.error("--fast needs --output: it must not replace what is published")
    data = circles() if options.fast else movielens_100k()
    split = data.leave_one_out()
    training = TRAINING | ({"max_epochs": 2, "epochs_per_evaluation": 1} if options.fast else {})
    facts = harness.run_record("recommenders", options.device)
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("python", "torch", "transformers"))
    hardware = f"{facts['hardware']['device']} ({versions})"
    for key in KINDS:
        kind, config, extra = MODELS[key]
        device = "cpu" if options.device == "cpu" else None
        trained = train_recommender(split, data.vocab, kind, config=config, device=device, **training | extra)
        model, name = trained.model.cpu(), f"{key}-movielens-100k"
        figures = both_ways(model, split.test)
        folder = (options.output or FOLDER) / name
        model.save_pretrained(folder)
        text = card(name, model, trained, figures, hardware, f"python benchmarks/{Path(sys.argv[0]).name}")
        (folder / "README.md").write_text(str(text), encoding="utf-8")
        size = (folder / "model.safetensors").stat().st_size / 2**20
        print(f"{name}: {FIGURE} {figures[FIGURE]:.4f}, {size:.1f} MB, {trained.seconds:.0f} s")


if __name__ == "__main__":
    main()
