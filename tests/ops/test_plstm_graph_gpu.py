"""On a CUDA device the op gives what the float64 equations give on the CPU, and a layer never waits for the device."""

import pytest
import torch

from undersong.ops.plstm_graph import plstm_graph

from ..gpu import no_waiting
from .test_plstm_graph import CASES, LOWERINGS, assert_equal, evaluate, line_graph, make_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_equations(case, lowering, dtype):
    edges, nodes, batch = CASES[case]
    graph = line_graph(edges, nodes, batch=batch)
    inputs = make_inputs(graph, dtype=dtype)
    want = evaluate([x.double() for x in inputs], graph, backend="reference")
    there = line_graph(edges.cuda(), nodes, batch=None if batch is None else batch.cuda())
    got = evaluate([x.cuda() for x in inputs], there, lowering=lowering)
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7  # one rounding of what is returned, one of what is compared
    assert_equal({name: x.cpu() for name, x in got.items()}, want, tolerance)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_nothing_waits_for_the_device(lowering):
    edges, nodes, batch = CASES["a batch"]
    graph = line_graph(edges.cuda(), nodes, batch=batch.cuda())
    inputs = [x.cuda().requires_grad_() for x in make_inputs(graph_on_cpu(), dtype=torch.float32)]
    plstm_graph(*inputs, graph, lowering=lowering).sum().backward()
    with no_waiting():
        plstm_graph(*inputs, graph, lowering=lowering).sum().backward()


def graph_on_cpu():
    edges, nodes, batch = CASES["a batch"]
    return line_graph(edges, nodes, batch=batch)
