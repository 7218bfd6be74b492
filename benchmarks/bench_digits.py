"""Aaren against a Transformer of its size, and logistic regression, on digits read as 64-step series.

    python benchmarks/bench_digits.py            # about 15 minutes on 2 idle cores
    python benchmarks/bench_digits.py --fast     # a smoke run, writes nothing

Both models train with the demo's recipe (`undersong.demo.recipe`): same split, steps and grid of three learning rates,
three seeds each. The learning rate is the one with the best mean accuracy on the validation split; the test split is
read once, for that rate. Logistic regression sees the same pixels; its regularisation is chosen the same way.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from sklearn.linear_model import LogisticRegression

from undersong.data.digits import digits
from undersong.demo.recipe import EPOCHS, LEARNING_RATES, config, train

RESULT = Path(__file__).parent / "results" / "digits_cpu.json"
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)


def logistic_regression(data):
    pixels = {name: (part.past_values[..., 0].numpy(), part.labels.numpy()) for name, part in data.items()}
    fits = {c: LogisticRegression(C=c, max_iter=10_000).fit(*pixels["train"]) for c in (0.1, 1.0, 10.0)}
    validation = {c: fit.score(*pixels["validation"]) for c, fit in fits.items()}
    best = max(validation, key=validation.get)
    return {"C": best, "validation": validation[best], "test": fits[best].score(*pixels["test"])}


def run(task):
    kind, rate, seed, epochs = task
    torch.set_num_threads(1)
    facts = train(kind, learning_rate=rate, seed=seed, epochs=epochs).facts()
    print(f"{kind:<12} {rate:.0e} seed {seed}: {facts['validation']:.4f}  {facts['seconds']:.0f} s", flush=True)
    return kind, facts


def choose(runs):
    """The learning rate with the best mean validation accuracy, and what its runs did on the test split."""
    mean = {r: statistics.mean(x["validation"] for x in runs if x["learning_rate"] == r) for r in RATES}
    best = max(mean, key=mean.get)
    chosen = [run for run in runs if run["learning_rate"] == best]
    test = [run["test"] for run in chosen]
    return {
        "learning_rate": best,
        "validation_mean": mean,
        "test_mean": statistics.mean(test),
        "test_sd": statistics.stdev(test) if len(test) > 1 else None,
        "test_by_seed": test,
        "parameters": chosen[0]["parameters"],
        "runs": runs,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="1 epoch, 1 seed, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    arguments = parser.parse_args()
    bench = harness.Benchmark("digits", device="cpu", threads=1)
    data = digits()
    epochs, seeds = (1, SEEDS[:1]) if arguments.fast else (EPOCHS, SEEDS)
    tasks = [(kind, rate, seed, epochs) for kind in LEARNING_RATES for rate in RATES for seed in seeds]
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        runs = list(pool.map(run, tasks))
    models = {kind: choose([facts for other, facts in runs if other == kind]) for kind in LEARNING_RATES}
    regression = logistic_regression(data)
    aaren, transformer = models["aaren"]["test_mean"], models["transformer"]["test_mean"]
    acceptance = {
        "Aaren - Transformer >= -1.5 points": 100 * (aaren - transformer),
        "Transformer - logistic regression >= -1 point": 100 * (transformer - regression["test"]),
    }
    record = bench.as_dict() | {
        "jobs": arguments.jobs,
        "epochs": epochs,
        "config": config().to_diff_dict(),
        "models": models,
        "logistic_regression": regression,
        "acceptance": acceptance,
    }
    for kind, row in models.items():
        spread = f"+- {100 * row['test_sd']:.2f}" if row["test_sd"] is not None else ""
        print(f"{kind:<20} test {100 * row['test_mean']:.2f} {spread} (learning rate {row['learning_rate']})")
    print(f"{'logistic regression':<20} test {100 * regression['test']:.2f} (C {regression['C']})")
    print(json.dumps(acceptance, indent=1))
    if not arguments.fast:
        RESULT.parent.mkdir(exist_ok=True)
        part = RESULT.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(RESULT)


if __name__ == "__main__":
    main()
