"""S4D and S5 against an LSTM of their size in the same training time, and the speed of their two forms.

    python benchmarks/bench_s4d_s5.py                    # on a GPU if there is one
    python benchmarks/bench_s4d_s5.py --device cpu       # about 12 minutes on 2 idle cores
    python benchmarks/bench_s4d_s5.py --fast             # a smoke run, writes nothing

Two tasks: scikit-learn's digits as 64 steps of one pixel (the splits and the noise of the demo's recipe), and a token
that must be named after 4,096 steps of noise (`undersong.data.long_delay`). Every model of a task trains for the same
seconds, in processes of their own, with a learning rate that warms up and decays over that time. The rate is the best
of the same three for every model, by validation accuracy over all seeds; the test split is read for that rate only.
The digits' time is short on purpose: with four times as much, all three end within a point of 98.5 %.
"""

import argparse
import functools
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
from torch.nn import functional as F

from undersong import (
    S4DConfig,
    S4DForCausalLM,
    S4DForTimeSeriesClassification,
    S5Config,
    S5ForCausalLM,
    S5ForTimeSeriesClassification,
)
from undersong.data.digits import digits
from undersong.data.long_delay import long_delay
from undersong.demo.recipe import NOISE
from undersong.ops import diagonal_scan, diagonal_ssm, fft_conv
from undersong.ops.diagonal_ssm import SHORT
from undersong.ops.hippo import diagonal_init, discretise, hippo_blocks
from undersong.training.state_spaces import state_space_groups

RESULTS = Path(__file__).parent / "results"
KINDS = ("s4d", "s5", "lstm")


@dataclass(frozen=True)
class Task:
    name: str
    classes: int
    channels: int
    hidden_size: int
    state_size: int  # of one channel of S4D
    s5: tuple[int, int]  # state size and blocks of S5
    pooling: str  # of S4D and S5
    dropout: float
    dt: tuple[float, float]
    weight_decay: float
    smoothing: float
    batch: int
    seconds: dict[str, float]  # of training, by device
    delay: int = 0
    noise: float = 0.3


DIGITS = Task(
    name="digits",
    classes=10,
    channels=1,
    hidden_size=64,
    state_size=32,
    s5=(64, 4),
    pooling="last",
    dropout=0.2,
    dt=(1e-2, 0.5),
    weight_decay=0.1,
    smoothing=0.1,
    batch=32,
    seconds={"cpu": 15, "cuda": 8},
)
DELAY = Task(
    name="long delay",
    classes=4,
    channels=5,
    hidden_size=32,
    state_size=32,
    s5=(64, 8),
    pooling="last",
    dropout=0.0,
    dt=(1e-4, 1e-2),
    weight_decay=0.0,
    smoothing=0.0,
    batch=16,
    seconds={"cpu": 120, "cuda": 25},
    delay=4096,
)

TASKS = {task.name.replace(" ", "-"): task for task in (DELAY, DIGITS)}


class LSTMClassifier(nn.Module):
    """`torch.nn.LSTM` of two layers; reads its last state, with which it learns far faster than from the mean."""

    def __init__(self, task, hidden_size):
        super().__init__()
        self.lstm = nn.LSTM(task.channels, hidden_size, 2, batch_first=True, dropout=task.dropout)
        self.score = nn.Linear(hidden_size, task.classes)

    def forward(self, past_values):
        states, _ = self.lstm(past_values)
        return self.score(states[:, -1])


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def build(kind, task):
    if kind == "lstm":  # as many parameters as the larger of the two others, or a few more
        want = max(size(build(other, task)) for other in ("s4d", "s5"))
        return next(m for m in (LSTMClassifier(task, h) for h in range(1, 1000)) if size(m) >= want)
    config_class, model_class = {
        "s4d": (S4DConfig, S4DForTimeSeriesClassification),
        "s5": (S5Config, S5ForTimeSeriesClassification),
    }[kind]
    shape = {"state_size": task.state_size} if kind == "s4d" else {"state_size": task.s5[0], "num_blocks": task.s5[1]}
    return model_class(
        config_class(
            hidden_size=task.hidden_size,
            **shape,
            num_hidden_layers=2,
            hidden_dropout_prob=task.dropout,
            initializer_range=task.hidden_size**-0.5,
            dt_min=task.dt[0],
            dt_max=task.dt[1],
            input_size=task.channels,
            num_labels=task.classes,
            pooling=task.pooling,
        )
    )


