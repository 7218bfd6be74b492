"""Induction heads at 8 times the length of training, and what is left of it when the gates do not see the input.

    python benchmarks/bench_induction_heads.py --device cuda   # about three minutes on a GPU
    python benchmarks/bench_induction_heads.py --fast          # two small models on a CPU, writes nothing

The task and the size are those of Gu and Dao, "Mamba" (arXiv 2312.00752, section 4.1.2): two layers of width 64, 16
tokens, rows of 256 that are new in every step; accuracy on rows of up to 16,384. "selective" is FastMambaForCausalLM
as it is. "fixed" is the same with a learned constant in place of `x_proj`, so that delta, B and C do not depend on the
input. Both train by the same rule: until held-out rows of the training length were all answered right at ten checks
in a row, or the budget ends. Longer rows have no say in when to stop.
"""

import argparse
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
from transformers import MambaConfig

from undersong import FastMambaForCausalLM, ops
from undersong.data.induction import induction_heads

RESULTS = Path(__file__).parent / "results"
CHECK_EVERY, PERFECT_CHECKS, WARMUP = 200, 10, 100
TOKENS_AT_ONCE = 1 << 20  # in evaluation


@dataclass(frozen=True)
class Setting:
    hidden_size: int = 64
    state_size: int = 16
    vocab_size: int = 16
    length: int = 256
    batch: int = 64
    learning_rate: float = 3e-3
    steps: int = 8000
    seconds: float = 75
    factors: tuple[float, ...] = (0.25, 1, 2, 4, 8, 16, 32, 64)  # of the training length
    rows: int = 512


FULL = Setting()
FAST = Setting(
    hidden_size=32,
    state_size=8,
    vocab_size=8,
    length=32,
    batch=32,
    steps=600,
    seconds=35,
    factors=(0.5, 1, 8),
    rows=256,
)


class Constant(nn.Module):
    """Takes the place of `x_proj`: (delta, B, C) are learned, and the same for every token."""

    def __init__(self, size):
        super().__init__()
        self.value = nn.Parameter(torch.randn(size))

    def forward(self, x):
        return self.value.to(x.dtype).expand(*x.shape[:-1], -1)


def build(kind, setting, device):
    config = MambaConfig(
        vocab_size=setting.vocab_size,
        hidden_size=setting.hidden_size,
        state_size=setting.state_size,
        num_hidden_layers=2,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = FastMambaForCausalLM(config)
    if kind == "fixed":
        for layer in model.backbone.layers:
            layer.mixer.x_proj = Constant(layer.mixer.x_proj.out_features)
    return model.to(device)


def answers(model, ids):
    """Logits at the place of the answer, without having read it."""
    return model(ids[:, :-1], logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def accuracy(model, setting, length, device, seed):
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    right, at_once = 0, max(1, min(setting.rows, TOKENS_AT_ONCE // length))
    for begin in range(0, setting.rows, at_once):
        count = min(at_once, setting.rows - begin)
        ids, _ = induction_heads(count, length, setting.vocab_size, generator=generator)
        right += (answers(model, ids).argmax(-1) == ids[:, -1]).sum().item()
    model.train()
    return right / setting.rows


def train(kind, seed, setting, device):
    """One model from its first step to its accuracies; prints as it goes, for it runs beside others."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = build(kind, setting, device)
    # No weight decay, on any weight: it keeps the gates from closing all the way, which long rows need.
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    generator = torch.Generator(device).manual_seed(seed)
    start, perfect, history = time.perf_counter(), 0, []
    for step in range(1, setting.steps + 1):
        ids, _ = induction_heads(setting.batch, setting.length, setting.vocab_size, generator=generator)
        loss = F.cross_entropy(answers(model, ids), ids[:, -1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        optimizer.zero_grad()
        if step % CHECK_EVERY == 0:
            seconds = time.perf_counter() - start
            held_out = accuracy(model, setting, setting.length, device, seed=10_000)
            perfect = perfect + 1 if held_out == 1.0 else 0
            history.append({"step": step, "loss": loss.item(), "accuracy": held_out})
            print(
                f"{kind} {seed}: step {step}, {seconds:.0f} s, loss {loss.item():.4f}, accuracy {held_out:.3f}",
                flush=True,
            )
            if perfect == PERFECT_CHECKS or seconds > setting.seconds:
                break
    seconds = time.perf_counter() - start
    lengths = [int(factor * setting.length) for factor in setting.factors]
    by_length = {length: accuracy(model, setting, length, device, seed=20_000) for length in lengths}
    print(f"{kind} {seed}: " + ", ".join(f"{n}: {share:.3f}" for n, share in by_length.items()), flush=True)
    return {
        "kind": kind,
        "seed": seed,
        "steps": step,
        "train_seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": by_length,
        "history": history,
        "paths": {name: dict(record.counts) for name, record in ops.explain().items() if record.counts},
    }


def summary(runs, setting):
    far = int(8 * setting.length)
    worst = min(run["accuracy"][far] for run in runs if run["kind"] == "selective")
    best = max(run["accuracy"][far] for run in runs if run["kind"] == "fixed")
    table = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        own = [run["accuracy"] for run in runs if run["kind"] == kind]
        table[kind] = {length: statistics.mean(accuracies[length] for accuracies in own) for length in own[0]}
    acceptance = {
        f"selective at {far} >= 0.95, worst seed": worst,
        f"fixed at {far} <= 0.5, best seed": best,
    }
    return {"mean_accuracy": table, "acceptance": acceptance}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=3, help="models that train beside each other")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    setting = FAST if arguments.fast else FULL
    if arguments.fast:
        runs = [train(kind, 0, setting, arguments.device) for kind in ("selective", "fixed")]
    else:
        jobs = [(kind, seed) for kind in ("selective", "fixed") for seed in range(arguments.seeds)]
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(train, *job, setting, arguments.device) for job in jobs]
            runs = [future.result() for future in futures]
    found = summary(runs, setting)
    print(json.dumps(found, indent=1), flush=True)
    if not arguments.fast:
        record = harness.run_record("induction_heads", arguments.device)
        record |= {"setting": asdict(setting), "jobs": arguments.jobs, "runs": runs} | found
        default = RESULTS / f"induction_heads_{torch.device(arguments.device).type}.json"
        harness.write_json(arguments.output or default, record)


if __name__ == "__main__":
    main()
