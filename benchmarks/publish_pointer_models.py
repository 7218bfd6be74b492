"""Writes the Hub repos of the pointer networks that the benchmark trained, cards and figures included.

    python benchmarks/bench_pointer_networks.py --device cuda --models /tmp/models
    python benchmarks/publish_pointer_models.py /tmp/models                   # into hub_configs/

Published are the models of the first seed, which was settled beforehand; their figures are in the benchmark's record.
"""

import argparse
import json
from pathlib import Path

import bench_pointer_networks as bench

from undersong import PointerNetworkForConditionalGeneration
from undersong.hub.cards import model_card
from undersong.registry import ARCHITECTURES

HUB = Path(__file__).parents[1] / "hub_configs"
REPOS = {"hull": "pointer-hull", "tour": "pointer-tsp"}
KINDS = {"hull": "lstm", "tour": "transformer"}
SHOWN = {"hull": (5, 10, 20), "tour": (5, 10, 12)}  # sizes on the cards

TRAINING = {
    "hull": "Convex hulls of points uniform in the unit square (`undersong.data.geometry.ConvexHullDataset`)",
    "tour": "Shortest round trips through points uniform in the unit square, exact by Held and Karp's dynamic program"
    " (`undersong.data.geometry.TSPDataset`)",
}
LIMITATIONS = {
    "hull": "Points must lie in the unit square, in no particular order; scale others. Beyond 10 points accuracy falls"
    " quickly, the area covered slowly. Decoding may only write closed polygons (`generation_config.task`), which need"
    " not be convex.",
    "tour": "Cities must lie in the unit square, in no particular order; scale others. Tours are good, not proven"
    " shortest, and get worse beyond the 10 cities of training. Every output visits every city once, whatever the"
    " model thinks (`generation_config.task`).",
}
FIGURES = {  # way of decoding, key, what the card calls it
    "hull": (("rules", "accuracy", "exactly right"), ("rules", "area_coverage", "area covered")),
    "tour": (("rules", "gap", "length / shortest - 1, greedy"), ("beam 5", "gap", "length / shortest - 1, 5 beams")),
}


def card(facts, record):
    task, setting = facts["task"], record["setting"]
    number = {"task_type": "other", "task_name": f"{task} of points in the plane"}
    results = []
    for n in SHOWN[task]:
        for way, key, name in FIGURES[task]:
            figure = {
                "metric_type": key,
                "metric_name": name,
                "metric_value": round(facts["test"][str(n)][way][key], 4),
            }
            # the Hub takes figures for one data set's that share type and split
            data = {"dataset_type": f"random-{n}", "dataset_name": f"{n} random points", "dataset_split": "test"}
            results.append(number | data | figure)
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "torch", "transformers"))
    return model_card(
        ARCHITECTURES["pointer-network"],
        head="AutoModelForSeq2SeqLM",
        repo_id=f"undersong/{REPOS[task]}",
        results={
            "hardware": f"{record['hardware']['device']} ({versions})",
            "command": record["command"],
            "results": results,
        },
        training_data=(
            f"{TRAINING[task]}, {min(bench.SIZES)} to {max(bench.SIZES)} of them, {setting['rows']:,} instances of"
            f" each size. {facts['steps']:,} steps of Adam with batches of {setting['batch']}, each of one size, a"
            f" peak learning rate of {facts['learning_rate']:g} and a cosine schedule, seed {facts['seed']}."
        ),
        limitations=LIMITATIONS[task],
    )


def publish(models, record, output):
    """Writes the repos into `output`; returns their folders."""
    folders = []
    for task, name in REPOS.items():
        (facts,) = (run for run in record["runs"] if (run["task"], run["kind"], run["seed"]) == (task, KINDS[task], 0))
        model = PointerNetworkForConditionalGeneration.from_pretrained(models / f"{task}-{KINDS[task]}")
        model.generation_config.task = task
        model.save_pretrained(output / name)
        (output / name / "README.md").write_text(str(card(facts, record)), encoding="utf-8")
        folders.append(output / name)
    return folders


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path, help="folder that bench_pointer_networks.py --models wrote")
    parser.add_argument("--record", type=Path, default=bench.RESULTS / "pointer_networks_cuda.json")
    parser.add_argument("--output", type=Path, default=HUB, help="folder of the repos")
    arguments = parser.parse_args()
    record = json.loads(arguments.record.read_text(encoding="utf-8"))
    for folder in publish(arguments.models, record, arguments.output):
        print(folder.name)


if __name__ == "__main__":
    main()