def logits_of(model, values):
    output = model(past_values=values)
    return output if isinstance(output, torch.Tensor) else output.logits


def draw(task, data, generator):
    """A batch to train on."""
    if task.delay:
        return long_delay(task.batch, task.delay, classes=task.classes, noise=task.noise, generator=generator)
    values, labels = data["train"]
    rows = torch.randint(len(labels), (task.batch,), generator=generator, device=values.device)
    values = values[rows]
    return values + NOISE * torch.randn(values.shape, generator=generator, device=values.device), labels[rows]


def load(task, device):
    """{"train", "validation", "test"}: values and labels on the device; the long delay trains on fresh series."""
    if task.delay:
        parts = {"validation": 1, "test": 2}
        return {
            name: long_delay(
                256,
                task.delay,
                classes=task.classes,
                noise=task.noise,
                generator=torch.Generator(device).manual_seed(10_000 + seed),
            )
            for name, seed in parts.items()
        }
    return {name: (part.past_values.to(device), part.labels.to(device)) for name, part in digits().items()}


@torch.no_grad()
def accuracy(model, values, labels):
    model.eval()
    parts = zip(values.split(64), labels.split(64), strict=True)
    right = sum((logits_of(model, v).argmax(-1) == y).sum() for v, y in parts)
    model.train()
    return right.item() / len(labels)


def train(kind, task, rate, seed, device, seconds):
    """One model from its first step to the end of its time."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, data = build(kind, task).to(device), load(task, device)
    groups = state_space_groups(model, rate, task.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator(device).manual_seed(seed)

    def step(progress):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(10 * progress, (1 - progress) / 0.9)
        values, labels = draw(task, data, generator)
        loss = F.cross_entropy(logits_of(model, values), labels, label_smoothing=task.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # waits for the device, so that the clock is right

    step(0.0)  # starts libraries; its learning rate is 0
    start, steps, losses = time.perf_counter(), 0, []
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        losses.append(step(progress))
        steps += 1
    seconds = time.perf_counter() - start
    facts = {
        "kind": kind,
        "task": task.name,
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "parameters": size(model),
        "losses": [statistics.mean(losses[i : i + max(1, steps // 20)]) for i in range(0, steps, max(1, steps // 20))],
    } | {name: accuracy(model, *data[name]) for name in ("validation", "test")}
    print(
        f"{task.name:<11} {kind:<5} {rate:.0e} seed {seed}: {steps} steps, loss {facts['losses'][-1]:.3f},"
        f" validation {facts['validation']:.3f}",
        flush=True,
    )
    return facts


def choose(runs):
    """The learning rate with the best mean validation accuracy, and what its runs did on the test split."""
    rates = {run["learning_rate"] for run in runs}
    mean = {r: statistics.mean(x["validation"] for x in runs if x["learning_rate"] == r) for r in sorted(rates)}
    best = max(mean, key=mean.get)
    chosen = [run for run in runs if run["learning_rate"] == best]
    return {
        "learning_rate": best,
        "validation_mean": mean,
        "test_mean": statistics.mean(run["test"] for run in chosen),
        "test_by_seed": [run["test"] for run in chosen],
        "parameters": chosen[0]["parameters"],
        "seconds": [run["seconds"] for run in chosen],
        "runs": runs,
    }


def normal(*shape, device, dtype=torch.float32, grad=False):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_(grad)


def gradients(call, *leaves):
    """Forward and backward as one callable."""

    def run():
        y = call()
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def layer_forms(bench, device, lengths, channels=64, state=32, batch=4):
    """Forward of both layers' recurrences in both forms; that of S5 as a convolution is one with the powers of a."""
    for length in lengths:
        info = {"length": length, "batch": batch, "channels": channels, "state": state}
        dt = torch.logspace(-3, -1, channels, device=device)
        u, D = normal(batch, length, channels, device=device), normal(channels, device=device)
        log_a, B = discretise(diagonal_init(2 * state).to(device, torch.complex64), dt[:, None])
        parts = log_a, B, normal(channels, state, device=device, dtype=torch.complex64), D
        forms = ("convolution", "scan") if length <= 4096 else ("convolution",)  # or its states would be gigabytes
        calls = {form: functools.partial(diagonal_ssm, u, *parts, lowering=form) for form in forms}
        bench.add(
            f"s4d {length}", calls, reference=calls["convolution"], tolerance=1e-4, baseline="convolution", **info
        )
        log_a, _ = discretise(hippo_blocks(2 * channels, 4)[0].to(device, torch.complex64), dt)
        b = normal(batch, length, channels, device=device, dtype=torch.complex64)
        calls = {"scan": functools.partial(scan, log_a, b), "convolution": functools.partial(transform, log_a, b)}
        bench.add(
            f"s5 {length}", calls, reference=calls["convolution"], tolerance=1e-3, baseline="convolution", **info
        )


