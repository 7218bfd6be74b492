"""Which edge follows which, in which steps, and which lines make a multitree; against definitions by brute force."""

import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops.line_graph import acyclic_edges, find_lines, line_graph


@st.composite
def acyclic_graphs(draw):
    """(`[2, edges]` array, number of nodes): edges in any order, double edges, nodes without any, order shuffled."""
    nodes = draw(st.integers(1, 8))
    pairs = [(u, n) for u, n in product(range(nodes), repeat=2) if u < n]
    edges = draw(st.lists(st.sampled_from(pairs), max_size=14)) if pairs else []
    name = draw(st.permutations(range(nodes)))
    return np.array([(name[u], name[n]) for u, n in edges], np.int64).reshape(-1, 2).T, nodes


def all_pairs(edges):
    columns = edges.T.tolist()
    return {(a, b) for a, b in product(range(len(columns)), repeat=2) if columns[a][1] == columns[b][0]}


def path_counts(lines, edges):
    """[a, b] = number of paths from edge a to edge b along lines."""
    adjacency = np.zeros((edges, edges), np.int64)
    np.add.at(adjacency, tuple(lines), 1)
    power, total = np.eye(edges, dtype=np.int64), np.zeros((edges, edges), np.int64)
    for _ in range(edges):
        total, power = total + power, power @ adjacency
    return total


@settings(deadline=None, max_examples=100)
@given(acyclic_graphs())
def test_lines_are_all_pairs_of_consecutive_edges(case):
    edges, nodes = case
    lines, _, _ = find_lines(edges, nodes)
    assert sorted(map(tuple, lines.T.tolist())) == sorted(all_pairs(edges))


@settings(deadline=None, max_examples=100)
@given(acyclic_graphs())
def test_consecutive_lines_lie_in_rising_steps_in_both_directions(case):
    edges, nodes = case
    forward = line_graph(torch.from_numpy(edges), nodes)
    for graph in (forward, forward.reversed()):
        assert sum(graph.step_sizes) == graph.line_index.shape[1]
        assert 0 not in graph.step_sizes
        step = torch.repeat_interleave(torch.arange(len(graph.step_sizes)), torch.tensor(graph.step_sizes).long())
        for first, second in product(range(len(step)), repeat=2):
            if graph.line_index[1, first] == graph.line_index[0, second]:
                assert step[first] < step[second]
        for before, after in graph.line_index.T.tolist():
            assert graph.edge_index[1, before] == graph.edge_index[0, after]


@settings(deadline=None, max_examples=100)
@given(acyclic_graphs())
def test_the_number_of_steps_is_that_of_the_longest_path(case):
    edges, nodes = case
    lines, steps, _ = find_lines(edges, nodes)
    power, longest = np.eye(edges.shape[1], dtype=np.int64), 0
    adjacency = np.zeros((edges.shape[1],) * 2, np.int64)
    np.add.at(adjacency, tuple(lines), 1)
    while (power := power @ adjacency).any():
        longest += 1
    assert sorted(set(steps.tolist())) == list(range(longest))
    assert (np.diff(steps) >= 0).all()


@settings(deadline=None, max_examples=100)
@given(acyclic_graphs())
def test_the_chosen_lines_make_a_multitree_that_no_line_can_join(case):
    edges, nodes = case
    lines, _, taken = find_lines(edges, nodes)
    number = edges.shape[1]
    assert path_counts(lines[:, taken], number).max(initial=0) <= 1
    for line in np.flatnonzero(~taken):
        more = np.concatenate([lines[:, taken], lines[:, [line]]], 1)
        assert path_counts(more, number).max() > 1, f"line {lines[:, line]} could have been taken"


def test_a_diamond_keeps_one_of_the_two_ways_into_the_edge_behind_it():
    edges = np.array([[0, 1, 1, 2, 3, 4], [1, 2, 3, 4, 4, 5]])
    lines, steps, taken = find_lines(edges, 6)
    assert lines.tolist() == [[0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 5]]
    assert steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert taken.tolist() == [True] * 5 + [False]


def test_lines_of_ones_own_are_sorted_into_steps():
    edges = torch.tensor([[0, 1, 2, 1], [1, 2, 3, 3]])
    graph = line_graph(edges, 4, line_index=torch.tensor([[1, 0], [2, 1]]))
    assert graph.line_index.tolist() == [[0, 1], [1, 2]]
    assert graph.step_sizes == (1, 1)


def test_slots_pad_every_graph_to_the_largest():
    graph = line_graph(torch.empty(2, 0, dtype=torch.int64), 6, batch=torch.tensor([0, 0, 0, 1, 2, 2]))
    assert graph.node_slots.tolist() == [0, 1, 2, 3, 6, 7]
    assert (graph.num_graphs, graph.width, graph.step_sizes) == (3, 3, ())


def test_undirected_edges_go_up_once():
    edges, first = acyclic_edges(np.array([[3, 1, 0, 1, 3], [1, 3, 2, 0, 0]]))
    assert edges.tolist() == [[1, 0, 0, 0], [3, 2, 1, 3]]
    assert first.tolist() == [0, 2, 3, 4]


def tensor(*columns):
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: line_graph(tensor((0, 1), (1, 2), (2, 1)), 3), "directed cycle through node [12];"),
        (lambda: line_graph(tensor((0, 1), (1, 1)), 2), "directed cycle through node 1;"),
        (lambda: line_graph(tensor((0, 3)), 3), r"edge_index (from 0 to 3) must lie in [0, 3)"),
        (lambda: line_graph(tensor((0, -1)), 3), r"edge_index (from -1 to 0) must lie in [0, 3)"),
        (lambda: line_graph(torch.zeros(3, 2).long(), 3), "edge_index (int64 [3, 2]) must be an int64 [2, edges]"),
        (lambda: line_graph(torch.zeros(2, 2), 3), "edge_index (float32 [2, 2]) must be an int64 [2, edges]"),
        (
            lambda: line_graph(tensor((0, 1), (2, 3)), 4, line_index=tensor((0, 1))),
            "line_index joins edge 0, which ends at node 1, with edge 1, which begins at node 2;",
        ),
        (
            lambda: line_graph(tensor((0, 1), (1, 2)), 4, line_index=tensor((0, 2))),
            "line_index (from 0 to 2) must lie in [0, 2)",
        ),
        (
            lambda: line_graph(tensor((0, 1)), 2, line_index=torch.zeros(1, 2).long()),
            "line_index (int64 [1, 2]) must be an int64 [2, lines]",
        ),
        (lambda: line_graph(tensor((0, 1)), 2, batch=torch.tensor([1, 0])), "batch must not fall"),
        (lambda: line_graph(tensor((0, 1)), 2, batch=torch.zeros(3).long()), "batch (int64 [3]) must be an int64"),
        (lambda: acyclic_edges(np.array([[0, 2], [1, 2]])), "joins node 2 with itself (column 1)"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(call, message):
    pattern = message if "[12]" in message else re.escape(message)
    with pytest.raises(ValueError, match=pattern):
        call()
