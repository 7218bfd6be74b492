"""Trains the published pointer networks by the benchmark's recipe; writes their Hub repos, cards and figures included.

    python benchmarks/train_pointer_models.py --device cuda   # about four minutes; needs a record of the benchmark
    python benchmarks/train_pointer_models.py --fast          # smoke test, writes nothing into the project

Size, schedule and learning rate are what `bench_pointer_networks.py` chose on validation instances; the training is
longer. The figures on the cards are measured on the benchmark's test instances and kept beside its record.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import bench_pointer_networks as bench
import harness
import torch

from undersong.hub.cards import model_card
from undersong.registry import ARCHITECTURES

HUB = Path(__file__).parents[1] / "hub_configs"
REPOS = {"hull": "pointer-hull", "tour": "pointer-tsp"}
KINDS = {"hull": "lstm", "tour": "transformer"}
SHOWN = {"hull": (5, 10, 20), "tour": (5, 10, 12)}  # sizes on the cards
LONGER = 2  # times the benchmark's training

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


def train(job, setting):
    """A training and its test; the model lies in the job's folder afterwards, for processes share no models."""
    model, facts = bench.train(job, setting)
    facts["test"] = bench.evaluate_all(model, job.task, setting)
    model.generation_config.task = job.task
    model.cpu().save_pretrained(Path(job.folder) / REPOS[job.task])
    return facts


def card(facts, setting, record):
    task = facts["task"]
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
            f"{TRAINING[task]}, {min(bench.SIZES)} to {max(bench.SIZES)} of them, {setting.rows:,} instances of each"
            f" size. {facts['steps']:,} steps of Adam with batches of {setting.batch}, each of one size, a peak"
            f" learning rate of {facts['learning_rate']:g} and a cosine schedule, seed {facts['seed']}."
        ),
        limitations=LIMITATIONS[task],
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--record", type=Path, help="the benchmark's, for its learning rates")
    parser.add_argument("--output", type=Path, default=HUB, help="folder of the two repos")
    arguments = parser.parse_args()
    kind = torch.device(arguments.device).type
    if arguments.fast:
        setting, rates = bench.FAST, dict.fromkeys(REPOS, 1e-3)
    else:
        setting = bench.GPU if kind == "cuda" else bench.CPU
        setting = replace(setting, steps=LONGER * setting.steps, seconds=LONGER * setting.seconds, jobs=len(REPOS))
        path = arguments.record or bench.RESULTS / f"pointer_networks_{kind}.json"
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        rates = {run["task"]: run["learning_rate"] for run in runs if run["kind"] == KINDS[run["task"]]}
    with tempfile.TemporaryDirectory() as folder:
        bench.make_instances(list(rates), setting, folder)
        jobs = [bench.Job(task, KINDS[task], 0, rate, arguments.device, folder) for task, rate in rates.items()]
        runs = bench.beside(setting.jobs, train, [(job, setting) for job in jobs])
        record = harness.run_record("pointer_models", arguments.device) | {"runs": runs}
        for facts in runs:
            repo = Path(folder) / REPOS[facts["task"]]
            (repo / "README.md").write_text(str(card(facts, setting, record)), encoding="utf-8")
            if not arguments.fast:
                shutil.copytree(repo, arguments.output / repo.name, dirs_exist_ok=True)
            figures = {n: row["rules"] for n, row in facts["test"].items()}
            print(f"{REPOS[facts['task']]}: {json.dumps(figures)}")
    if not arguments.fast:
        harness.write_json(bench.RESULTS / f"pointer_models_{kind}.json", record)


if __name__ == "__main__":
    main()
