"""Batches of graphs for pLSTM: one graph of many parts, and the order in which its edges are walked through.

Graphs are not padded; they lie behind each other and are told apart by `batch`. What follows from the edges alone,
which edge goes on into which and in how many steps, is computed here, in the data loader's processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..modeling.plstm_graph.configuration_plstm_graph import PLSTMGraphConfig
from ..ops._validate import describe
from ..ops.line_graph import prepare_edges

__all__ = ["PLSTMGraphCollator"]

# What torch-geometric calls them.
_GEOMETRIC = {"node_features": "x", "edge_index": "edge_index", "edge_attr": "edge_attr", "labels": "y"}


@dataclass(frozen=True)
class PLSTMGraphCollator:
    """Joins graphs `{"node_features": [n, F], "edge_index": [2, e], "edge_attr": [e, F_e], "labels": ...}` to a batch.

    Instead of mappings, rows may be objects with the attributes `x`, `edge_index`, `edge_attr` and `y`, such as
    torch-geometric's `Data`. Tensors, arrays and lists are taken. `edge_attr` is left out if the configuration has no
    edge features; `labels`, a number or a vector per graph, may be missing from all rows.

    Args:
        config: the configuration of the model that reads the batch: `directed` and the widths of the features.

    Returns:
        When called with a list of rows: a dict of `labels` `[graphs, ...]`, `node_features` `[nodes, F]`,
        `edge_index` `[2, edges]` (acyclic, each edge once, nodes counted over the batch), `edge_attr`
        `[edges, F_e]`, `batch` `[nodes]`, and `line_index`, `line_steps` and `line_in_tree` for the model.

    Raises:
        ValueError: when called: a graph without nodes, features of other widths than the configuration has, nodes that
            there are not, a cycle of directed edges.

    >>> collate = PLSTMGraphCollator(PLSTMGraphConfig(node_feature_dim=1))
    >>> chain = {"node_features": [[0.0], [1.0], [2.0]], "edge_index": [[0, 1], [1, 2]], "labels": 1}
    >>> batch = collate([chain, chain])
    >>> batch["edge_index"].tolist(), batch["batch"].tolist(), batch["line_index"].tolist()
    ([[0, 1, 3, 4], [1, 2, 4, 5]], [0, 0, 0, 1, 1, 1], [[0, 2], [1, 3]])
    """

    config: PLSTMGraphConfig

    def __call__(self, rows: Sequence) -> dict[str, torch.Tensor]:
        rows = [_read(row) for row in rows]
        features, attributes, edges, lines, steps, in_tree = ([] for _ in range(6))
        num_nodes = num_edges = 0
        for number, row in enumerate(rows):
            nodes = _features(number, "node_features", row["node_features"], self.config.node_feature_dim)
            if len(nodes) == 0:
                raise ValueError(f"rows[{number}] has no nodes; drop it.")
            index = torch.as_tensor(row["edge_index"], dtype=torch.int64).reshape(2, -1)
            try:
                own_edges, kept, own_lines, own_steps, own_tree = prepare_edges(
                    index, len(nodes), directed=self.config.directed
                )
            except ValueError as error:
                raise ValueError(f"rows[{number}]: {error}") from None
            if self.config.edge_feature_dim:
                values = _features(number, "edge_attr", row["edge_attr"], self.config.edge_feature_dim)
                if len(values) != index.shape[1]:
                    raise ValueError(
                        f"rows[{number}]: edge_attr has {len(values)} rows but edge_index {index.shape[1]} columns;"
                        " give every edge its features."
                    )
                attributes.append(values[kept])
            features.append(nodes)
            edges.append(own_edges + num_nodes)
            lines.append(own_lines + num_edges)
            steps.append(own_steps)
            in_tree.append(own_tree)
            num_nodes, num_edges = num_nodes + len(nodes), num_edges + len(kept)
        steps, order = torch.cat(steps).sort(stable=True)
        batch = {}
        if any(row["labels"] is not None for row in rows):
            batch["labels"] = _labels(rows)  # first: the Trainer takes the batch size from the first tensor
        batch |= {"node_features": torch.cat(features), "edge_index": torch.cat(edges, 1)}
        if self.config.edge_feature_dim:
            batch["edge_attr"] = torch.cat(attributes)
        sizes = torch.tensor([len(nodes) for nodes in features])
        return batch | {
            "batch": torch.arange(len(rows)).repeat_interleave(sizes),
            "line_index": torch.cat(lines, 1)[:, order],
            "line_steps": steps,
            "line_in_tree": torch.cat(in_tree)[order],
        }


def _read(row):
    """The row as a dictionary with all four keys."""
    if isinstance(row, Mapping):
        return {name: row.get(name) for name in _GEOMETRIC}
    return {name: getattr(row, other, None) for name, other in _GEOMETRIC.items()}


def _labels(rows):
    values = []
    for number, row in enumerate(rows):
        if row["labels"] is None:
            raise ValueError(f"rows[{number}] has no labels, but other rows have; give labels to all rows or to none.")
        value = torch.as_tensor(row["labels"])
        values.append(value.flatten() if value.numel() > 1 else value.reshape(()))  # torch-geometric's y is [1]
        if values[number].shape != values[0].shape:
            raise ValueError(
                f"rows[{number}]: labels ({describe(value)}) must hold {values[0].numel()} numbers because those of"
                " rows[0] do."
            )
    return torch.stack(values)


def _features(number, name, value, width):
    if value is not None:
        value = torch.as_tensor(value)
        value = value if value.is_floating_point() else value.to(torch.get_default_dtype())
    if value is None or value.ndim != 2 or value.shape[1] != width:
        raise ValueError(
            f"rows[{number}]: {name} ({describe(value)}) must be [{name.split('_')[0]}s, {width}], as the"
            f" configuration says; use torch.nn.functional.one_hot for kinds."
        )
    return value
