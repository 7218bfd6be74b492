"""States on edges against sums over paths; both lowerings against the equations; then the op's own laws."""

import importlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops.line_graph import line_graph
from undersong.ops.plstm2d import plstm2d
from undersong.ops.plstm_graph import plstm_graph

pytestmark = pytest.mark.usefixtures("one_thread")
module = importlib.import_module("undersong.ops.plstm_graph")
NAMES = ("Q", "K", "V", "S", "T", "M", "D")
LOWERINGS = ("direct", "parallel")


def random_edges(nodes, edges, seed=0):
    """Edges of an acyclic graph whose nodes are numbered in no order; some twice, if there are many."""
    generator = torch.Generator().manual_seed(seed)
    if nodes < 2:
        return torch.empty(2, 0, dtype=torch.int64)
    u = torch.randint(0, nodes - 1, (edges,), generator=generator)
    n = u + 1 + (torch.rand(edges, generator=generator) * (nodes - 1 - u)).long()
    return torch.randperm(nodes, generator=generator)[torch.stack([u, n])]


def make_inputs(graph, heads=2, key_dim=3, value_dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    (edges, lines), nodes = (graph.edge_index.shape[1], graph.line_index.shape[1]), graph.num_nodes
    shapes = ((nodes, heads, key_dim),) * 2 + ((nodes, heads, value_dim),)
    shapes += ((edges, heads), (lines, heads), (edges, heads), (nodes, heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def evaluate(tensors, graph, autocast=False, **options):
    """Output and every gradient, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = plstm_graph(*leaves, graph, **options)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.bfloat16().to(output)  # the same numbers in every dtype
    gradients = torch.autograd.grad(output, leaves, upstream, materialize_grads=True)
    return {"Y": output} | {f"d{name}": x for name, x in zip(NAMES, gradients, strict=True)}


def assert_equal(got, want, tolerance):
    for name, x in got.items():
        y = want[name].double()
        assert x.shape == y.shape, name
        if x.numel():
            difference, scale = (x.double() - y).abs().max().item(), max(y.abs().max().item(), 1e-3)
            assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


def sum_over_paths(Q, K, V, S, T, M, D, graph):
    """The equations without a recurrence: one term for every path from a node to another."""
    Y = D[..., None] * (Q * K).sum(-1, keepdim=True) * V
    line_of = {tuple(pair): line for line, pair in enumerate(graph.line_index.T.tolist())}
    tails, heads = graph.edge_index.tolist()

    def extend(source, edge, weight):
        n = heads[edge]
        Y[n] += (weight * M[edge] * (Q[n] * K[source]).sum(-1))[:, None] * V[source]
        for (before, after), line in line_of.items():
            if before == edge:
                extend(source, after, weight * T[line])

    for edge, u in enumerate(tails):
        extend(u, edge, S[edge])
    return Y


CASES = {
    "many paths": (random_edges(9, 20), 9, None),
    "double edges": (random_edges(4, 9, seed=2), 4, None),
    "a path": (torch.stack([torch.arange(6), torch.arange(1, 7)]), 7, None),
    "one node": (random_edges(1, 0), 1, None),
    "no edges": (torch.empty(2, 0, dtype=torch.int64), 5, torch.tensor([0, 0, 1, 1, 1])),
    "no lines": (torch.tensor([[0, 0, 1], [2, 3, 3]]), 4, None),
    "a batch": (
        torch.cat([random_edges(5, 8), random_edges(7, 12, seed=3) + 5, torch.tensor([[13], [14]])], 1),
        15,
        torch.tensor([0] * 5 + [1] * 7 + [2] + [3] * 2),
    ),
}


@pytest.fixture(params=CASES, ids=lambda name: name.replace(" ", "-"))
def graph(request):
    edges, nodes, batch = CASES[request.param]
    return line_graph(edges, nodes, batch=batch)


@pytest.mark.parametrize("direction", ["forward", "reversed"])
def test_the_equations_are_a_sum_over_paths(graph, direction):
    graph = graph.reversed() if direction == "reversed" else graph
    inputs = make_inputs(graph)
    got = plstm_graph(*inputs, graph, backend="reference")
    assert_equal({"Y": got}, {"Y": sum_over_paths(*inputs, graph)}, 1e-12)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("direction", ["forward", "reversed"])
def test_lowerings_equal_the_equations(graph, direction, lowering):
    graph = graph.reversed() if direction == "reversed" else graph
    inputs = make_inputs(graph)
    want = evaluate(inputs, graph, backend="reference")
    assert_equal(evaluate(inputs, graph, backend="torch", lowering=lowering), want, 1e-12)
    single = [x.float() for x in inputs]
    assert_equal(evaluate(single, graph, backend="torch", lowering=lowering), want, 2e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_gradients_are_those_of_finite_differences(lowering):
    graph = line_graph(random_edges(5, 8), 5)
    inputs = [x.requires_grad_() for x in make_inputs(graph, heads=1, key_dim=2, value_dim=2)]
    assert torch.autograd.gradcheck(lambda *x: plstm_graph(*x, graph, lowering=lowering), inputs)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", ["P", "L", "R"])
@pytest.mark.parametrize("orientation", [0, 3], ids=["as it is", "both axes turned round"])
def test_on_a_grid_it_is_the_op_for_grids_times_the_root_of_the_key_width(orientation, kind, lowering):
    x, y, heads, key_dim = 3, 4, 2, 3
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(1, x, y, heads, *shape, generator=generator, dtype=torch.float64)

    def gates(number):  # of four orientations, the other three do nothing
        return [normal(4) * torch.eye(4, dtype=torch.float64)[orientation] for _ in range(number)]

    Q, K, V, D, S = normal(key_dim), normal(key_dim), normal(5), normal(), gates(2)
    T, M = (gates(2), gates(1)) if kind == "P" else (gates(3), gates(2))
    mode = {"mode": "P"} if kind == "P" else {"mode": "D", "chirality": kind}
    want = plstm2d(Q, K, V, S, T, M, D, **mode, backend="reference")[0].flatten(0, 1) * key_dim**0.5

    node = torch.arange(x * y).view(x, y)
    along_x = torch.stack([node[:-1].flatten(), node[1:].flatten()])
    along_y = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()])
    graph = line_graph(torch.cat([along_x, along_y], 1), x * y)
    graph = graph.reversed() if orientation else graph
    is_x = (torch.arange(graph.edge_index.shape[1]) < along_x.shape[1]).unsqueeze(-1)
    Q, K, V, D = (value[0].flatten(0, 1) for value in (Q, K, V, D))
    S, T, M = ([gate[0, ..., orientation].flatten(0, 1) for gate in some] for some in (S, T, M))
    zero = torch.zeros_like(S[0])
    T_rl, T_ru, T_du, T_dl = {
        "P": lambda r, d: (r, r, d, d),
        "L": lambda r, d, turn: (r, turn, d, zero),
        "R": lambda r, d, turn: (r, zero, d, turn),
    }[kind](*T)
    (tails, ends), (before, after) = graph.edge_index, graph.line_index
    transition = torch.where(is_x[before], torch.where(is_x[after], T_rl[tails[after]], T_dl[tails[after]]),
                             torch.where(is_x[after], T_ru[tails[after]], T_du[tails[after]]))  # fmt: skip
    source, mark = torch.where(is_x, S[0][tails], S[1][tails]), torch.where(is_x, M[0][ends], M[-1][ends])
    got = plstm_graph(Q, K, V, source, transition, mark, D, graph, lowering=lowering)
    assert_equal({"Y": got}, {"Y": want}, 1e-12)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_path_is_a_gated_linear_recurrence(lowering):
    """State C_t = T_t C_{t-1} + S_t k_t v_t^T, read before it is written: what pLSTM is on sequences."""
    length = 6
    graph = line_graph(torch.stack([torch.arange(length - 1), torch.arange(1, length)]), length)
    Q, K, V, S, T, M, D = make_inputs(graph)
    got = plstm_graph(Q, K, V, S, T, M, D, graph, lowering=lowering)
    C = torch.zeros(2, 3, 5, dtype=torch.float64)
    for t in range(length):
        written = K[t, :, :, None] * V[t, :, None]
        want = torch.einsum("hk,hkv->hv", Q[t], D[t, :, None, None] * written)
        if t:
            want = want + M[t - 1, :, None] * torch.einsum("hk,hkv->hv", Q[t], C)
        assert torch.allclose(got[t], want, atol=1e-12)
        if t < length - 1:
            C = (T[t - 1, :, None, None] * C if t else 0) + S[t, :, None, None] * written


@pytest.mark.parametrize("lowering", LOWERINGS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), nodes=st.integers(1, 9), edges=st.integers(0, 14))
def test_numbering_nodes_and_edges_otherwise_only_renumbers_the_output(lowering, seed, nodes, edges):
    index = random_edges(nodes, edges, seed)
    graph = line_graph(index, nodes)
    Q, K, V, S, T, M, D = make_inputs(graph, seed=seed)
    want = plstm_graph(Q, K, V, S, T, M, D, graph, lowering=lowering)
    generator = torch.Generator().manual_seed(seed)
    node, edge = torch.randperm(nodes, generator=generator), torch.randperm(index.shape[1], generator=generator)
    # new node i was node[i], new edge j was edge[j]
    other = line_graph(node.argsort()[index[:, edge]], nodes)
    place = {tuple(pair): line for line, pair in enumerate(graph.line_index.T.tolist())}
    lines = [place[tuple(pair)] for pair in edge[other.line_index].T.tolist()]
    got = plstm_graph(Q[node], K[node], V[node], S[edge], T[lines], M[edge], D[node], other, lowering=lowering)
    assert_equal({"Y": got}, {"Y": want[node]}, 1e-12)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_batch_is_its_graphs_one_by_one(lowering):
    index, nodes, batch = CASES["a batch"]
    graph = line_graph(index, nodes, batch=batch)
    inputs = make_inputs(graph)
    got = plstm_graph(*inputs, graph, lowering=lowering)
    Q, K, V, S, T, M, D = inputs
    for number in range(4):
        of_nodes = batch == number
        of_edges = of_nodes[index[0]]
        of_lines = of_edges[graph.line_index[0]]
        first = int(of_nodes.nonzero()[0])
        alone = line_graph(index[:, of_edges] - first, int(of_nodes.sum()))
        alone_inputs = Q[of_nodes], K[of_nodes], V[of_nodes], S[of_edges], T[of_lines], M[of_edges], D[of_nodes]
        want = plstm_graph(*alone_inputs, alone, lowering=lowering)
        assert_equal({"Y": got[of_nodes]}, {"Y": want}, 1e-12)


def test_states_of_a_multitree_stay_bounded_by_what_was_written():
    """D mode: with |T| <= 1 on a multitree, an edge holds no more than all sources together."""
    from undersong.ops.line_graph import find_lines

    index = random_edges(30, 120, seed=4)
    lines, steps, taken = (torch.from_numpy(x) for x in find_lines(index.numpy(), 30))
    one = torch.ones(30, 1, 1, dtype=torch.float64)
    ones = torch.ones(120, 1, dtype=torch.float64)
    largest = {}
    for name, kept in (("all lines", torch.ones_like(taken)), ("multitree", taken)):
        graph = line_graph(index, 30, line_index=lines[:, kept], line_steps=steps[kept])
        state = module.carry(ones.unsqueeze(-1), torch.ones(int(kept.sum()), 1, dtype=torch.float64), graph)
        largest[name] = state.max().item()
        assert (
            plstm_graph(one, one, one, ones, torch.ones(int(kept.sum()), 1), ones, one[..., 0], graph).isfinite().all()
        )
    assert largest["multitree"] <= 120
    assert largest["all lines"] > 10 * 120


def test_auto_takes_the_smaller_payload(monkeypatch):
    taken = []
    for name in LOWERINGS:
        monkeypatch.setattr(module, f"_{name}", lambda Q, *rest, name=name: taken.append(name) or rest[1])
    for nodes in (6, 7):
        graph = line_graph(random_edges(nodes, 8), nodes)
        plstm_graph(*make_inputs(graph, key_dim=2, value_dim=3), graph)
    assert taken == ["parallel", "direct"]


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_half_precision_computes_in_single_also_under_autocast(lowering):
    graph = line_graph(random_edges(9, 20), 9)
    inputs = make_inputs(graph, dtype=torch.bfloat16)
    want = evaluate([x.float() for x in inputs], graph, backend="reference")
    got = evaluate(inputs, graph, autocast=True, lowering=lowering)
    assert got["Y"].dtype == torch.bfloat16
    assert_equal(got, want, 2**-8)


def changed(**replaced):
    graph = line_graph(random_edges(5, 7), 5)
    inputs = dict(zip(NAMES, make_inputs(graph), strict=True)) | {"graph": graph} | replaced
    return lambda: plstm_graph(**inputs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (changed(graph=torch.zeros(2, 3)), "graph (Tensor) must be a LineGraph"),
        (changed(lowering="chunk"), "lowering ('chunk') must be one of auto, direct, parallel."),
        (changed(lowering="direct", backend="reference"), "lowering ('direct') must be \"auto\" with"),
        (changed(K=torch.zeros(6, 2, 3)), "K (float32 [6, 2, 3]) has 6 nodes but graph has 5;"),
        (changed(K=torch.zeros(5, 3)), "K (float32 [5, 3]) must be a float [nodes, heads, key_dim]"),
        (changed(Q=torch.zeros(5, 2, 4)), "Q (float32 [5, 2, 4]) must be a float [nodes, heads, key_dim] = [5, 2, 3]"),
        (changed(V=torch.zeros(5, 3, 5)), "V (float32 [5, 3, 5]) must be a float [nodes, heads, value_dim]"),
        (changed(S=torch.zeros(5, 2)), "S (float32 [5, 2]) must be a float [edges, heads] = [7, 2]"),
        (changed(M=torch.zeros(7, 2).long()), "M (int64 [7, 2]) must be a float [edges, heads] = [7, 2]"),
        (changed(T=torch.zeros(2, 2)), "T (float32 [2, 2]) must be a float [lines, heads]"),
        (changed(D=torch.zeros(5, 1)), "D (float32 [5, 1]) must be a float [nodes, heads] = [5, 2]"),
        (changed(Q=torch.zeros(5, 2, 3, device="meta")), "Q (meta) must be on the device of K (cpu)"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_do(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
