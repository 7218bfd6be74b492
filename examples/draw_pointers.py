"""Draw the hulls and round trips that pointer networks predict over the exact ones.

    python examples/draw_pointers.py            # writes pointers.png; about two minutes if it has to train first
    python examples/draw_pointers.py --fast

The models come from `hub_configs/`; where one is missing, a small one for 6 points is trained on the spot.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from transformers import BertConfig

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.data.geometry import ConvexHullDataset, TSPDataset
from undersong.metrics.hull.measures import hull_scores, polygon_ids
from undersong.metrics.tour.measures import tour_ids, tour_scores

FAST = "--fast" in sys.argv
HUB = Path(__file__).parents[1] / "hub_configs"
TASKS = {"hull": (ConvexHullDataset, polygon_ids), "tour": (TSPDataset, tour_ids)}


def trained(task):
    """A model of the task and the number of points it is to be shown."""
    folder = HUB / {"hull": "pointer-hull", "tour": "pointer-tsp"}[task]
    if folder.exists():
        return PointerNetworkForConditionalGeneration.from_pretrained(folder), 10
    torch.manual_seed(0)
    reader = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, vocab_size=1
    )
    reader.hidden_dropout_prob = reader.attention_probs_dropout_prob = 0.0
    config = PointerNetworkConfig(hidden_size=128, encoder_type="transformer", encoder_config=reader)
    model = PointerNetworkForConditionalGeneration(config)
    model.generation_config.task = task
    steps = 4 if FAST else 800
    data = TASKS[task][0](6, 6, size=20_000, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data), (128,))
        model(data.points[rows], labels=data.targets[rows].long()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, 6


def draw(axis, points, ids, exact):
    for corners, style in ((exact, {"color": "0.8", "linewidth": 6}), (ids, {"color": "tab:blue", "linewidth": 1.5})):
        way = points[torch.tensor([*corners, corners[0]]) - 1]
        axis.plot(*way.T, **style)
    axis.scatter(*points.T, color="black", s=12, zorder=3)
    axis.set(xticks=[], yticks=[], xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")


figure, axes = plt.subplots(2, 5, figsize=(12, 5))
right = {}
for line, (task, (dataset, read)) in zip(axes, TASKS.items(), strict=True):
    model, n = trained(task)
    data = dataset(n, n, size=100, seed=3)
    ids = model.eval().generate(data.points, attention_mask=torch.ones(100, n)).tolist()  # valid, by the model's task
    exact = [row.tolist() for row in data.targets]
    for index, axis in enumerate(line):
        draw(axis, data.points[index], read(ids[index]), read(exact[index]))
    if task == "hull":
        right[task] = hull_scores(ids, exact, data.points.numpy())["accuracy"]
        line[0].set_ylabel("hulls")
    else:
        right[task] = tour_scores(ids, exact, data.points.numpy())["gap"]
        line[0].set_ylabel("round trips")
figure.suptitle("exact (grey) and predicted (blue)")
figure.tight_layout()
figure.savefig("pointers.png", dpi=120)
print(
    f"pointers.png shows 5 of 100 instances each: {right['hull']:.0%} of the hulls are exactly right, and the round"
    f" trips are {right['tour']:.1%} longer than the shortest."
)
