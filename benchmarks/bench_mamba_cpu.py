"""Mamba and Mamba-2 on the CPU against transformers' own classes without mamba-ssm, and Mamba's scan against mambapy.

    python benchmarks/bench_mamba_cpu.py             # two threads; writes benchmarks/results/mamba_cpu.json
    python benchmarks/bench_mamba_cpu.py --fast      # a smoke test on toy sizes, writes nothing
    python benchmarks/bench_mamba_cpu.py --only ops  # one part: ops, prefill, train, decode

mambapy is one more peer where it can be imported (`pip install --target FOLDER mambapy`, then PYTHONPATH=FOLDER).
Models have random weights in the shape of the 130m checkpoints. Transformers' backward pass of Mamba is quadratic in
the length, so it runs once, and trains two layers; time and memory of all 24 follow from those of two and of none.
Peak memory is what tensors held beyond the start of one call, from the profiler's record of the allocator.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from harness import MIN_ROUNDS, Benchmark, check, write_json
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba as stock
from transformers.utils import logging
from transformers.utils.import_utils import is_mambapy_available

from undersong import FastMamba2ForCausalLM, FastMambaForCausalLM
from undersong.ops import selective_scan, selective_state_update

LAYERS = 24
TRAINED = 2
CLASSES = {"mamba": (FastMambaForCausalLM, MambaForCausalLM), "mamba2": (FastMamba2ForCausalLM, Mamba2ForCausalLM)}
GOALS = {
    "scan forward, times faster than stock": 3,
    "scan forward+backward, times faster than stock": 100,
    "scan forward+backward, times faster than mambapy": 4,
    "scan forward+backward, memory over stock's": 1 / 4,
    "mamba prefill, times faster": 3,
    "mamba prefill, memory over stock's": 1 / 4,
    "mamba training step, times faster": 50,
    "mamba training step, memory over stock's": 1 / 4,
    "mamba decode in float32, times faster": 1.5,
    "mamba2 prefill, times faster": 2,
    "mamba2 prefill, memory over stock's": 1 / 4,
}


class Bench(Benchmark):
    """The harness, and rows for candidates that are too slow for its twenty rounds."""

    def few(self, case, candidates, rounds, memory=True, **info):
        """`rounds` {name: how often}, alternating while both last; the call that counts memory is the warm-up."""
        rows = {}
        for name, call in candidates.items():
            if memory:
                rows[name] = {"peak_bytes": self._peak_bytes(call)}
            else:
                call()
        samples = {name: [] for name in candidates}
        for n in range(max(rounds.values())):
            for name, call in candidates.items():
                if n < rounds[name]:
                    samples[name].append(self._sample(call))
        for name, times in samples.items():
            rows.setdefault(name, {})["ms"] = statistics.median(times) * 1e3
            rows[name] |= {"rounds": len(times), "min_ms": min(times) * 1e3}
        for row in rows.values():
            row["speedup"] = rows["stock"]["ms"] / row["ms"]
        self._record("steady", case, rows, info, baseline="stock")
        print(case, {n: f"{r['ms']:.4g} ms, {r['speedup']:.2f}x" for n, r in rows.items()}, flush=True)
        return rows


def normal(*shape):
    return torch.randn(shape, generator=normal.generator)


normal.generator = torch.Generator().manual_seed(0)


def ops(bench, length, channels, state):
    """The scan, forward and with gradients, and the step. Peers get [batch, channels, length], as they want it."""
    u, delta, z = normal(1, length, channels), normal(1, length, channels), normal(1, length, channels)
    A = -torch.arange(1.0, state + 1).repeat(channels, 1)
    B, C = normal(1, length, state), normal(1, length, state)
    D, bias = normal(channels), normal(channels) - 4
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]
    turned = [x.detach().mT.contiguous().requires_grad_() if x.dim() == 3 else x for x in inputs]
    upstream = normal(1, length, channels)

    def ours(tensors):
        return selective_scan(*tensors, delta_softplus=True)

    def peer(tensors, **which):
        return stock.mamba_selective_scan(*tensors, delta_softplus=True, **which).mT

    def forward(call, tensors):
        with torch.no_grad():
            return call(tensors)

    def both(call, tensors):
        y = call(tensors)
        found = torch.autograd.grad(y, tensors, upstream.to(y))
        return [y.detach(), *(g.mT if g.shape[-1] == length and g.dim() == 3 else g for g in found)]

    calls = {"ours": (ours, inputs)}
    if is_mambapy_available():
        calls["mambapy"] = (lambda tensors: peer(tensors, use_mambapy=True), turned)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    shape = f"[1, {length}, {channels}], state {state}"
    rows = {}
    rows["forward"] = bench.add(
        f"selective_scan {shape}, forward",
        {name: lambda c=c: forward(*c) for name, c in (calls | {"stock": (peer, turned)}).items()},
        reference=lambda: forward(ours, exact),
        tolerance=1e-4,
        baseline="stock",
    )
    candidates = {name: lambda c=c: both(*c) for name, c in calls.items()}
    rows["both"] = bench.add(
        f"selective_scan {shape}, forward+backward",
        candidates,
        reference=lambda: both(ours, exact),
        tolerance=1e-4,
        baseline="mambapy" if "mambapy" in calls else "ours",
    )
    rows["once"] = bench.few(
        f"selective_scan {shape}, forward+backward, stock once",
        {"ours": candidates["ours"], "stock": lambda: both(peer, turned)},
        {"ours": MIN_ROUNDS, "stock": 1},
    )
    held, step = normal(1, channels, state), [u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias]
    x, dt, A, B, C, D, z, bias = (t.detach() for t in step)
    theirs, mine = held.clone(), held.clone()
    exact = selective_state_update(held.double(), x, dt, A, B, C, D, z, bias, True)[0]
    check(
        "stock's step", stock.mamba_selective_state_update(held.clone(), x, dt, A, B, C, D, bias, True, z), exact, 1e-4
    )
    check("our step", selective_state_update(held, x, dt, A, B, C, D, z, bias, True)[0], exact, 1e-4)
    with torch.no_grad():
        bench.few(
            f"selective_state_update [1, {channels}], state {state}",
            {
                "ours": lambda: selective_state_update(mine, x, dt, A, B, C, D, z, bias, True, inplace=True),
                "stock": lambda: stock.mamba_selective_state_update(theirs, x, dt, A, B, C, D, bias, True, z),
            },
            {"ours": 200, "stock": 200},
        )
    return rows


def config(kind, layers, fast):
    shared = {"hidden_size": 64 if fast else 768, "num_hidden_layers": layers, "vocab_size": 101 if fast else 50280}
    shared |= {"eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": True}
    # as the authors initialise; transformers' 0.1 amplifies rounding from layer to layer past comparison
    shared |= {"initializer_range": 0.02}
    if kind == "mamba":
        return MambaConfig(**shared)
    return Mamba2Config(**shared, num_heads=shared["hidden_size"] // 32, head_dim=64, n_groups=1, state_size=128)


def pair(kind, layers, fast, dtype=torch.float32):
    """Ours and transformers' model of the same random weights, from one saved folder."""
    torch.manual_seed(0)
    made = CLASSES[kind][1](config(kind, layers, fast))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return {n: c.from_pretrained(folder, dtype=dtype).eval() for n, c in zip(("ours", "stock"), CLASSES[kind])}  # noqa: B905


