"""Speeds of `bench_rmoe.py`: the router's op, a training step with it, and the experts on a CPU."""

import torch
from harness import check
from rmoe_training import Job, Training

from undersong.modeling.rmoe.configuration_rmoe import RMoEConfig
from undersong.modeling.rmoe.modeling_rmoe import RMoEExperts
from undersong.ops._dispatch import available_backends
from undersong.ops.recurrent_router import recurrent_router, reference

SHAPES = {"64, 2 of 16": (64, 16, 2), "256, 8 of 64": (256, 64, 8)}  # router size, experts of a token, experts
TOKENS = (1, 16, 64, 256, 8192)
PEERS = ("eager", "torch.compile")
MANY_PAIRS = 1024  # batched_mm copies an expert's weights for each; more do not fit into memory


def routers(bench, tokens, backward_tokens):
    """The op on every backend that runs here, against its equations in eager torch and compiled."""
    backends = [name for name in available_backends("recurrent_router", bench.device) if name != "reference"]
    rows = {}
    for name, (size, experts, top_k) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, generator=generator):
            return torch.randn(shape, generator=generator).to(bench.device)

        cell = [normal(3 * size, size), normal(3 * size, size), normal(3 * size), normal(3 * size)]
        parameters = [p.mul_(size**-0.5).requires_grad_() for p in (*cell, normal(experts, size))]
        calls = {"eager": reference}
        if bench.on_gpu:
            torch.compiler.reset()  # a function is compiled for so many shapes and no more
            calls["torch.compile"] = torch.compile(reference, dynamic=False)
        for backend in backends:
            calls[backend] = lambda u, h, *w, backend=backend: recurrent_router(
                u, h, w[:4], w[4], top_k=w[5], norm_topk_prob=w[7], backend=backend
            )
        for count in tokens:
            inputs = [normal(count, size), normal(count, size), *(p.detach() for p in parameters)]
            exact = reference(*(t.double() for t in inputs), top_k, None, True)
            for who, call in calls.items():  # experts by their scores: of two that are as good, either may come first
                _, scores, _, chosen = call(*inputs, top_k, None, True)
                check(f"{who}'s experts", scores.gather(1, chosen), exact[1].gather(1, exact[3]), 1e-3)
            case = f"{name}, {count} tokens, forward"
            candidates = {who: lambda c=c, i=inputs, k=top_k: c(*i, k, None, True)[:3] for who, c in calls.items()}
            rows[case] = bench.add(case, candidates, reference=exact[:3], tolerance=1e-3, baseline="eager")
        for count in backward_tokens:
            inputs = [normal(count, size).requires_grad_(), normal(count, size).requires_grad_(), *parameters]
            upstream = normal(count, size), normal(count, experts)

            def both(call, inputs=inputs, upstream=upstream, top_k=top_k):
                h, scores, *_ = call(*inputs, top_k, None, True)
                return torch.autograd.grad((h, scores), inputs, [g.to(h) for g in upstream])

            exact = both(reference, [t.detach().double().requires_grad_() for t in inputs])
            case = f"{name}, {count} tokens, forward+backward"
            candidates = {who: lambda c=c, f=both: f(c) for who, c in calls.items()}
            rows[case] = bench.add(case, candidates, reference=exact, tolerance=1e-3, baseline="eager")
    return rows


def steps(bench, size):
    """A training step of RMoE and of the same model with linear routers: as it is called, and replayed on a GPU."""
    rows = {}
    why = dict.fromkeys(("rmoe", "linear"), "two models")
    trainings = {kind: Training(Job(kind, 0, 1e-3, 10_000), size, bench.device) for kind in why}
    calls = {"called": {kind: training.step for kind, training in trainings.items()}}
    if bench.on_gpu:
        recorded = {kind: Training(Job(kind, 0, 1e-3, 10_000), size, bench.device) for kind in why}
        for training in recorded.values():
            training.record()
        calls["replayed"] = {kind: training.graph.replay for kind, training in recorded.items()}
    for how, candidates in calls.items():
        rows[how] = bench.add(
            f"training step, {how}", candidates, reference=(), tolerance=0, unchecked=why, baseline="linear"
        )
    return rows


@torch.no_grad()
def experts(bench, hidden, width, count, top_k, tokens):
    """Our choice of how to compute experts against each of transformers' ways."""
    torch.manual_seed(0)
    config = RMoEConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_local_experts=count,
        num_experts_per_tok=top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    module = RMoEExperts(config)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    rows = {}
    for length in tokens:
        x = torch.randn(length, hidden)
        weights, chosen = torch.randn(length, count).softmax(-1).topk(top_k, -1)

        def call(how, x=x, chosen=chosen, weights=weights):
            config._experts_implementation = how
            return module(x, chosen, weights)

        ways = ["auto", "eager", "grouped_mm"] + ["batched_mm"] * (length * top_k <= MANY_PAIRS)
        rows[length] = bench.add(
            f"experts, {top_k} of {count}, {hidden} -> {width}, {length} tokens",
            {way: lambda w=way, f=call: f(w) for way in ways},
            reference=lambda f=call: f("eager"),
            tolerance=1e-4,
            baseline="auto",
        )
    return rows


def acceptance(found):
    """Goals with what was measured, as far as it was; `speedup` in the rows is over each case's baseline."""
    values = {}
    router = found.get("router", {})
    if any("torch.compile" in rows for rows in router.values()):  # goals of a GPU, where launches are what costs
        best = {case: {who: row["ms"] for who, row in rows.items()} for case, rows in router.items()}
        ours = {case: min(ms for who, ms in row.items() if who not in PEERS) for case, row in best.items()}
        few = [best[c]["eager"] / ours[c] for c in best if "forward+" not in c and tokens_of(c) <= 256]
        values["router, <= 256 tokens, times faster than eager, worst case"] = (min(few), ">=", 3.0)
        compiled = [
            best[c]["torch.compile"] / ours[c] for c in best if "torch.compile" in best[c] and tokens_of(c) > 256
        ]
        if compiled:
            values["router, 8192 tokens, times faster than torch.compile, worst case"] = (min(compiled), ">=", 1.0)
    for how, rows in found.get("steps", {}).items():
        values[f"training step, {how}, over the linear router's"] = (1 / rows["rmoe"]["speedup"], "<=", 1.08)
    for length, rows in found.get("experts", {}).items():
        # baseline "auto": a peer's speedup is what it would gain over us
        if length == 1:
            values["experts, tokens: 1, times faster than eager"] = (1 / rows["eager"]["speedup"], ">=", 2.0)
        gain = min(1 / row["speedup"] for way, row in rows.items() if way != "auto")
        values[f"experts, tokens: {length}, times faster than the best other"] = (gain, ">=", 1.0)
    return {
        what: {"goal": f"{sign} {goal}", "measured": x, "met": x >= goal if sign == ">=" else x <= goal}
        for what, (x, sign, goal) in values.items()
    }


def tokens_of(case):
    return int(case.split(", ")[2].split()[0])