def scan(log_a, b):
    return torch.view_as_real(diagonal_scan(log_a.exp()[None, None], b))


def transform(log_a, b):
    length = b.shape[1]
    kernel = (log_a * torch.arange(length, device=b.device).unsqueeze(1)).exp()
    spectrum = torch.fft.fft(b, n=2 * length, dim=1) * torch.fft.fft(kernel, n=2 * length, dim=0)
    return torch.view_as_real(torch.fft.ifft(spectrum, dim=1)[:, :length])


def long_convolution(device, length, channels=16, state=32, rounds=3):
    """Forward and backward of a long convolution against one step of the recurrence after the other."""
    u = normal(1, length, channels, device=device, grad=True)
    A = diagonal_init(2 * state).to(device, torch.complex64)
    log_a, B = discretise(A, torch.logspace(-3, -1, channels, device=device)[:, None])
    C = normal(channels, state, device=device, dtype=torch.complex64)
    log_a, B, C = (x.detach().requires_grad_() for x in (log_a, B, C))
    impulse = torch.zeros(1, length, channels, device=device)
    impulse[:, 0] = 1
    k = diagonal_ssm(impulse, log_a, B, C)[0].T.detach().requires_grad_()
    calls = {
        "fft_conv": gradients(lambda: fft_conv(u, k), u, k),
        "convolution form, kernel included": gradients(lambda: diagonal_ssm(u, log_a, B, C), u, log_a, B, C),
        "step loop": gradients(lambda: diagonal_ssm(u, log_a, B, C, backend="reference"), u, log_a, B, C),
    }
    harness.check("long convolution", calls["fft_conv"]()[0], calls["step loop"]()[0], 1e-3)
    seconds = {}
    for name, call in calls.items():
        times = [clock(call, device) for _ in range(rounds if name != "step loop" else 1)]
        seconds[name] = statistics.median(times)
    ratios = {name: seconds["step loop"] / value for name, value in seconds.items()}
    return {"length": length, "channels": channels, "state": state, "seconds": seconds, "times_step_loop": ratios}