def tokens(models, length):
    return torch.randint(1, models["ours"].config.vocab_size, (1, length), generator=normal.generator)


@torch.no_grad()
def prefill(bench, kind, length, layers, fast):
    """The prompt's pass of `generate()`: a cache is filled, and only the last token's logits are computed."""
    models = pair(kind, layers, fast)
    ids = tokens(models, length)
    calls = {n: lambda m=m: m(ids, use_cache=True, logits_to_keep=1).logits for n, m in models.items()}
    check(f"{kind} prefill", calls["ours"](), calls["stock"](), 1e-3)
    rows = bench.few(f"{kind} prefill of {length}, {layers} layers", calls, {"ours": 12, "stock": 4}, layers=layers)
    for row in rows.values():
        row["tokens_per_s"] = length / row["ms"] * 1e3
    return rows


def train(bench, kind, length, fast):
    """Forward with the loss, and backward, of TRAINED layers and of none."""
    found = {}
    for layers in (0, TRAINED):
        models = pair(kind, layers, fast)
        ids = tokens(models, length)

        def step(model, ids=ids):
            model.zero_grad()
            model.train()(ids, labels=ids, use_cache=False).loss.backward()

        found[layers] = bench.few(
            f"{kind} training step at length {length}, {layers} of {LAYERS} layers",
            {name: lambda m=model: step(m) for name, model in models.items()},
            {"ours": 8, "stock": 1 if layers and kind == "mamba" else 4},
            layers=layers,
        )
    rows = {}
    for name in ("ours", "stock"):
        none, some = found[0][name], found[TRAINED][name]
        rows[name] = {x: none[x] + (some[x] - none[x]) * LAYERS / TRAINED for x in ("ms", "peak_bytes")}
    for row in rows.values():
        row["speedup"] = rows["stock"]["ms"] / row["ms"]
    case = f"{kind} training step at length {length}, {LAYERS} layers, from those of 0 and {TRAINED}"
    bench._record("computed", case, rows, {}, baseline="stock")
    print(case, rows, flush=True)
    return rows


