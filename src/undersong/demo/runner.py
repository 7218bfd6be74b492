"""The stages in order, their progress in the terminal, and the two files they leave behind."""

import datetime
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging

from ..data.digits import digits
from ..data.wheels import smollm2
from .decode import METHODS, PROMPTS, decode
from .recipe import EPOCHS, LEARNING_RATES
from .report import render
from .stages import card, round_trip, train_both

PACKAGES = ("undersong", "torch", "transformers", "huggingface-hub", "kernels", "scikit-learn")
FULL = {"prompts": 4, "max_new_tokens": 120, "epochs": EPOCHS}
FAST = {"prompts": 2, "max_new_tokens": 40, "epochs": 3}


def run(output="undersong-demo", fast=False):
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    size = FAST if fast else FULL
    start = time.perf_counter()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        smollm2()  # has a progress bar of its own when it has something to fetch
        result = _stages(size, console)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    result["about"] = about(fast) | {"seconds": time.perf_counter() - start}
    _write(output / "demo.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    report = output / "report.html"
    _write(report, render(result))
    _print(result, console)
    console.print(f"The report is in [bold]{report}[/] ({result['about']['seconds']:.0f} s in all).", soft_wrap=True)
    return report


def about(fast):
    """Where and with what the demo ran."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "fast": fast,
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": installed,
    }


def _cpu():
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _stages(size, console):
    columns = TextColumn("{task.description:<58}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        totals = {
            "decode: SmolLM2 continues prompts, three ways": len(METHODS),
            "train: Aaren and a Transformer on 64-step digits": size["epochs"] * len(LEARNING_RATES),
            "hub: publish, load back without undersong, compare": 1,
        }
        tasks = {text.partition(":")[0]: progress.add_task(text, total=n, start=False) for text, n in totals.items()}
        result, seconds = {}, {}

        def timed(name, call):
            progress.start_task(tasks[name])
            start = time.perf_counter()
            value = call(lambda: progress.advance(tasks[name]))
            seconds[name] = time.perf_counter() - start
            return value

        result["decode"] = timed(
            "decode",
            lambda advance: decode(
                max_new_tokens=size["max_new_tokens"], prompts=PROMPTS[: size["prompts"]], advance=advance
            ),
        )
        data = digits()
        result["train"], models = timed(
            "train", lambda advance: train_both(epochs=size["epochs"], data=data, advance=advance)
        )
        text = card(
            models["aaren"],
            result["train"]["models"]["aaren"],
            hardware=f"{_cpu()}, {torch.get_num_threads()} threads",
            command="undersong demo",
        )

        def travel(advance):
            value = round_trip(models["aaren"], data["test"].past_values, model_card=text)
            advance()
            return value

        result["hub"] = timed("hub", travel)
        if not result["hub"]["bit_equal"]:
            raise RuntimeError(
                f"the model that came back gives other logits (by {result['hub']['largest_difference']:.1e}); "
                "run `undersong doctor` and report both."
            )
        result["seconds"] = seconds
    return result


def _print(result, console):
    table = Table("method", "repeated 4-grams", "repeated sentences", "tokens/s", title="decode")
    for name, row in result["decode"]["methods"].items():
        rep_sen = row["repeated_sentences"]
        table.add_row(name, f"{row['metrics']['rep_4']:.1%}", f"{rep_sen:.1%}", f"{row['tokens_per_s']:.0f}")
    console.print(table)
    table = Table("model", "parameters", "validation", "test accuracy", "seconds", title="train: digits, 64 steps")
    for kind, row in result["train"]["models"].items():
        accuracies = f"{row['validation']:.1%}", f"{row['test']:.1%}"
        table.add_row(kind, f"{row['parameters']:,}", *accuracies, f"{row['seconds']:.0f}")
    console.print(table)
    hub = result["hub"]
    console.print(
        f"hub: {hub['loaded_class']} came back from {hub['repo']} in a process without undersong; "
        f"the logits of {hub['series']} series are bit-equal: {hub['bit_equal']}.",
        soft_wrap=True,
    )


def _write(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
