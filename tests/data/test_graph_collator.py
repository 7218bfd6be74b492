"""Batches of graphs: what the model needs, from mappings and from objects, and what is refused."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from undersong.data.graph_collator import PLSTMGraphCollator
from undersong.modeling.plstm_graph.configuration_plstm_graph import PLSTMGraphConfig
from undersong.ops.line_graph import find_lines

CONFIG = PLSTMGraphConfig(node_feature_dim=2, edge_feature_dim=1)
RING = {
    "node_features": [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    "edge_index": [[0, 1, 1, 2, 2, 0], [1, 0, 2, 1, 0, 2]],
    "edge_attr": [[1.0], [1.0], [2.0], [2.0], [3.0], [3.0]],
    "labels": 1,
}
PAIR = {"node_features": [[6.0, 7.0], [8.0, 9.0]], "edge_index": [[1], [0]], "edge_attr": [[4.0]], "labels": 0}
ALONE = {"node_features": [[1.0, 1.0]], "edge_index": [[], []], "edge_attr": np.zeros((0, 1)), "labels": 1}


def test_graphs_lie_behind_each_other_with_acyclic_edges():
    batch = PLSTMGraphCollator(CONFIG)([PAIR, RING, ALONE])
    assert batch["node_features"].tolist() == [*PAIR["node_features"], *RING["node_features"], [1.0, 1.0]]
    assert batch["batch"].tolist() == [0, 0, 1, 1, 1, 2]
    assert batch["edge_index"].tolist() == [[0, 2, 3, 2], [1, 3, 4, 4]]
    assert batch["edge_attr"].flatten().tolist() == [4.0, 1.0, 2.0, 3.0]
    assert batch["line_index"].tolist() == [[1], [2]]
    assert batch["labels"].tolist() == [0, 1, 1]
    assert next(iter(batch)) == "labels"  # whose length transformers' Trainer takes for the batch's


def test_lines_are_those_of_the_whole_batch():
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        pairs = generator.integers(0, 7, (2, 12))
        pairs = pairs[:, pairs[0] != pairs[1]]
        rows.append({"node_features": np.zeros((7, 2), np.float32), "edge_index": pairs})
    batch = PLSTMGraphCollator(PLSTMGraphConfig(node_feature_dim=2))(rows)
    lines, steps, in_tree = (torch.from_numpy(x) for x in find_lines(batch["edge_index"].numpy(), 35))

    def as_set(lines, steps, in_tree):
        return set(zip(*lines.tolist(), steps.tolist(), in_tree.tolist(), strict=True))

    got = batch["line_index"], batch["line_steps"], batch["line_in_tree"]
    assert as_set(*got) == as_set(lines, steps, in_tree)
    assert (batch["line_steps"].diff() >= 0).all()
    assert "labels" not in batch
    assert "edge_attr" not in batch


def test_objects_with_the_names_of_torch_geometric_are_rows():
    def data(row):
        return SimpleNamespace(
            x=torch.tensor(row["node_features"]),
            edge_index=torch.tensor(row["edge_index"]),
            edge_attr=torch.tensor(row["edge_attr"]),
            y=torch.tensor([row["labels"]]),
        )

    collate = PLSTMGraphCollator(CONFIG)
    want = collate([RING, PAIR])
    for name, value in collate([data(RING), data(PAIR)]).items():
        assert torch.equal(value, want[name]), name


def test_vectors_of_labels_are_stacked():
    rows = [PAIR | {"labels": torch.tensor([[0.5, 1.5]])}, RING | {"labels": torch.tensor([2.5, 3.5])}]
    assert PLSTMGraphCollator(CONFIG)(rows)["labels"].tolist() == [[0.5, 1.5], [2.5, 3.5]]


def test_directed_edges_stay_as_they_are():
    config = PLSTMGraphConfig(node_feature_dim=2, edge_feature_dim=1, directed=True)
    assert PLSTMGraphCollator(config)([PAIR])["edge_index"].tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node_features": torch.zeros(0, 2)}, "rows[1] has no nodes; drop it."),
        ({"node_features": [[1.0]]}, "rows[1]: node_features (float32 [1, 1]) must be [nodes, 2]"),
        ({"edge_attr": [[1.0, 2.0]]}, "rows[1]: edge_attr (float32 [1, 2]) must be [edges, 1]"),
        ({"edge_attr": None}, "rows[1]: edge_attr (NoneType) must be [edges, 1]"),
        ({"edge_attr": [[1.0], [2.0]]}, "rows[1]: edge_attr has 2 rows but edge_index 1 columns;"),
        ({"labels": None}, "rows[1] has no labels, but other rows have;"),
        ({"labels": torch.zeros(2)}, "rows[1]: labels (float32 [2]) must hold 1 numbers"),
        ({"edge_index": [[0], [2]]}, "rows[1]: edge_index (from 0 to 2) must lie in [0, 2)"),
        ({"edge_index": [[1], [1]]}, "rows[1]: edge_index joins node 1 with itself (column 0)"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_number(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PLSTMGraphCollator(CONFIG)([RING, PAIR | change])


def test_a_cycle_of_directed_edges_is_refused():
    config = PLSTMGraphConfig(node_feature_dim=2, edge_feature_dim=1, directed=True)
    with pytest.raises(ValueError, match=re.escape("rows[0]: edge_index has a directed cycle through node")):
        PLSTMGraphCollator(config)([RING])
