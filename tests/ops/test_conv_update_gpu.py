"""causal_conv1d, causal_conv1d_update and selective_state_update on a real GPU."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain
from undersong.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from undersong.ops.selective_state_update import selective_state_update

from ..gpu import no_waiting
from .test_conv_update_kernel import CASES, assert_equal, conv_case, evaluate, update_inputs

pytestmark = pytest.mark.gpu


def to_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, list):
        return [to_gpu(item) for item in value]
    return {k: to_gpu(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("length", "channels"), [(1, 64), (300, 96), (257, 70)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_convolution_equals_the_definition(case, length, channels, dtype, tolerance):
    inputs, options = to_gpu(list(conv_case(case, length, channels=channels, dtype=dtype)))
    got = evaluate(inputs, options, "triton")
    assert_equal(got, evaluate(inputs, options, "reference", double=True), tolerance)


@pytest.mark.parametrize("case", ["plain", "middle", "packed"])
def test_views_and_gradients_of_views(case):
    """[batch, channels, length] memory, as stock transformers hands over, and a half of a projection's output."""
    inputs, options = to_gpu(list(conv_case(case, 200, channels=64, dtype=torch.bfloat16)))
    x, weight, bias = inputs
    want = causal_conv1d(*inputs, "silu", **options)
    for view in (x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], 2)[..., 64:]):
        view = view.detach().requires_grad_()
        y = causal_conv1d(view, weight, bias, "silu", **options)
        assert torch.equal(y, want)
        upstream = torch.ones_like(y).transpose(1, 2).contiguous().transpose(1, 2)
        plain = x.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(causal_conv1d(plain, weight, bias, "silu", **options), plain, upstream)
        assert torch.equal(torch.autograd.grad(y, view, upstream)[0], expected)


def test_gradients_are_bit_identical():
    x, weight, bias = (torch.randn(s, device="cuda", requires_grad=True) for s in ((4, 1000, 192), (192, 4), (192,)))
    y = causal_conv1d(x, weight, bias, "silu")
    first = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True)
    assert explain()["causal_conv1d"].backend == "triton"
    for _ in range(10):
        for a, b in zip(torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["channels last", "time last"])
def test_a_hundred_lengths_compile_nothing(layout):
    weight = torch.randn(96, 4, device="cuda", requires_grad=True)

    def run(length, batch):
        x = torch.randn(batch, length, 96, device="cuda", dtype=torch.bfloat16)
        if layout == "time last":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        causal_conv1d(x.requires_grad_(), weight, None, "silu").sum().backward()

    def compiled():
        kernels = sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.conv_kernels"]
        found = [getattr(kernels, name) for name in ("forward", "backward")]
        return sum(len(caches[0]) for kernel in found for caches in kernel.device_caches.values())

    run(100, 2)
    before = compiled()
    for length in random.Random(0).sample(range(1, 3000), 100):
        run(length, 1 + length % 3)
    assert compiled() == before


@pytest.mark.parametrize(("kind", "groups"), [("mamba", 0), ("mamba", 2), ("mamba2", 1), ("mamba2", 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("n", [6, 16, 128])
def test_state_update_equals_the_definition(kind, groups, masked, inplace, n):
    inputs = to_gpu(update_inputs(kind, groups, n=n))
    mask = torch.tensor([True, False, True], device="cuda") if masked else None
    if masked:
        for name in ("x", "dt", "B", "C", "z"):
            inputs[name][1] = torch.nan
    want = selective_state_update(**inputs, mask=mask, backend="reference")
    got = selective_state_update(**inputs | {"state": inputs["state"].clone()}, mask=mask, inplace=inplace,
                                 backend="triton")  # fmt: skip
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_convolution_steps_equal_the_convolution(masked):
    x, weight, bias = torch.randn(8, 40, 1792).cuda(), torch.randn(1792, 4).cuda(), torch.randn(1792).cuda()
    mask = torch.rand(8, 40).cuda() > 0.3 if masked else None
    want, window = causal_conv1d(x, weight, bias, "silu", mask=mask, return_final_state=True)
    state = torch.zeros(8, 1792, 4, device="cuda")
    for t in range(40):
        seen = None if mask is None else mask[:, t].contiguous()
        y, state = causal_conv1d_update(x[:, t], state, weight, bias, "silu", mask=seen, inplace=True)
        torch.testing.assert_close(y, want[:, t], rtol=1e-5, atol=1e-5)
    assert torch.equal(state, window)


def test_steps_live_in_a_cuda_graph():
    """No host synchronisation, and the states move on in place with every replay."""
    inputs = to_gpu(update_inputs("mamba2"))
    x, weight = torch.randn(3, 12, device="cuda"), torch.randn(12, 4, device="cuda")
    window = torch.zeros(3, 12, 4, device="cuda")

    def step():
        causal_conv1d_update(x, window, weight, None, "silu", inplace=True)
        return selective_state_update(**inputs, inplace=True)[0]

    start = inputs["state"].clone()
    for _ in range(4):
        want = step()
    end = inputs["state"].clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    inputs["state"].copy_(start)
    window.zero_()
    with no_waiting():
        for _ in range(4):
            graph.replay()
    assert torch.equal(y, want)
    assert torch.equal(inputs["state"], end)
    assert torch.equal(window, x[:, :, None].expand(3, 12, 4))
