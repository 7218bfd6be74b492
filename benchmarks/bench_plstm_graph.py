"""pLSTM on graphs: a layer's recurrence against a loop over edges, and molecules against a message-passing network.

    python benchmarks/bench_plstm_graph.py --device cuda
    python benchmarks/bench_plstm_graph.py --device cpu              # speed only, a minute; one thread
    python benchmarks/bench_plstm_graph.py --device cpu --training   # training as well, hours
    python benchmarks/bench_plstm_graph.py --device cpu --fast       # a smoke run, writes nothing

Speed: `plstm_graph` over a batch of molecules and over one larger graph, forward and backward, beside the same
equations edge after edge. Outputs and gradients are checked against float64 first.

Training: is the donor conjugated with the acceptor (`undersong.data.synthetic_molecules`)? Chains of 4 to 10 bonds in
training and validation, longer ones in the tests. The peer is GINE (Hu et al. 2020, arXiv 1905.12265), written here:
sums over neighbours of relu(x + W e), then a feed-forward net, in as many layers and with as many parameters. A
regression on counts of atoms and bonds shows what needs no structure. Same data, steps and grid of learning rates; the
rate is chosen on validation, for its mean over the seeds, and the tests are read once for it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import harness
import torch
from torch import nn

from undersong.data.graph_collator import PLSTMGraphCollator
from undersong.data.synthetic_molecules import ATOMS, BONDS, SyntheticMolecules
from undersong.modeling.plstm_graph.configuration_plstm_graph import PLSTMGraphConfig
from undersong.modeling.plstm_graph.modeling_plstm_graph import PLSTMGraphForGraphClassification
from undersong.ops.line_graph import line_graph
from undersong.ops.plstm_graph import plstm_graph

HEADS, DIM = 4, 16
GOAL = 10.0  # times faster than the loop over edges, molecules, forward + backward
RATES, SEEDS, STEPS, BATCH = (1e-3, 2e-3, 4e-3), (0, 1, 2), 3000, 64
DISTANCES = {"validation": (4, 10), "test 4-10": (4, 10), "test 12-16": (12, 16), "test 18-24": (18, 24)}
GOALS = {"test 4-10": 0.95, "test 18-24, above GINE": 0.10}


# Speed


def molecules(number):
    config = PLSTMGraphConfig(node_feature_dim=len(ATOMS), edge_feature_dim=len(BONDS))
    batch = PLSTMGraphCollator(config)(list(SyntheticMolecules(number, seed=0)))
    return batch["edge_index"], len(batch["batch"]), batch["batch"]


def grid(side):
    node = torch.arange(side * side).view(side, side)
    edges = [torch.stack([a.flatten(), b.flatten()]) for a, b in ((node[:-1], node[1:]), (node[:, :-1], node[:, 1:]))]
    return torch.cat(edges, 1), side * side, None


def speed(bench, name, graph):
    generator = torch.Generator().manual_seed(0)
    (edges, lines), nodes = (graph.edge_index.shape[1], graph.line_index.shape[1]), graph.num_nodes
    shapes = [(nodes, HEADS, DIM)] * 3 + [(edges, HEADS), (lines, HEADS), (edges, HEADS), (nodes, HEADS)]
    leaves = [torch.randn(shape, generator=generator).to(bench.device) for shape in shapes]
    leaves[4] = leaves[4].tanh() / 2
    upstream = torch.randn(nodes, HEADS, DIM, generator=generator).to(bench.device)

    def both(tensors, **options):
        tensors = [x.detach().requires_grad_() for x in tensors]
        output = plstm_graph(*tensors, graph, **options)
        return output.detach(), *torch.autograd.grad(output, tensors, upstream.to(output))

    calls = {
        "undersong": lambda: both(leaves),
        "direct": lambda: both(leaves, lowering="direct"),
        "parallel": lambda: both(leaves, lowering="parallel"),
        "loop over edges": lambda: both(leaves, backend="reference"),
    }
    want = both([x.double() for x in leaves], backend="reference")
    facts = {"nodes": nodes, "edges": edges, "lines": lines, "steps": len(graph.step_sizes)}
    label = f"{name}, forward+backward"
    bench.add(label, calls, reference=want, tolerance=1e-4, baseline="loop over edges", **facts)


# Training


class GINE(nn.Module):
    """x <- x + MLP((1 + eps) x + sum over neighbours u of relu(x_u + W e)), largest over nodes, one linear layer."""

    def __init__(self, width, layers):
        super().__init__()
        self.embed = nn.Linear(len(ATOMS), width)
        self.edges = nn.ModuleList([nn.Linear(len(BONDS), width) for _ in range(layers)])
        self.epsilon = nn.Parameter(torch.zeros(layers))
        self.mlps = nn.ModuleList(
            [
                nn.Sequential(
                    nn.RMSNorm(width),
                    nn.Linear(width, 2 * width),
                    nn.GELU(),
                    nn.Linear(2 * width, width),
                )
                for _ in range(layers)
            ]
        )
        self.norm, self.classifier = nn.RMSNorm(width), nn.Linear(width, 2)

    def forward(self, batch):
        x = self.embed(batch["node_features"])
        tails, heads = torch.cat([batch["edge_index"], batch["edge_index"].flip(0)], 1)
        for epsilon, edge, mlp in zip(self.epsilon, self.edges, self.mlps, strict=True):
            e = edge(batch["edge_attr"])
            message = (x[tails] + torch.cat([e, e])).relu()
            x = x + mlp(((1 + epsilon) * x).index_add(0, heads, message))
        graphs = torch.zeros(int(batch["batch"][-1]) + 1, x.shape[1], dtype=x.dtype, device=x.device)
        index = batch["batch"].unsqueeze(1).expand_as(x)
        return self.classifier(graphs.scatter_reduce(0, index, self.norm(x), "amax", include_self=False))


def make(kind):
    config = PLSTMGraphConfig(
        node_feature_dim=len(ATOMS),
        edge_feature_dim=len(BONDS),
        hidden_size=32,
        num_hidden_layers=4,
        pooling="max",
        num_labels=2,
    )
    if kind == "pLSTM":
        model = PLSTMGraphForGraphClassification(config)
        return model, lambda batch: model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    model = GINE(width=56, layers=4)
    return model, model


def train(kind, rate, seed, batches, tests, steps):
    """One training; accuracies on all `tests`, seconds, parameters."""
    torch.manual_seed(seed)
    device = batches[0]["labels"].device
    model, logits = make(kind)
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    begin, losses = time.perf_counter(), []
    for step in range(steps):
        if step % len(batches) == 0:
            permutation = torch.randperm(len(batches), generator=order).tolist()
        batch = batches[permutation[step % len(batches)]]
        loss = nn.functional.cross_entropy(logits(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - begin
    model.eval()
    with torch.no_grad():
        found = {
            name: torch.cat([logits(x).argmax(-1) == x["labels"] for x in some]).float().mean().item()
            for name, some in tests.items()
        }
    curve = [round(part.mean().item(), 4) for part in torch.stack(losses).split(max(1, steps // 30))]
    print(f"{kind:<6} {rate:.0e} seed {seed}: {found} {seconds:.0f} s", flush=True)
    return found | {
        "learning_rate": rate,
        "seed": seed,
        "seconds": seconds,
        "loss": curve,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def collate(number, distance, seed, device):
    config = PLSTMGraphConfig(node_feature_dim=len(ATOMS), edge_feature_dim=len(BONDS))
    rows, joined = list(SyntheticMolecules(number, distance=distance, seed=seed)), PLSTMGraphCollator(config)
    batches = [joined(rows[begin : begin + BATCH]) for begin in range(0, number, BATCH)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in batches]


def counts_alone(batches, tests):
    """Logistic regression on how many atoms and bonds of each kind a molecule has."""

    def table(some):
        rows, labels = [], []
        for batch in some:
            graph = batch["batch"]
            atoms = torch.zeros(len(batch["labels"]), len(ATOMS), device=graph.device)
            bonds = torch.zeros(len(batch["labels"]), len(BONDS), device=graph.device)
            atoms.index_add_(0, graph, batch["node_features"])
            bonds.index_add_(0, graph[batch["edge_index"][0]], batch["edge_attr"])
            rows.append(torch.cat([atoms, bonds], 1))
            labels.append(batch["labels"])
        return torch.cat(rows), torch.cat(labels)

    (x, y), regression = table(batches), nn.Linear(len(ATOMS) + len(BONDS), 2).to(batches[0]["labels"].device)
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    optimizer = torch.optim.LBFGS(regression.parameters(), max_iter=200)

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(regression((x - mean) / scale), y)
        value.backward()
        return value

    optimizer.step(loss)
    found = {name: table(some) for name, some in tests.items()}
    with torch.no_grad():
        return {
            name: (regression((x - mean) / scale).argmax(-1) == y).float().mean().item()
            for name, (x, y) in found.items()
        }


def training(device, fast):
    rates, seeds, steps, size, tested = (
        (RATES[:1], SEEDS[:1], 4, 256, 64) if fast else (RATES, SEEDS, STEPS, 20480, 1024)
    )
    batches = collate(size, DISTANCES["validation"], 1, device)
    tests = {name: collate(tested, some, 2 + n, device) for n, (name, some) in enumerate(DISTANCES.items())}
    models = {}
    for kind in ("pLSTM", "GINE"):
        runs = [train(kind, rate, seed, batches, tests, steps) for rate in rates for seed in seeds]
        mean = {r: statistics.mean(x["validation"] for x in runs if x["learning_rate"] == r) for r in rates}
        best = max(mean, key=mean.get)
        chosen = [run for run in runs if run["learning_rate"] == best]
        figures = {name: statistics.mean(run[name] for run in chosen) for name in tests}
        models[kind] = {"learning_rate": best, "validation_mean": mean, "mean": figures, "runs": runs}
    ours, theirs = models["pLSTM"]["mean"], models["GINE"]["mean"]
    values = {
        "test 4-10": ours["test 4-10"],
        "test 18-24, above GINE": ours["test 18-24"] - theirs["test 18-24"],
    }
    figures = {name: {"value": value, "goal": GOALS[name]} for name, value in values.items()}
    return {"steps": steps, "batch": BATCH, "models": models, "counts_alone": counts_alone(batches, tests)}, figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--training", action="store_true", help="train on the CPU too")
    parser.add_argument("--fast", action="store_true", help="a smoke run, nothing written")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    bench = harness.Benchmark("plstm_graph", device=options.device, threads=None if on_gpu else 1, rounds=20)
    cases = {
        "64 molecules": molecules(4 if options.fast else 64),
        "a grid of 24 x 24": grid(4 if options.fast else 24),
    }
    for name, (edges, nodes, batch) in cases.items():
        batch = None if batch is None else batch.to(bench.device)
        speed(bench, name, line_graph(edges.to(bench.device), nodes, batch=batch))
    print(bench.table())
    ours = bench.cases[0]["candidates"]["undersong"]["speedup"]
    record = {"acceptance": {"molecules, times faster than a loop over edges": {"value": ours, "goal": GOAL}}}
    if on_gpu or options.training or options.fast:
        results, figures = training(bench.device, options.fast)
        record = {"training": results, "acceptance": record["acceptance"] | figures}
    for name, row in record["acceptance"].items():
        print(f"{name}: {row['value']:.3f} (goal {row['goal']})")
    if not options.fast:
        path = options.out or f"benchmarks/results/plstm_graph_{options.device}.json"
        harness.write_json(path, bench.as_dict() | record)


if __name__ == "__main__":
    main()
