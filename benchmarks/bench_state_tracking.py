"""Words of permutations at 4 times the length of training: transitions that are matrices against numbers.

    python benchmarks/bench_state_tracking.py                       # about 20 minutes on 2 idle cores
    python benchmarks/bench_state_tracking.py --write-checkpoint    # also writes hub_configs/plstm-state-tracking
    python benchmarks/bench_state_tracking.py --fast                # small, writes nothing

The word problem of S3 (pLSTM, arXiv 2506.11997, section 3.1): after every letter, a language model of one layer says
the product of the letters so far. Both kinds are the same model but for `transition_dim`, 4 or 1. Words have 32
letters in training, at first fewer, and are new in every step; the learning rate of each kind is the one with the best
accuracy on held-out words of 32 letters. Accuracy counts all letters of a word; chance is 1/6.
"""

import argparse
import json
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from torch import nn

from undersong.data.state_tracking import permutation_words
from undersong.hub.cards import model_card
from undersong.modeling.plstm.configuration_plstm import PLSTMConfig
from undersong.modeling.plstm.modeling_plstm import PLSTMForCausalLM

RESULTS = Path(__file__).parent / "results"
FOLDER = Path(__file__).parents[1] / "hub_configs" / "plstm-state-tracking"
KINDS = {"matrices": 4, "numbers": 1}
CHECK_EVERY, WARMUP, VALIDATION, TEST = 100, 50, 10_000, 20_000  # the last two are seeds


@dataclass(frozen=True)
class Setting:
    hidden_size: int = 64
    length: int = 32
    batch: int = 32
    steps: int = 2500
    growing_steps: int = 1200  # from words of 4 letters to `length`
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    lengths: tuple[int, ...] = (32, 64, 128, 256)
    rows: int = 256


FULL = Setting()
FAST = Setting(hidden_size=32, length=8, steps=60, growing_steps=40, learning_rates=(3e-3,), lengths=(8, 32), rows=32)


def build(kind, setting):
    return PLSTMForCausalLM(
        PLSTMConfig(
            vocab_size=7,
            hidden_size=setting.hidden_size,
            num_hidden_layers=1,
            num_attention_heads=2,
            transition_dim=KINDS[kind],
            conv_kernel=1,
            logit_softcap=None,
            bos_token_id=6,
            eos_token_id=None,
        )
    )


@torch.no_grad()
def accuracy(model, setting, length, seed):
    """(of all letters, of the last one)"""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    ids, labels = permutation_words(setting.rows, length, generator=generator)
    right = model(ids[:, :-1], use_cache=False).logits.argmax(-1)[:, 1:] == labels[:, 2:]
    return right.float().mean().item(), right[:, -1].float().mean().item()


def train(kind, seed, learning_rate, setting, device, keep=None):
    """One model; prints as it goes, for it runs beside others."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build(kind, setting).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)

    def rate(step):
        return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / setting.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator(device).manual_seed(seed)
    start, history = time.perf_counter(), []
    for step in range(setting.steps):
        grown = 4 + (setting.length - 4) * step // setting.growing_steps
        ids, labels = permutation_words(setting.batch, min(grown, setting.length), generator=generator)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % CHECK_EVERY == 0:
            held_out = accuracy(model, setting, setting.length, VALIDATION)[0]
            history.append({"step": step + 1, "loss": loss.item(), "accuracy": held_out})
            print(f"{kind} {seed} {learning_rate:g}: {step + 1}, {loss.item():.4f}, {held_out:.3f}", flush=True)
    model.eval()
    tested = {length: accuracy(model, setting, length, TEST) for length in setting.lengths}
    if keep is not None:
        model.save_pretrained(keep)
    return {
        "kind": kind,
        "seed": seed,
        "learning_rate": learning_rate,
        "train_seconds": time.perf_counter() - start,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_accuracy": accuracy(model, setting, setting.length, VALIDATION)[0],
        "accuracy": {length: of_all for length, (of_all, _) in tested.items()},
        "accuracy_of_last": {length: of_last for length, (_, of_last) in tested.items()},
        "history": history,
    }


def summary(runs, setting):
    table = {}
    for kind in KINDS:
        own = [run["accuracy"] for run in runs if run["kind"] == kind]
        table[kind] = {length: statistics.mean(found[length] for found in own) for length in own[0]}
    far = 4 * setting.length
    gain = table["matrices"][far] - table["numbers"][far]
    return {"mean_accuracy": table, "acceptance": {f"matrices - numbers at {far} letters >= 0.2": gain}}


def write_card(setting, facts):
    """The card of the checkpoint, its numbers measured on the files as they are."""
    model = PLSTMForCausalLM.from_pretrained(FOLDER).eval()
    of = {"task_type": "text-generation", "dataset_type": "synthetic", "metric_type": "accuracy"}
    results = [
        of
        | {
            "dataset_name": f"products in words of S3, {length} letters",
            "dataset_args": {"length": length, "rows": setting.rows, "seed": TEST},
            "metric_value": round(accuracy(model, setting, length, TEST)[0], 4),
        }
        for length in setting.lengths
    ]
    numbers = {"hardware": facts["hardware"], "command": facts["command"], "results": results}
    card = model_card(
        model,
        results=numbers,
        repo_id="undersong/plstm-state-tracking",
        training_data=f"Words of up to {setting.length} permutations of three things, new in every step. Token 6"
        " begins a word, tokens 0 to 5 are the permutations in lexicographic order; the next token is their product.",
        limitations="A demonstration of state tracking that knows nothing else.",
    )
    (FOLDER / "README.md").write_text(str(card), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="models that train beside each other")
    parser.add_argument("--write-checkpoint", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting, device = (FAST if arguments.fast else FULL), arguments.device
    if arguments.fast:
        runs = [train(kind, 0, 3e-3, setting, device) for kind in KINDS]
        print(json.dumps(summary(runs, setting), indent=1))
        return
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        grid = [(kind, 0, rate) for kind in KINDS for rate in setting.learning_rates]
        tried = list(pool.map(train, *zip(*grid, strict=True), [setting] * len(grid), [device] * len(grid)))
        best = {
            kind: max((run for run in tried if run["kind"] == kind), key=lambda run: run["validation_accuracy"])
            for kind in KINDS
        }
        jobs = [(kind, seed, best[kind]["learning_rate"]) for seed in range(arguments.seeds) for kind in KINDS]
        keep = [FOLDER if arguments.write_checkpoint and job[:2] == ("matrices", 0) else None for job in jobs]
        runs = list(
            pool.map(train, *zip(*jobs, strict=True), [setting] * len(jobs), [device] * len(jobs), keep)
        )  # fmt: skip
    found = summary(runs, setting)
    print(json.dumps(found, indent=1), flush=True)
    record = harness.run_record("state_tracking", device)
    if arguments.write_checkpoint:
        write_card(setting, record)
    record |= {"setting": asdict(setting), "jobs": arguments.jobs, "tried": tried, "runs": runs} | found
    default = RESULTS / f"state_tracking_{torch.device(device).type}.json"
    harness.write_json(arguments.output or default, record)


if __name__ == "__main__":
    main()
