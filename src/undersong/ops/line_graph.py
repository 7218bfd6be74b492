"""Directed graphs as what a state that lives on edges needs to know: which edge follows which, and in which steps.

pLSTM (arXiv 2506.11997) keeps its states on the edges of a directed acyclic graph, so its recurrence runs
along the line graph: the vertices are edges, and a *line* joins an edge into a node with an edge out of that node.
Lines are sorted into steps, so that whatever a line reads is complete when its step begins, for a whole batch of
graphs at once. Everything here is integer work in numpy, done once per batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ._validate import describe


@dataclass(frozen=True)
class LineGraph:
    """A batch of directed acyclic graphs, ready for `plstm_graph`; `line_graph` builds it.

    Attributes:
        edge_index: `[2, edges]` int64, tail and head of every edge.
        line_index: `[2, lines]` int64, the edge that comes in and the edge that goes out, in the order of the steps.
        step_sizes: how many lines each step takes; between two consecutive lines there is always a step's end.
        node_slots: `[nodes]` int64, the place of every node in `[graphs, width]`, graphs padded to the largest one.
        num_graphs, width: that shape.
    """

    edge_index: torch.Tensor
    line_index: torch.Tensor
    step_sizes: tuple[int, ...]
    node_slots: torch.Tensor
    num_graphs: int
    width: int

    @property
    def num_nodes(self):
        return len(self.node_slots)

    def steps(self, *tensors):
        """Zips the tensors `[lines, ...]`, each cut into its steps."""
        return zip(*(x.split(self.step_sizes) for x in tensors), strict=True)

    def reversed(self):
        """The same graphs with every edge, and so every line, turned round; edges keep their numbers, lines do not.

        What was last is first: two lines that follow each other still lie in different steps, in the right order.
        """
        return replace(
            self,
            edge_index=self.edge_index.flip(0),
            line_index=self.line_index.flip(0, 1),
            step_sizes=self.step_sizes[::-1],
        )


def line_graph(edge_index, num_nodes, *, line_index=None, line_steps=None, batch=None):
    """Prepares a batch of directed acyclic graphs for `plstm_graph`.

    Args:
        edge_index: `[2, edges]` int64, tail and head. Several edges between two nodes are several edges.
        num_nodes: nodes in all graphs together.
        line_index: `[2, lines]` int64, pairs of edges of which the first ends where the second begins; all such pairs
            if left out. The result holds them sorted.
        line_steps: `[lines]` int64 that rises, the steps of a `line_index` that comes from `find_lines`. Nothing of it
            is checked then.
        batch: `[nodes]` int64 that rises, the graph of every node; one graph if left out.

    Returns:
        A `LineGraph` on the device of `edge_index`.

    Raises:
        ValueError: indices that do not fit each other, or a directed cycle.

    >>> graph = line_graph(torch.tensor([[0, 1, 1], [1, 2, 3]]), 4)
    >>> graph.line_index.tolist(), graph.step_sizes
    ([[0, 0], [1, 2]], (2,))
    >>> graph.reversed().edge_index.tolist()
    [[1, 2, 3], [0, 1, 1]]
    """
    check_edges(edge_index, num_nodes)
    device = edge_index.device
    if line_steps is None:
        edges = edge_index.cpu().numpy()
        if line_index is None:
            lines = _all_lines(edges, num_nodes)
        else:
            _check_lines(line_index, edge_index)
            lines = line_index.cpu().numpy()
        lines, steps = _sorted_lines(lines, edges)
        line_index, line_steps = torch.from_numpy(lines).to(device), torch.from_numpy(steps)
    sizes = torch.bincount(line_steps).tolist()
    slots, num_graphs, width = _slots(batch, num_nodes, device)
    return LineGraph(edge_index, line_index, tuple(size for size in sizes if size), slots, num_graphs, width)


def find_lines(edge_index, num_nodes):
    """All lines of a directed acyclic graph, their steps, and a choice of them that makes a multitree.

    In a multitree at most one path leads from an edge to another, so that states stay bounded when every transition is
    at most 1 (the D mode of pLSTM). The choice walks through the edges in topological order and takes a line unless
    the edge that comes in shares an ancestor with a line taken before into the same edge.

    Args:
        edge_index: `[2, edges]` int64 tensor or array.
        num_nodes: number of nodes.

    Returns:
        `line_index` `[2, lines]` int64, sorted by `line_steps` `[lines]` int64, and `line_in_tree` `[lines]` bool, as
        arrays.

    Raises:
        ValueError: a directed cycle.

    >>> [x.tolist() for x in find_lines(np.array([[0, 0, 1, 2, 3], [1, 2, 3, 3, 4]]), 5)]
    [[[0, 1, 2, 3], [2, 3, 4, 4]], [0, 0, 1, 1], [True, True, True, True]]
    """
    edges = np.asarray(edge_index)
    lines, steps = _sorted_lines(_all_lines(edges, num_nodes), edges)
    ancestors = [1 << edge for edge in range(edges.shape[1])]  # sets of edges as bits, each edge in its own
    taken = np.zeros(len(steps), bool)
    for line, (before, after) in enumerate(lines.T.tolist()):
        if not ancestors[before] & ancestors[after]:
            ancestors[after] |= ancestors[before]
            taken[line] = True
    return lines, steps, taken


def acyclic_edges(edge_index):
    """Turns the edges of an undirected graph from the lower to the higher node; an edge given twice is kept once.

    Args:
        edge_index: `[2, edges]` int64 array, every edge in one direction or in both.

    Returns:
        `[2, kept]` int64, and `[kept]` int64, the first column of `edge_index` where each of them stood.

    Raises:
        ValueError: an edge from a node to itself.

    >>> [x.tolist() for x in acyclic_edges(np.array([[2, 0, 1], [0, 2, 2]]))]
    [[[0, 1], [2, 2]], [0, 2]]
    """
    edges = np.sort(np.asarray(edge_index), 0)
    loops = np.flatnonzero(edges[0] == edges[1])
    if len(loops):
        raise ValueError(
            f"edge_index joins node {edges[0, loops[0]]} with itself (column {loops[0]}), which has no direction;"
            " remove such edges."
        )
    _, first = np.unique(edges, axis=1, return_index=True)
    first.sort()
    return edges[:, first], first


def prepare_edges(edge_index, num_nodes, *, directed):
    """What `find_lines` says of a graph whose edges have been made acyclic, unless they are `directed` already.

    Args:
        edge_index: `[2, edges]` int64 tensor.

    Returns:
        Tensors on the CPU: the `[2, kept]` edges, the `[kept]` columns of `edge_index` they come from, `line_index`,
        `line_steps` and `line_in_tree`.

    Raises:
        ValueError: nodes that there are not, an edge from a node to itself, a directed cycle.

    >>> ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> [x.tolist() for x in prepare_edges(ring, 3, directed=False)]
    [[[0, 1, 0], [1, 2, 2]], [0, 1, 2], [[0], [1]], [0], [True]]
    """
    edge_index = edge_index.cpu()
    check_edges(edge_index, num_nodes)
    edges, kept = edge_index.numpy(), np.arange(edge_index.shape[1])
    if not directed:
        edges, kept = acyclic_edges(edges)
    return tuple(torch.from_numpy(x) for x in (edges, kept, *find_lines(edges, num_nodes)))


def check_edges(edge_index, num_nodes):
    if (
        not isinstance(edge_index, torch.Tensor)
        or edge_index.dtype != torch.int64
        or edge_index.dim() != 2
        or len(edge_index) != 2
    ):
        raise ValueError(
            f"edge_index ({describe(edge_index)}) must be an int64 [2, edges] of tails and heads; use"
            " torch.empty(2, 0, dtype=torch.int64) for no edges."
        )
    if edge_index.device.type == "cpu" and edge_index.numel():  # elsewhere, looking would wait for the device
        low, high = edge_index.min().item(), edge_index.max().item()
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"edge_index (from {low} to {high}) must lie in [0, {num_nodes}) because there are {num_nodes} nodes;"
                " nodes count from 0."
            )


def _check_lines(line_index, edge_index):
    if not isinstance(line_index, torch.Tensor) or line_index.dtype != torch.int64 or line_index.shape[:-1] != (2,):
        raise ValueError(f"line_index ({describe(line_index)}) must be an int64 [2, lines] of pairs of edges.")
    edges = edge_index.shape[1]
    if line_index.numel() and not 0 <= line_index.min() <= line_index.max() < edges:
        raise ValueError(
            f"line_index (from {line_index.min()} to {line_index.max()}) must lie in [0, {edges}) because there are"
            f" {edges} edges."
        )
    before, after = line_index
    apart = (edge_index[1, before] != edge_index[0, after]).nonzero().flatten().tolist()
    if apart:
        a, b = line_index[:, apart[0]].tolist()
        raise ValueError(
            f"line_index joins edge {a}, which ends at node {edge_index[1, a]}, with edge {b}, which begins at node"
            f" {edge_index[0, b]}; a line is an edge into a node and an edge out of the same node."
        )


def _all_lines(edges, num_nodes):
    """Every pair of an edge into a node and an edge out of it, `[2, lines]`."""
    into = np.argsort(edges[1], kind="stable")
    count = np.bincount(edges[1], minlength=num_nodes)
    begin = np.cumsum(count) - count
    tails = edges[0]
    after = np.repeat(np.arange(edges.shape[1]), count[tails])
    return np.stack([into[_ranges(begin[tails], count[tails])], after])


def _sorted_lines(lines, edges):
    """The lines by step, then by the edge that goes out; the step of a line is the depth of that edge."""
    depth = _depths(lines, edges)[lines[1]]
    order = np.lexsort([lines[0], lines[1], depth])
    return np.ascontiguousarray(lines[:, order]), depth[order] - 1


def _depths(lines, edges):
    """How many lines lead to every edge at most; whole generations at a time."""
    number = edges.shape[1]
    waits_for = np.bincount(lines[1], minlength=number)
    out_of = np.argsort(lines[0], kind="stable")
    count = np.bincount(lines[0], minlength=number)
    begin = np.cumsum(count) - count
    depth, generation, step = np.zeros(number, np.int64), np.flatnonzero(waits_for == 0), 0
    while len(generation):
        step += 1
        after = lines[1][out_of[_ranges(begin[generation], count[generation])]]
        depth[after] = step  # the last generation that leads to an edge has the last word
        np.subtract.at(waits_for, after, 1)
        after = np.unique(after)
        generation = after[waits_for[after] == 0]
    if waits_for.any():
        raise ValueError(
            f"edge_index has a directed cycle through node {edges[0, _edge_on_cycle(lines, waits_for > 0)]}; use an"
            " acyclic graph, or directed=False in the configuration, which turns edges from the lower to the higher"
            " node."
        )
    return depth


def _edge_on_cycle(lines, waiting):
    """Every edge that still waits, waits for another one; going back through them, one comes round."""
    both = waiting[lines[0]] & waiting[lines[1]]
    before = dict(zip(lines[1, both].tolist(), lines[0, both].tolist(), strict=True))
    edge = int(np.flatnonzero(waiting)[0])
    seen = set()
    while edge not in seen:
        seen.add(edge)
        edge = before[edge]
    return edge


def _ranges(begin, count):
    """begin[0], begin[0] + 1, ... (count[0] of them), begin[1], ..."""
    return np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count)


def _slots(batch, num_nodes, device):
    places = torch.arange(num_nodes, device=device)
    if batch is None:
        return places, 1, num_nodes
    if not isinstance(batch, torch.Tensor) or batch.dtype != torch.int64 or batch.shape != (num_nodes,):
        raise ValueError(
            f"batch ({describe(batch)}) must be an int64 [nodes] = [{num_nodes}], the graph of every node."
        )
    if batch.device.type == "cpu" and (batch[1:] < batch[:-1]).any():
        raise ValueError(
            "batch must not fall because nodes of a graph lie behind each other; sort the nodes by graph."
        )
    sizes = torch.bincount(batch)
    num_graphs, width = len(sizes), int(sizes.max())
    return batch * width + places - (sizes.cumsum(0) - sizes)[batch], num_graphs, width