@torch.no_grad()
def decode(bench, kind, dtype, steps, layers, fast):
    """One token at a time after a prompt of 16, the models taking turns."""
    models = pair(kind, layers, fast, dtype)
    ids = tokens(models, 16)
    caches = {name: model(ids, use_cache=True).cache_params for name, model in models.items()}

    def step(name):
        return models[name](ids[:, -1:], cache_params=caches[name], use_cache=True, logits_to_keep=1).logits

    check(f"{kind} decode", step("ours"), step("stock"), 1e-3 if dtype == torch.float32 else 0.1)
    name = str(dtype).removeprefix("torch.")
    calls = {n: lambda n=n: step(n) for n in models}
    rows = bench.few(f"{kind} decode in {name}, {layers} layers", calls, dict.fromkeys(calls, steps), memory=False)
    for row in rows.values():
        row["tokens_per_s"] = 1e3 / row["ms"]
    return rows


def acceptance(found):
    """Goals with what was measured, as far as it was."""

    def memory(rows):
        return rows["ours"]["peak_bytes"] / rows["stock"]["peak_bytes"]

    values = {}
    if "ops" in found:
        rows = found["ops"]
        values["scan forward, times faster than stock"] = rows["forward"]["ours"]["speedup"]
        values["scan forward+backward, times faster than stock"] = rows["once"]["ours"]["speedup"]
        if "mambapy" in rows["both"]:
            values["scan forward+backward, times faster than mambapy"] = rows["both"]["ours"]["speedup"]
        values["scan forward+backward, memory over stock's"] = memory(rows["once"])
    for what, kinds in {"prefill": ("mamba", "mamba2"), "train": ("mamba",)}.items():
        for kind in kinds if what in found else ():
            rows, label = found[what][kind], f"{kind} {'training step' if what == 'train' else what}"
            values[f"{label}, times faster"] = rows["ours"]["speedup"]
            values[f"{label}, memory over stock's"] = memory(rows)
    if "decode" in found:
        values["mamba decode in float32, times faster"] = found["decode"]["mamba"]["float32"]["ours"]["speedup"]
    return {
        what: {"goal": GOALS[what], "measured": x, "met": x <= GOALS[what] if "memory" in what else x >= GOALS[what]}
        for what, x in values.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="toy sizes, nothing is written")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--only", choices=["ops", "prefill", "train", "decode"], help="one part, nothing is written")
    parser.add_argument("--out", default="benchmarks/results/mamba_cpu.json")
    options = parser.parse_args()
    fast = options.fast
    parts = [options.only] if options.only else ["ops", "prefill", "train", "decode"]
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers says at every first call that mamba-ssm is not there
    bench = Bench("mamba_cpu", device="cpu", rounds=MIN_ROUNDS, threads=2)
    begin = time.perf_counter()
    layers, found = 2 if fast else LAYERS, {}
    if "ops" in parts:
        found["ops"] = ops(bench, *(48, 64, 16) if fast else (512, 1536, 16))
    if "prefill" in parts:
        lengths = {"mamba": 48, "mamba2": 64} if fast else {"mamba": 512, "mamba2": 2048}
        found["prefill"] = {kind: prefill(bench, kind, n, layers, fast) for kind, n in lengths.items()}
    if "train" in parts:
        found["train"] = {kind: train(bench, kind, 48 if fast else 512, fast) for kind in CLASSES}
    if "decode" in parts:
        found["decode"] = {
            kind: {str(d).removeprefix("torch."): decode(bench, kind, d, 4 if fast else 40, layers, fast)
                   for d in (torch.float32, torch.bfloat16)}
            for kind in CLASSES
        }  # fmt: skip
    print(bench.table())
    record = bench.as_dict() | {"acceptance": acceptance(found)}
    for what, row in record["acceptance"].items():
        print(f"{what}: {row['measured']:.2f} (goal {row['goal']})")
    print(f"{time.perf_counter() - begin:.0f} s")
    if not fast and not options.only:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
