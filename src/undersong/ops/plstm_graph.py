"""A linear recurrence along a directed acyclic graph, whose states live on the edges.

pLSTM ("parallelizable Linear Source Transition Mark networks", arXiv 2506.11997): a node writes its key and
value onto the edges that leave it (source), an edge's state goes on into the edges behind it (transition), and a node
reads the edges that enter it (mark). The state of an edge is a matrix `[heads, key_dim, value_dim]`, in float32.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_shape, computing_dtype, describe
from .line_graph import LineGraph

LOWERINGS = ("auto", "direct", "parallel")


def plstm_graph(Q, K, V, S, T, M, D, graph, *, lowering="auto", backend="auto"):
    """What every node reads of all nodes before it, over all paths of the graph.

    C_e = S_e k_u v_u^T + sum over edges e' into u of T_{e'e} C_{e'}       for every edge e from u to n
    y_n = sum over edges e into n of M_e (q_n C_e) + D_n (q_n . k_n) v_n

    Nothing is divided by the square root of the key width, unlike in the ops for sequences and grids.

    Args:
        Q, K: `[nodes, heads, key_dim]`, any float dtype.
        V: `[nodes, heads, value_dim]`.
        S, M: `[edges, heads]`, source and mark gates.
        T: `[lines, heads]`, transitions, in the order of `graph.line_index`.
        D: `[nodes, heads]`, direct gates.
        graph: a `LineGraph`, from `undersong.ops.line_graph.line_graph`.
        lowering: "direct" carries the states along the edges, step by step. "parallel" carries, instead of states,
            how much of every node of its graph an edge holds, which is less where graphs have fewer nodes than
            `key_dim * value_dim`; "auto" compares the two.
        backend: "auto", "reference" or "torch"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        `[nodes, heads, value_dim]` in V's dtype; computed in float32 (float64 if any input is).

    Raises:
        ValueError: shapes or devices disagree, an unknown lowering or backend.

    >>> from undersong.ops.line_graph import line_graph
    >>> path = line_graph(torch.tensor([[0, 1], [1, 2]]), 3)
    >>> one, value = torch.ones(3, 1, 1), torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    >>> gate = torch.ones(2, 1)
    >>> plstm_graph(one, one, value, gate, torch.full((1, 1), 0.5), gate, torch.zeros(3, 1), path).flatten()
    tensor([ 0.0000,  1.0000, 10.5000])
    """
    _validate(Q, K, V, S, T, M, D, graph, lowering, backend)
    return run(OP, backend, Q, K, V, S, T, M, D, graph, lowering)


def reference(Q, K, V, S, T, M, D, graph, lowering="auto"):
    """The equations, one edge after the other."""
    dtype, compute = V.dtype, computing_dtype(Q, K, V, S, T, M, D)
    Q, K, V, S, T, M, D = (x.to(compute) for x in (Q, K, V, S, T, M, D))
    edges = graph.edge_index.T.tolist()
    C = [S[e, :, None, None] * K[u, :, :, None] * V[u, :, None, :] for e, (u, _) in enumerate(edges)]
    for line, (before, after) in enumerate(graph.line_index.T.tolist()):
        C[after] = C[after] + T[line, :, None, None] * C[before]
    Y = list((D[..., None] * (Q * K).sum(-1, keepdim=True) * V).unbind())
    for e, (_, n) in enumerate(edges):
        Y[n] = Y[n] + M[e, :, None] * (Q[n, :, :, None] * C[e]).sum(1)
    return torch.stack(Y).to(dtype)


def torch_graph(Q, K, V, S, T, M, D, graph, lowering="auto"):
    """All edges of a step at once, over the whole batch of graphs."""
    dtype, compute = V.dtype, computing_dtype(Q, K, V, S, T, M, D)
    if lowering == "auto":
        lowering = "parallel" if graph.width <= K.shape[2] * V.shape[2] else "direct"
    with torch.autocast(Q.device.type, enabled=False):
        inputs = (x.to(compute) for x in (Q, K, V, S, T, M, D))
        return (_parallel if lowering == "parallel" else _direct)(*inputs, graph).to(dtype)


def _direct(Q, K, V, S, T, M, D, graph):
    tails, heads = graph.edge_index
    shape = (*Q.shape, V.shape[2])
    written = (K.unsqueeze(-1) * V.unsqueeze(-2)).flatten(2)
    C = carry(S.unsqueeze(-1) * written[tails], T, graph)
    read = C.new_zeros(shape).flatten(2).index_add(0, heads, M.unsqueeze(-1) * C).view(shape)
    return torch.einsum("nhk,nhkv->nhv", Q, read) + D.unsqueeze(-1) * (Q * K).sum(-1, keepdim=True) * V


def _parallel(Q, K, V, S, T, M, D, graph):
    """Y = (G * Q K^T) V for every graph, where G[n, s] is how much of what node s writes reaches node n."""
    tails, heads = graph.edge_index
    column = graph.node_slots % graph.width
    share = S.new_zeros(*S.shape, graph.width)
    share = carry(_put(share, column[tails], S), T, graph)
    G = share.new_zeros(*D.shape, graph.width).index_add(0, heads, M.unsqueeze(-1) * share)
    Q, K, V, G = (_by_graph(x, graph) for x in (Q, K, V, _put(G, column, D)))
    Y = ((Q @ K.mT) * G) @ V
    return Y.transpose(1, 2).flatten(0, 1)[graph.node_slots]


def _put(x, column, value):
    """x with `value` `[rows, heads]` added in the row's column."""
    return x.scatter_add(2, column[:, None, None].expand(*value.shape, 1), value.unsqueeze(-1))


def _by_graph(x, graph):
    """`[nodes, heads, width]` -> `[graphs, heads, nodes, width]`, zero behind a graph's last node."""
    padded = x.new_zeros(graph.num_graphs * graph.width, *x.shape[1:]).index_copy(0, graph.node_slots, x)
    return padded.view(graph.num_graphs, graph.width, *x.shape[1:]).transpose(1, 2)


def carry(X, T, graph):
    """C_e = X_e + sum over lines (e', e) of T_{e'e} C_{e'}, for X `[edges, heads, width]` and T `[lines, heads]`."""
    return _Carry.apply(X, T, graph) if graph.step_sizes else X


class _Carry(torch.autograd.Function):
    """With A the gradient of X, which runs the other way, and g that of C,

    A_e' = g_e' + sum over lines (e', e) of T_{e'e} A_e,      dT_{e'e} = A_e . C_{e'}

    One tensor of states serves all steps; recorded step by step, each would keep its own.
    """

    @staticmethod
    def forward(ctx, X, T, graph):
        C = X.clone()
        for before, after, t in graph.steps(*graph.line_index, T.unsqueeze(-1)):
            C.index_add_(0, after, C[before] * t)
        ctx.graph = graph
        ctx.save_for_backward(C, T)
        return C

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        C, T = ctx.saved_tensors
        A, dT = g.clone(), torch.empty_like(T)
        with torch.autocast(g.device.type, enabled=False):
            for before, after, t, dt in reversed(list(ctx.graph.steps(*ctx.graph.line_index, T.unsqueeze(-1), dT))):
                a = A[after]
                torch.sum(a * C[before], -1, out=dt)
                A.index_add_(0, before, a.mul_(t))
        return A, dT, None


def _validate(Q, K, V, S, T, M, D, graph, lowering, backend):
    if not isinstance(graph, LineGraph):
        raise ValueError(
            f"graph ({type(graph).__name__}) must be a LineGraph; use line_graph(edge_index, num_nodes) from"
            " undersong.ops.line_graph."
        )
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering ({lowering!r}) must be one of {', '.join(LOWERINGS)}.")
    if lowering != "auto" and backend not in ("auto", "torch"):
        raise ValueError(f'lowering ({lowering!r}) must be "auto" with backend={backend!r}; use backend="torch".')
    check_layout("K", K, "nodes, heads, key_dim")
    nodes, heads, key_dim = K.shape
    if nodes != graph.num_nodes:
        raise ValueError(
            f"K ({describe(K)}) has {nodes} nodes but graph has {graph.num_nodes}; build the graph with the num_nodes"
            " of K."
        )
    because = f"K is {describe(K)}"
    check_shape("Q", Q, "nodes, heads, key_dim", K.shape, because)
    check_layout("V", V, "nodes, heads, value_dim")
    check_shape("V", V, "nodes, heads, value_dim", (nodes, heads, V.shape[2]), because)
    check_shape("D", D, "nodes, heads", (nodes, heads), because)
    edges, lines = graph.edge_index.shape[1], graph.line_index.shape[1]
    for name, x in (("S", S), ("M", M)):
        check_shape(name, x, "edges, heads", (edges, heads), f"graph has {edges} edges and K is {describe(K)}")
    check_shape("T", T, "lines, heads", (lines, heads), f"graph has {lines} lines and K is {describe(K)}")
    given = {"Q": Q, "V": V, "S": S, "T": T, "M": M, "D": D, "graph": graph.edge_index}
    check_devices("K", K, given)


OP = register(Op(name="plstm_graph", reference=reference, torch=torch_graph))
