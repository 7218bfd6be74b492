"""The published pointer networks load with their task, and reach the figures of their cards."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong import PointerNetworkForConditionalGeneration
from undersong.data.geometry import ConvexHullDataset, TSPDataset
from undersong.metrics.hull.measures import hull_scores
from undersong.metrics.tour.measures import tour_scores

HUB = Path(__file__).parents[2] / "hub_configs"
ROWS = 300
REPOS = {
    "pointer-hull": ("hull", ConvexHullDataset, hull_scores, "exactly right", "accuracy"),
    "pointer-tsp": ("tour", TSPDataset, tour_scores, "length / shortest - 1, greedy", "gap"),
}


@pytest.mark.parametrize("repo", REPOS)
def test_a_published_pointer_network_keeps_what_its_card_says(repo):
    task, dataset, scores, name, key = REPOS[repo]
    model, info = PointerNetworkForConditionalGeneration.from_pretrained(HUB / repo, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.generation_config.task == task
    results = ModelCard.load(HUB / repo / "README.md").data.eval_results
    on_card = {r.dataset_name: r.metric_value for r in results if r.metric_name == name}
    for n in (5, 10):
        data = dataset(n, n, ROWS, seed=4_000)  # others than the card's
        with torch.no_grad():
            ids = model.generate(data.points, attention_mask=torch.ones(ROWS, n))
        found = scores(ids.tolist(), data.targets.tolist(), data.points.numpy())
        assert found.get("valid", found.get("simple")) > 0.97
        # four standard deviations of a share over 300 rows; gaps scatter far less
        assert found[key] == pytest.approx(on_card[f"{n} random points"], abs=0.1 if key == "accuracy" else 0.01)


def test_both_models_together_are_small():
    assert sum((HUB / repo / "model.safetensors").stat().st_size for repo in REPOS) <= 8e6
