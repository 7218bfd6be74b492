"""What controlling the state of Mamba-2 costs: controlled_ssd against plain ssd, and against loops over chunks.

    python benchmarks/bench_state_control.py                 # writes benchmarks/results/state_control_<cpu|cuda>.json
    python benchmarks/bench_state_control.py --fast          # a smoke test on toy sizes, writes nothing

Inputs are those of a layer that starts to train, thresholds half the norms that the plain state ends with, so that the
control is at work. A loop calls a plain scan for each chunk of 128 tokens and controls the state between: once
transformers' scan, once ours. Its window is the difference of two plain states. All are checked against ours in
float64, which the tests hold against the recurrence token by token.
"""

from __future__ import annotations

import argparse

import torch
from bench_ssd import make
from harness import Benchmark, write_json
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from undersong.ops import selective_state_update, ssd
from undersong.ops.ssd_control import controlled_ssd

GRANULARITY = 128
WINDOW = 16 * GRANULARITY
SHAPES = {"cuda": [(1, 32768, 24, 64), (8, 32768, 24, 64)], "cpu": [(1, 32768, 4, 64)]}
FAST = (1, 512, 2, 16)
GOALS = {"plain": 1 / 1.1, "stock loop": 2.0}  # times as fast as each


def stock_scan(x, dt, A, B, C, D, dt_bias, h):
    return mamba2_chunk_scan(x, dt, A, B, C, GRANULARITY, D, dt_bias, h, True, return_final_states=True)


def our_scan(x, dt, A, B, C, D, dt_bias, h):
    return ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, initial_state=h, return_final_state=True)


def loop(scan, x, dt, A, B, C, D, dt_bias, threshold=None, window=None):
    """What one writes around a scan that knows no control."""
    batch, length, heads, head_dim = x.shape
    h = torch.zeros(batch, heads, head_dim, B.shape[3], device=x.device)
    outputs, plain, past, log = [], h, [h], [h.new_zeros(batch, heads)]
    for begin in range(0, length, GRANULARITY):
        at = slice(None), slice(begin, begin + GRANULARITY)
        y, end = scan(x[at], dt[at], A, B[at], C[at], D, dt_bias, h)
        outputs.append(y)
        if threshold is not None:
            norm = torch.linalg.vector_norm(end, dim=(2, 3))
            h = end * (threshold / norm).clamp(max=1)[..., None, None]
            continue
        step = (torch.nn.functional.softplus(dt[at].float() + dt_bias) * A).sum(1)
        plain, h = end + step.exp()[..., None, None] * (plain - h), end
        past.append(plain)
        log.append(log[-1] + step)
        if len(past) > window // GRANULARITY:
            past, log = past[-window // GRANULARITY - 1 :], log[-window // GRANULARITY - 1 :]
            h = plain - (log[-1] - log[0]).exp()[..., None, None] * past[0]
    return torch.cat(outputs, 1)


def ours(x, dt, A, B, C, D, dt_bias, **options):
    return controlled_ssd(x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True, granularity=GRANULARITY, **options)


def controls(inputs):
    """Thresholds by head and a window."""
    *_, state = our_scan(*inputs, None)
    return {"threshold": {"threshold": torch.linalg.vector_norm(state, dim=(2, 3)).mean(0) / 2},
            "window": {"window": WINDOW}}  # fmt: skip


def prefill(bench, shape, device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = [x.detach() for x in make(*shape, device, dtype)]
    double = [x.double() for x in inputs]
    x, dt, _, B, C, _, _ = inputs
    rows = {}
    for name, control in controls(inputs).items():
        calls = {
            "plain": lambda: our_scan(*inputs, None)[0],
            "controlled": lambda control=control: ours(*inputs, **control),
            "loop over ours": lambda control=control: loop(our_scan, *inputs, **control),
            "stock loop": lambda control=control: loop(stock_scan, *inputs, **control),
        }
        rows[name] = bench.add(
            f"{name} {list(shape)}", calls,
            reference=lambda control=control: ours(*double, **control, backend="torch"),
            tolerance=3e-2 if device == "cuda" else 1e-4, baseline="controlled",
            bytes=2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes, shape=shape,
            unchecked={"plain": "another function of the same inputs"},
        )  # fmt: skip
    return rows


def decode(bench, batch, heads, head_dim, device):
    """One token of a layer, the states written in place; 127 in 128 are no boundary, and neither is this one."""
    inputs = [x.detach() for x in make(batch, 2 * GRANULARITY, heads, head_dim, device)]
    token = [x[:, -1:] if x.dim() > 1 else x for x in inputs]
    x, dt, A, B, C, D, dt_bias = token
    position = torch.full((batch,), 2 * GRANULARITY, device=device)
    h = our_scan(*inputs, None)[1]
    one = x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, dt_bias, True
    rows = {}
    for name, control in controls(inputs).items():
        *_, state = ours(*inputs, **control, return_final_state=True)
        options = control | {"state": state, "position": position, "inplace": True}
        calls = {
            "plain": lambda: selective_state_update(h, *one, inplace=True)[0],
            "controlled": lambda options=options: ours(*token, **options),
        }
        reason = "its state moves in every call; the tests check steps"
        rows[name] = bench.add(f"{name}, one token, batch {batch}", calls, reference=[], tolerance=0,
                               baseline="controlled", unchecked=dict.fromkeys(calls, reason))  # fmt: skip
    return rows


def acceptance(table):
    """speedup: how many times as fast as ours the row is, of which the goals ask the reverse."""
    goals = {}
    for shape, rows in table.items():
        for control, row in rows.items():
            for peer, goal in GOALS.items():
                times = 1 / row[peer]["speedup"]
                goals[f"{control} {shape} against {peer}"] = {
                    "times_as_fast": times, "goal": goal, "met": times >= goal,
                }  # fmt: skip
    return goals


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--fast", action="store_true", help="toy sizes, writes nothing")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    bench = Benchmark("state_control", device=options.device, rounds=20, threads=options.threads)
    table = {}
    for shape in [FAST] if options.fast else SHAPES[options.device]:
        table[str(list(shape))] = prefill(bench, shape, options.device)
    for batch in (1,) if options.fast else (1, 64):
        decode(bench, batch, *((2, 16) if options.fast else (24, 64)), options.device)
    print(bench.table())
    record = bench.as_dict() | {"acceptance": acceptance(table)}
    print(record["acceptance"])
    if not options.fast:
        write_json(options.out or f"benchmarks/results/state_control_{options.device}.json", record)


if __name__ == "__main__":
    main()
