"""Aaren against a Transformer of its size, a constant rate and the truth on Hawkes processes.

    python benchmarks/bench_aaren_events.py                     # about four minutes on 2 idle cores
    python benchmarks/bench_aaren_events.py --fast              # a smoke run, writes nothing
    python benchmarks/bench_aaren_events.py --write-checkpoint  # also hub_configs/aaren-events, with its card

Figures are nats per event (its time and its kind, given the events before it), so the exact likelihood of the process
is a floor. Both models have the same embeddings, heads, steps and grid of learning rates; the rate is the best of the
mean over the seeds on validation streams. "Time" is the root mean squared error of the median gap, "kind" the share of
next kinds named right.
"""

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from aaren_training import KINDS, RATES, SEEDS, build, choose, size, train

from undersong.data.point_processes import HawkesProcess, constant_rate_log_likelihood
from undersong.hub.cards import model_card
from undersong.modeling.aaren.configuration_aaren import AarenConfig
from undersong.modeling.aaren.modeling_aaren_events import AarenForEventForecasting, log_gap_statistics

RESULTS = Path(__file__).parent / "results"
CHECKPOINT = Path(__file__).parents[1] / "hub_configs" / "aaren-events"
PROCESS = HawkesProcess(base_rates=(0.2, 0.1), excitation=((0.5, 0.2), (0.4, 0.3)), decay=4.0)


@dataclass(frozen=True)
class Setting:
    events: int = 64
    train: int = 2000
    held_out: int = 500  # streams for validation, and as many for the test
    hidden_size: int = 32
    layers: int = 2
    mixtures: int = 16
    batch: int = 32
    steps: int = 400


FULL = Setting()
FAST = Setting(events=16, train=64, held_out=32, hidden_size=16, layers=1, mixtures=4, batch=8, steps=20)


def streams(setting):
    """(times, types) by split, always the same; float64, for two events may be closer than float32 can tell."""
    parts = {}
    for seed, (name, count) in enumerate(
        {"train": setting.train, "validation": setting.held_out, "test": setting.held_out}.items()
    ):
        times, types = PROCESS.sample(count, setting.events, generator=torch.Generator().manual_seed(seed))
        parts[name] = times, types
    return parts


def config(setting, times):
    return AarenConfig(
        hidden_size=setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        initializer_range=setting.hidden_size**-0.5,  # a narrow model learns faster than from the usual 0.02
        num_event_types=PROCESS.num_event_types,
        num_mixtures=setting.mixtures,
        **log_gap_statistics(times),
    )


def batches(data, setting, seed, device):
    times, types = (x.to(device) for x in data)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(times), (setting.batch,), generator=generator)
        yield {"event_times": times[rows], "event_types": types[rows]}


@torch.no_grad()
def evaluate(model, data, device):
    """Nats per event, error of the median gap, share of kinds named right; a stream's first event is not counted."""
    likelihood, squared, right = 0.0, 0.0, 0
    for times, types in zip(*(x.to(device).split(100) for x in data), strict=True):
        outputs = model(times, types)
        likelihood += outputs.log_likelihood.double().sum().item()
        median = model.next_gap(outputs.gap_parameters).quantile(0.5)[:, :-1]
        squared += (median - times.diff(dim=1)).double().square().sum().item()
        right += (outputs.type_logits[:, :-1].argmax(-1) == types[:, 1:]).sum().item()
    count = data[0][:, 1:].numel()
    return {"nll": -likelihood / count, "time_rmse": (squared / count) ** 0.5, "kind_accuracy": right / count}


def run(kind, rate, seed, setting, device):
    torch.set_num_threads(1)
    data = streams(setting)
    model = build(kind, AarenForEventForecasting, config(setting, data["train"][0]), seed, device)
    seconds = train(model, batches(data["train"], setting, seed, device), steps=setting.steps, learning_rate=rate)
    found = {name: evaluate(model, data[name], device) for name in ("validation", "test")}
    print(f"{kind:<12} {rate:.0e} seed {seed}: {found['validation']['nll']:.4f} nats, {seconds:.0f} s", flush=True)
    facts = {"kind": kind, "learning_rate": rate, "seed": seed, "seconds": seconds, "parameters": size(model), **found}
    return facts, model