def clock(call, device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def decoding(device, lengths, steps=30):
    """Milliseconds of one token of a language model after prompts of several lengths."""
    found = {}
    for kind, config_class, model_class in (("s4d", S4DConfig, S4DForCausalLM), ("s5", S5Config, S5ForCausalLM)):
        torch.manual_seed(0)
        config = config_class(vocab_size=256, hidden_size=128, state_size=64, num_hidden_layers=4)
        model = model_class(config).to(device).eval()
        states = {n: model(torch.ones(1, n, dtype=torch.long, device=device), use_cache=True) for n in lengths}
        token, times = torch.ones(1, 1, dtype=torch.long, device=device), {n: [] for n in lengths}
        for _ in range(steps):  # in turn, so that a slow moment meets all of them
            for n, held in states.items():
                call = functools.partial(model, token, past_key_values=held.past_key_values, use_cache=True)
                times[n].append(1e3 * clock(call, device))
        found[kind] = {n: statistics.median(x) for n, x in times.items()}
    return found


def acceptance(models, bench, convolution, decode):
    found = {}
    for task, rows in models.items():
        for kind in ("s4d", "s5"):
            found[f"{task}: {kind} - lstm > 0"] = rows[kind]["test_mean"] - rows["lstm"]["test_mean"]
            if task == DELAY.name:
                found[f"{task}: {kind} >= 0.95"] = rows[kind]["test_mean"]
        if task == DELAY.name:
            found[f"{task}: lstm near chance (0.25)"] = rows["lstm"]["test_mean"]
    for kind, times in decode.items():
        found[f"decoding: {kind}, slowest over fastest prompt length, about 1"] = max(times.values()) / min(
            times.values()
        )
    for kind in ("s4d", "s5"):
        cases = [case for case in bench.cases if case["case"].startswith(kind)]
        # of the form that runs at that length, over the convolution
        found[f"{kind}: forward over its convolution form >= 1, worst length"] = min(
            case["candidates"]["scan"]["speedup"] if kind == "s5" or case["info"]["length"] <= SHORT else 1.0
            for case in cases
        )
    found["fft_conv over the step loop >= 50 (CPU)"] = convolution["times_step_loop"]["fft_conv"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="a second of training, short lengths, nothing written")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, help="trainings at a time: 2 on a CPU, all of them on a GPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device).type
    tasks = [TASKS[name] for name in arguments.tasks]
    rates, seeds = (arguments.rates[:1], 1) if arguments.fast else (arguments.rates, arguments.seeds)

    bench = harness.Benchmark("s4d_s5", device=arguments.device, rounds=20, threads=1)
    layer_forms(bench, arguments.device, (16, 64) if arguments.fast else (4, 16, 64, 256, 1024, 4096, 16384))
    convolution = long_convolution(arguments.device, 512 if arguments.fast else 16384)
    decode = decoding(arguments.device, (16, 64) if arguments.fast else (16, 1024, 16384))
    print(bench.table(), json.dumps({"long convolution": convolution, "decoding_ms": decode}, indent=1), flush=True)

    jobs = [
        (kind, task, rate, seed, arguments.device, 1 if arguments.fast else task.seconds[device])
        for task in tasks
        for rate in rates
        for seed in range(seeds)
        for kind in KINDS
    ]
    runs = []
    with ProcessPoolExecutor(arguments.jobs or (2 if device == "cpu" else len(jobs)), get_context("spawn")) as pool:
        for future in [pool.submit(train, *job) for job in jobs]:
            runs.append(future.result())
    models = {
        task.name: {
            kind: choose([run for run in runs if (run["kind"], run["task"]) == (kind, task.name)]) for kind in KINDS
        }
        for task in tasks
    }
    found = acceptance(models, bench, convolution, decode)
    print(json.dumps(found, indent=1))
    if not arguments.fast:
        record = bench.as_dict() | {
            "jobs": arguments.jobs,
            "tasks": [asdict(task) for task in tasks],
            "long_convolution": convolution,
            "decoding_ms": decode,
            "models": models,
            "acceptance": found,
        }
        harness.write_json(arguments.output or RESULTS / f"s4d_s5_{device}.json", record)


if __name__ == "__main__":
    main()
