"""Recall by content: how often Aaren, LightNet and a Transformer name the value that a key stood with.

    python benchmarks/bench_mqar.py --device cuda   # about fifteen minutes on a GPU
    python benchmarks/bench_mqar.py --fast          # tiny models on a CPU, writes nothing

Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927): a row holds pairs of key and value,
and then asks for some of them (`undersong.data.key_value`). A query that is learned once for all, as Aaren's, cannot
look anything up; this experiment says what is left. All models have two layers of the same width, see the same rows,
and train over the same grid of learning rates; the rate is the best of the mean over the seeds on validation rows.
Intervals are Student's t over the seeds, 95 %, cut to [0, 1].
"""

import argparse
import itertools
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import undersong  # noqa: F401 (the Auto classes learn our types)
from undersong.data.key_value import KeyValueTask

RESULTS = Path(__file__).parent / "results"
KINDS = ("aaren", "lightnet", "llama")  # model types; llama is the Transformer
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
VALIDATION, TEST = 10_000, 20_000  # seeds
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile of t with one degree of freedom fewer


@dataclass(frozen=True)
class Setting:
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    keys: int = 64
    values: int = 64
    pairs: tuple[int, ...] = (4, 8, 16)  # in a row: drawn anew for every batch of the training
    questions: int = 4
    batch: int = 128
    steps: int = 4000
    rows: int = 2000  # of validation, and of the test, for each number of pairs


FULL = Setting()
FAST = Setting(hidden_size=32, layers=1, keys=16, values=8, pairs=(2, 4), questions=2, batch=16, steps=30, rows=100)


def build(kind, setting, seed, device):
    shape = {
        "vocab_size": 2 + setting.keys + setting.values,
        "hidden_size": setting.hidden_size,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": setting.heads,
        "intermediate_size": 4 * setting.hidden_size,
        "initializer_range": setting.hidden_size**-0.5,
    }
    extra = {"expand_ratio": None} if kind == "lightnet" else {}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **shape, **extra, use_cache=False, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config).to(device)


def draw(pairs, count, setting, generator):
    task = KeyValueTask(pairs=pairs, keys=setting.keys, values=setting.values)
    return task.sample("DQ", batch=count, questions=min(setting.questions, pairs), generator=generator)


@torch.no_grad()
def accuracy(model, setting, seed, device):
    """Share of answers that are right, by number of pairs."""
    found = {}
    for pairs in setting.pairs:
        generator = torch.Generator(device).manual_seed(seed)
        right = asked = 0
        for begin in range(0, setting.rows, 500):
            count = min(500, setting.rows - begin)
            ids, labels = draw(pairs, count, setting, generator)
            guess = model(ids).logits[:, :-1].argmax(-1)
            at = labels[:, 1:] != -100
            right += (guess == labels[:, 1:])[at].sum().item()
            asked += at.sum().item()
        found[pairs] = right / asked
    return found


def run(kind, rate, seed, setting, device):
    torch.set_num_threads(1)
    model = build(kind, setting, seed, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    warmup = max(1, setting.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (setting.steps - step) / (setting.steps - warmup))
    )
    generator = torch.Generator(device).manual_seed(seed)
    begin = time.perf_counter()
    for step in range(setting.steps):
        ids, labels = draw(setting.pairs[step % len(setting.pairs)], setting.batch, setting, generator)
        model(ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - begin
    model.eval()
    found = {
        name: accuracy(model, setting, start, device) for name, start in (("validation", VALIDATION), ("test", TEST))
    }
    shares = ", ".join(f"{pairs}: {share:.3f}" for pairs, share in found["validation"].items())
    print(f"{kind:<10} {rate:.0e} seed {seed}: {shares}, {seconds:.0f} s", flush=True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"kind": kind, "learning_rate": rate, "seed": seed, "seconds": seconds, "parameters": parameters, **found}


def interval(shares):
    """Mean and the ends of its 95 % interval."""
    mean = statistics.mean(shares)
    if len(shares) not in STUDENT:
        return {"mean": mean, "by_seed": shares}
    half = STUDENT[len(shares)] * statistics.stdev(shares) / len(shares) ** 0.5
    return {"mean": mean, "low": max(0.0, mean - half), "high": min(1.0, mean + half), "by_seed": shares}


def choose(runs, setting):
    mean = {}
    for rate in sorted({run["learning_rate"] for run in runs}):
        shares = [statistics.mean(run["validation"].values()) for run in runs if run["learning_rate"] == rate]
        mean[rate] = statistics.mean(shares)
    best = max(mean, key=mean.get)
    chosen = [run for run in runs if run["learning_rate"] == best]
    test = {pairs: interval([run["test"][pairs] for run in chosen]) for pairs in setting.pairs}
    return {"learning_rate": best, "validation_mean": mean, "test": test, "runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="one rate and seed, tiny, nothing written")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="model types")
    parser.add_argument("--jobs", type=int, default=4, help="trainings beside each other")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting, rates, seeds = (FAST, RATES[1:2], SEEDS[:1]) if arguments.fast else (FULL, RATES, SEEDS)
    tasks = [(*task, setting, arguments.device) for task in itertools.product(arguments.kinds, rates, seeds)]
    if arguments.fast:
        runs = [run(*task) for task in tasks]
    else:
        with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
            runs = list(pool.map(run, *zip(*tasks, strict=True)))
    models = {kind: choose([one for one in runs if one["kind"] == kind], setting) for kind in arguments.kinds}
    record = harness.run_record("mqar", arguments.device) | {"setting": asdict(setting), "jobs": arguments.jobs}
    record |= {"chance": 1 / setting.values, "models": models}
    record["accuracy"] = {
        kind: {pairs: row["test"][pairs]["mean"] for pairs in setting.pairs} for kind, row in models.items()
    }
    print(json.dumps(record["accuracy"] | {"chance": record["chance"]}, indent=1))
    if not arguments.fast:
        default = RESULTS / f"mqar_{torch.device(arguments.device).type}.json"
        harness.write_json(arguments.output or default, record)


if __name__ == "__main__":
    main()