def facts_of_run(*task):
    return run(*task)[0]


def write_checkpoint(rate, setting, command, record):
    """Trains the chosen rate's first seed again and writes the Hub repo; the card has the figures of this very run."""
    facts, model = run("aaren", rate, SEEDS[0], setting, "cpu")
    model.save_pretrained(CHECKPOINT)
    number = {
        "task_type": "event-forecasting",
        "dataset_type": "hawkes",
        "dataset_name": "simulated Hawkes process",
        "dataset_split": "test",
    }
    metrics = {"nll": "nats per event", "time_rmse": "RMSE of the median gap", "kind_accuracy": "accuracy of the kind"}
    results = [
        number | {"metric_type": key, "metric_name": name, "metric_value": round(facts["test"][key], 4)}
        for key, name in metrics.items()
    ]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("python", "torch", "transformers"))
    card = model_card(
        model,
        repo_id="undersong/aaren-events",
        results={
            "hardware": f"{record['hardware']['cpu']}, 1 thread ({versions})",
            "command": command,
            "results": results,
        },
        training_data=(
            f"{setting.train:,} streams of {setting.events} events of a Hawkes process with two kinds, simulated"
            f" (`undersong.data.point_processes`): base rates {PROCESS.base_rates}, excitation {PROCESS.excitation},"
            f" decay {PROCESS.decay}. On the test streams the process itself has {record['truth']:.4f} nats per event,"
            f" and a constant rate {record['constant_rate']:.4f}."
        ),
        limitations=(
            "A demonstration: it knows one process. The model takes the next kind as independent of when it comes,"
            " which the process is not quite."
        ),
    )
    (CHECKPOINT / "README.md").write_text(str(card), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="one rate and seed, small, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--write-checkpoint", action="store_true", help="write hub_configs/aaren-events")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting, rates, seeds = (FAST, RATES[1:2], SEEDS[:1]) if arguments.fast else (FULL, RATES, SEEDS)
    record = harness.run_record("aaren_events", arguments.device)
    data = streams(setting)
    record |= {"setting": asdict(setting), "process": asdict(PROCESS), "jobs": arguments.jobs}
    record["truth"] = -PROCESS.log_likelihood(*data["test"])[:, 1:].mean().item()
    rate = constant_rate_log_likelihood(data["train"], data["test"], PROCESS.num_event_types)
    record["constant_rate"] = -rate.mean().item()

    tasks = [(*task, setting, arguments.device) for task in itertools.product(KINDS, rates, seeds)]
    if arguments.fast:
        runs = [facts_of_run(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            runs = list(pool.map(facts_of_run, *zip(*tasks, strict=True)))
    models = {kind: choose([one for one in runs if one["kind"] == kind], "nll") for kind in KINDS}
    nll = {kind: row["test"]["nll"] for kind, row in models.items()}
    record |= {"models": models}
    record["acceptance"] = {
        "Aaren - Transformer <= 0.02 nats": nll["aaren"] - nll["transformer"],
        "Aaren - constant rate <= -0.1 nats": nll["aaren"] - record["constant_rate"],
        "Aaren - truth, nats": nll["aaren"] - record["truth"],
    }
    print(json.dumps({"truth": record["truth"], "constant rate": record["constant_rate"], **nll}, indent=1))
    print(json.dumps(record["acceptance"], indent=1))
    if not arguments.fast:
        default = RESULTS / f"aaren_events_{torch.device(arguments.device).type}.json"
        harness.write_json(arguments.output or default, record)
        if arguments.write_checkpoint:
            write_checkpoint(models["aaren"]["learning_rate"], setting, record["command"], record)


if __name__ == "__main__":
    main()
