"""The recurrent router's kernels on a real GPU: exact at real sizes, no recompilation, no waiting, one operator."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain
from undersong.ops.recurrent_router import recurrent_router

from ..gpu import no_waiting
from .test_recurrent_router_kernel import NAMES, OUTPUTS, arguments, assert_equal, evaluate, make_case

pytestmark = pytest.mark.gpu
every_cell = pytest.mark.parametrize("kind", ["gru", "rnn"])
every_size = pytest.mark.parametrize(("size", "experts", "top_k"), [(256, 8, 2), (128, 64, 8), (72, 200, 33)])


def on_gpu(*args, **options):
    return {name: None if x is None else x.cuda() for name, x in make_case(*args, **options).items()}


def apart(case):
    """The same with scores so far apart that rounding does not change the choice."""
    tokens, experts = case["base"].shape
    case["base"] = torch.rand(tokens, experts, device="cuda").argsort(1).to(case["base"].dtype) / 4
    case["W2"] = case["W2"] / 32
    return case


def route(case, top_k=2, **options):
    return recurrent_router(*arguments(case), top_k=top_k, base=case["base"], **options)


@every_cell
@every_size
@pytest.mark.parametrize("tokens", [1, 16, 100, 1000, 8192])
@pytest.mark.parametrize("first", [True, False])
def test_results_equal_the_float64_definition(kind, size, experts, top_k, tokens, first):
    case = on_gpu(kind, tokens, size, experts, first=first, based=False)
    new, scores, weights, chosen = route(case, top_k, backend="triton")
    exact = {name: None if x is None else x.double() for name, x in case.items()}
    want_new, want_scores, want_weights, _ = route(exact, top_k, backend="reference")
    for got, want in ((new, want_new), (scores, want_scores), (weights, want_weights)):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())
    torch.testing.assert_close(scores.gather(1, chosen), scores.topk(top_k, 1).values, rtol=0, atol=1e-5)
    assert all(len(set(row)) == top_k for row in chosen.tolist())


@every_cell
@every_size
@pytest.mark.parametrize("tokens", [1, 200, 1000])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_float64_definition(kind, size, experts, top_k, tokens, norm, dtype):
    case = apart(on_gpu(kind, tokens, size, experts, dtype=dtype))
    got = evaluate(case, "triton", top_k, norm)
    want = evaluate(case, "reference", top_k, norm, double=True)
    assert_equal({name: got[name] for name in OUTPUTS}, {name: want[name] for name in OUTPUTS}, 1e-5)
    assert_equal(got, want, max(1e-4, torch.finfo(dtype).eps))


def test_auto_takes_the_kernel_and_runs_are_bit_identical():
    case = on_gpu("gru", 700, 128, 32)
    first = evaluate(case, "auto")
    assert explain()["recurrent_router"].backend == "triton"
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(case, "auto").items())


def test_a_row_does_not_depend_on_the_rows_beside_it():
    case = on_gpu("gru", 4000, 128, 32)
    whole = route(case)
    part = {name: x[1000:2000] if name in ("u", "h", "base") else x for name, x in case.items()}
    assert all(torch.equal(x, y[1000:2000]) for x, y in zip(route(part), whole, strict=True))


def test_a_repeated_launch_gives_what_the_first_gave():
    """The second launch of a kind skips Triton's own look at the arguments."""
    case = on_gpu("gru", 5, 64, 16)
    for change in ({}, {"h": None}, {"base": None}, {"u": case["u"].bfloat16()}):
        now = case | change
        want = route(now, backend="triton")
        other = {name: None if x is None else x.clone() for name, x in now.items()}
        assert all(torch.equal(x, y) for x, y in zip(route(other, backend="triton"), want, strict=True))
    shifted = torch.cat([case["u"].flatten()[:1], case["u"].flatten()])[1:].view(5, 64)  # not aligned to 16 bytes
    assert shifted.data_ptr() % 16
    want = route(case, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(route(case | {"u": shifted}), want, strict=True))


def test_a_hundred_numbers_of_tokens_compile_nothing():
    def run(tokens):
        evaluate(on_gpu("gru", tokens, 64, 16), "triton")

    run(3)
    run(1000)
    kernels = sys.modules[f"{_dispatch._KERNELS['recurrent_router'].__name__}.kernels"]
    functions = kernels.step, kernels.choose, kernels.choose_backward, kernels.step_backward

    def compiled():
        return sum(len(caches[0]) for kernel in functions for caches in kernel.device_caches.values())

    before, rng = compiled(), random.Random(0)
    for _ in range(100):
        run(rng.choice([1, 16, 17, 256, 257, rng.randint(1, 2000)]))
    assert compiled() == before


def test_the_host_never_waits_and_a_graph_holds_it():
    case = on_gpu("gru", 16, 128, 32)
    want = route(case)
    with no_waiting():
        route(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(case)
    case["u"].neg_()
    graph.replay()
    want_now = route(case)
    assert all(torch.equal(x, y) for x, y in zip(got, want_now, strict=True))
    assert not torch.equal(got[0], want[0])


def test_nan_stays_with_its_token():
    case = on_gpu("gru", 300, 64, 20)
    want = route(case, 3)
    case["u"][17, 3] = torch.nan
    new, scores, weights, experts = got = route(case, 3)
    assert all(x[17].isnan().all() for x in (new, scores, weights))
    assert experts.ge(0).all()
    assert experts.lt(20).all()
    others = torch.arange(300, device="cuda") != 17
    assert all(torch.equal(x[others], y[others]) for x, y in zip(got, want, strict=True))


def test_memory_is_that_of_the_results():
    case = on_gpu("gru", 8192, 256, 64)
    route(case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = route(case)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * sum(x.nbytes for x in results)


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    case = on_gpu("gru", 40, 64, 16)
    leaves = [x.requires_grad_() for x in case.values()]

    def loss(*leaves):
        new, scores, weights, _ = route(dict(zip(NAMES, leaves, strict=True)))
        return new.sum() + scores.square().sum() + weights[:, 0].sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
