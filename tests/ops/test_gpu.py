"""The kernel on a real GPU: exact at real sizes, no recompilation for lengths, visible to torch.compile."""

import random

import pytest
import torch

from undersong.ops import cumulative_softmax_average, explain

from .test_cumulative_softmax_average import CASES, make_case

pytestmark = pytest.mark.gpu
NAME = "cumulative_softmax_average"


def to_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(to_gpu(item) for item in value)
    return {key: to_gpu(item) for key, item in value.items()} if isinstance(value, dict) else value


def outputs_and_gradients(s, v, options, backend, double):
    def leaf(x):
        return (x.detach().double() if double else x.detach().clone()).requires_grad_()

    s, v, options = leaf(s), leaf(v), dict(options)
    leaves = [s, v]
    if "initial_state" in options:
        m, u, w = options["initial_state"]
        u, w = leaf(u), leaf(w)
        leaves += [u, w]
        options["initial_state"] = m.double() if double else m, u, w
    o, (m, u, w) = cumulative_softmax_average(s, v, **options, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, u, w)]
    return [o, m, u, w, *torch.autograd.grad([o, u, w], leaves, upstream)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 65, 2300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_kernel_equals_the_float64_reference(case, length, dtype, tolerance):
    """Relative to each tensor's scale; float32 gradients carry the rounding of z near 80 (float32: 80 * 2^-24)."""
    s, v, options = to_gpu(make_case(case, length, dim=64, dtype=dtype))
    got = outputs_and_gradients(s, v, options, "triton", double=False)
    want = outputs_and_gradients(s, v, options, "reference", double=True)
    for name, x, y in zip(("o", "m", "u", "w", "ds", "dv", "du0", "dw0"), got, want, strict=False):
        x, y = x.detach().double(), y.detach()
        error = torch.where(x == y, 0.0, (x - y).abs()).max()
        scale = y[y.isfinite()].abs().max() if y.isfinite().any() else 1.0
        assert error <= tolerance * max(float(scale), 1e-30), f"{name} differs by {error:.3g} (scale {scale:.3g})"


def test_auto_takes_the_kernel_and_runs_are_bit_identical():
    s, v, _ = to_gpu(make_case("plain", 3000, dim=64, dtype=torch.bfloat16))
    first = cumulative_softmax_average(s, v)
    assert explain()[NAME].backend == "triton"
    for _ in range(20):
        assert torch.equal(cumulative_softmax_average(s, v), first)


def test_a_hundred_lengths_compile_nothing():
    from undersong.ops import _dispatch

    def run(length):
        s = torch.randn(2, length, 3, device="cuda", requires_grad=True)
        v = torch.randn(2, length, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        cumulative_softmax_average(s, v).sum().backward()

    run(100)
    import sys

    package = _dispatch._KERNELS[NAME].__name__
    kernels = [getattr(sys.modules[f"{package}.{name}"], name) for name in ("forward", "backward")]

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    before = compiled()
    for length in random.Random(0).sample(range(1, 5000), 100):
        run(length)
    assert compiled() == before


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    s, v, _ = to_gpu(make_case("plain", 300, dim=64, dtype=torch.bfloat16))
    s, v = s.requires_grad_(), v.requires_grad_()

    def double(s, v):
        return cumulative_softmax_average(s, v) * 2

    got = torch.compile(double, fullgraph=True, backend="aot_eager")(s, v)
    assert torch.equal(got, double(s, v))
    for x, y in zip(
        torch.autograd.grad(got.sum(), (s, v)), torch.autograd.grad(double(s, v).sum(), (s, v)), strict=True
    ):
        assert torch.equal(x, y)
