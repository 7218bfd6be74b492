"""Aaren against a Transformer of its size, and the best forecast there is, on a season with autoregressive noise.

    python benchmarks/bench_aaren_forecasting.py           # about ten minutes on 2 idle cores
    python benchmarks/bench_aaren_forecasting.py --fast    # a smoke run, writes nothing

The process is Gaussian, so the best forecast is linear in the past and its error known exactly
(`undersong.data.series.SeasonalAR`). Figures are mean squared errors; "last season" repeats the season before. Both
models have the same embeddings, heads, steps and grid of learning rates; the rate is the best of the mean over the
seeds on validation series.
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

from undersong.data.series import SeasonalAR
from undersong.modeling.aaren.configuration_aaren import AarenConfig
from undersong.modeling.aaren.modeling_aaren_prediction import AarenForPrediction

RESULTS = Path(__file__).parent / "results"
PROCESS = SeasonalAR()


@dataclass(frozen=True)
class Setting:
    past: int = 96
    future: int = 24
    train: int = 20_000
    held_out: int = 1000  # series for validation, and as many for the test
    hidden_size: int = 32
    layers: int = 2
    batch: int = 64
    steps: int = 800


FULL = Setting()
FAST = Setting(past=48, train=200, held_out=50, hidden_size=16, layers=1, batch=16, steps=20)


def series(setting):
    """(past, future) by split; always the same."""
    parts = {}
    for seed, (name, count) in enumerate(
        {"train": setting.train, "validation": setting.held_out, "test": setting.held_out}.items()
    ):
        values = PROCESS.sample(count, setting.past + setting.future, generator=torch.Generator().manual_seed(seed))
        parts[name] = values.split([setting.past, setting.future], 1)
    return parts


def config(setting):
    return AarenConfig(
        hidden_size=setting.hidden_size,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        initializer_range=setting.hidden_size**-0.5,  # a narrow model learns faster than from the usual 0.02
        prediction_length=setting.future,
    )


def batches(data, setting, seed, device):
    past, future = (x.to(device) for x in data)
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(past), (setting.batch,), generator=generator)
        yield {"past_values": past[rows], "future_values": future[rows]}


@torch.no_grad()
def evaluate(model, data, device):
    total = 0.0
    for past, future in zip(*(x.to(device).split(250) for x in data), strict=True):
        total += model(past).prediction_outputs.sub(future).double().square().sum().item()
    return {"mse": total / data[1].numel()}


def run(kind, rate, seed, setting, device):
    torch.set_num_threads(1)
    data = series(setting)
    model = build(kind, AarenForPrediction, config(setting), seed, device)
    seconds = train(model, batches(data["train"], setting, seed, device), steps=setting.steps, learning_rate=rate)
    found = {name: evaluate(model, data[name], device) for name in ("validation", "test")}
    print(f"{kind:<12} {rate:.0e} seed {seed}: {found['validation']['mse']:.4f}, {seconds:.0f} s", flush=True)
    return {"kind": kind, "learning_rate": rate, "seed": seed, "seconds": seconds, "parameters": size(model), **found}


def baselines(data):
    """Mean squared errors on the test series without any training."""
    past, future = data["test"]
    weights, _ = PROCESS.forecaster(past.shape[1], future.shape[1])
    season = int(PROCESS.period)
    repeated = past[:, -season:].repeat(1, -(-future.shape[1] // season), 1)[:, : future.shape[1]]
    best = (past[..., 0].double() @ weights).unsqueeze(-1)
    return {
        "best forecast": (best - future).square().mean().item(),
        "last season": (repeated - future).square().mean().item(),
        "mean of the past": (past.mean(1, keepdim=True) - future).square().mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fast", action="store_true", help="one rate and seed, small, nothing written")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting, rates, seeds = (FAST, RATES[1:2], SEEDS[:1]) if arguments.fast else (FULL, RATES, SEEDS)
    tasks = [(*task, setting, arguments.device) for task in itertools.product(KINDS, rates, seeds)]
    if arguments.fast:
        runs = [run(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            runs = list(pool.map(run, *zip(*tasks, strict=True)))
    models = {kind: choose([one for one in runs if one["kind"] == kind], "mse") for kind in KINDS}
    found = {kind: row["test"]["mse"] for kind, row in models.items()} | baselines(series(setting))
    record = harness.run_record("aaren_forecasting", arguments.device)
    record |= {"setting": asdict(setting), "process": asdict(PROCESS), "jobs": arguments.jobs}
    record |= {"models": models, "test_mse": found}
    record["acceptance"] = {
        "Aaren / Transformer <= 1.05": found["aaren"] / found["transformer"],
        "Aaren / best forecast": found["aaren"] / found["best forecast"],
    }
    print(json.dumps(found | record["acceptance"], indent=1))
    if not arguments.fast:
        default = RESULTS / f"aaren_forecasting_{torch.device(arguments.device).type}.json"
        harness.write_json(arguments.output or default, record)


if __name__ == "__main__":
    main()
