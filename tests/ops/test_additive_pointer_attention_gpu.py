"""The pointer scores' kernel on a real GPU: exact at real sizes, no recompilation for lengths, one operator."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain
from undersong.ops.additive_pointer_attention import additive_pointer_attention

from .test_additive_pointer_attention import MASKS, assert_equal, evaluate, make_case

pytestmark = pytest.mark.gpu


def on_gpu(*args, **options):
    inputs, mask = make_case(*args, **options)
    return tuple(x.cuda() for x in inputs), None if mask is None else mask.cuda()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 50, 50, 256), (8, 1, 50, 256), (3, 300, 37, 100), (2, 3, 700, 33)])
def test_kernel_equals_the_float64_definition(shape, dtype, mask):
    inputs, valid = on_gpu(*shape, mask, dtype=dtype)
    want = evaluate(inputs, valid, "reference", torch.float64)
    got = evaluate(inputs, valid, "triton")
    assert_equal({"logits": got["logits"]}, want, 1e-5)
    assert_equal(got, want, max(1e-5, torch.finfo(dtype).eps))


@pytest.mark.parametrize("scale", [1e-3, 0.1, 4.0, 30.0])
def test_precise_for_small_and_for_saturated_units(scale):
    inputs, _ = on_gpu(4, 40, 30, 128, scale=scale)
    assert_equal(evaluate(inputs, None, "triton"), evaluate(inputs, None, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize("far", [20.0, 30.0, 60.0, 1e30])
def test_a_step_far_below_the_others_is_exact_too(far):
    We = torch.tensor([far, far - 1.0, 0.5, -far], device="cuda").view(1, 4, 1)
    Wd = torch.tensor([-far + 1.0, 0.25, far], device="cuda").view(1, 3, 1)
    inputs = We, Wd, torch.ones(1, device="cuda")
    assert_equal(evaluate(inputs, None, "triton"), evaluate(inputs, None, "reference", torch.float64), 1e-5)


def test_nan_and_infinity_stay_where_they_are():
    (We, Wd, v), _ = on_gpu(2, 20, 20, 40)
    want = additive_pointer_attention(We, Wd, v)
    We[0, 3, 5], Wd[1, 7, 9], We[1, 2, 0] = torch.nan, torch.nan, torch.inf
    got = additive_pointer_attention(We, Wd, v)
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[0, :, 3] = hit[1, 7] = True
    assert torch.equal(got.isnan(), hit)
    hit[1, :, 2] = True
    torch.testing.assert_close(got[~hit], want[~hit], rtol=1e-5, atol=1e-5)


def test_auto_takes_the_kernel_and_runs_are_bit_identical():
    inputs, mask = on_gpu(16, 300, 50, 256, "right")
    first = evaluate(inputs, mask, "auto")
    assert explain()["additive_pointer_attention"].backend == "triton"
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(inputs, mask, "auto").items())


def test_memory_is_that_of_the_scores():
    (We, Wd, v), _ = on_gpu(64, 64, 64, 256)
    leaves = [x.requires_grad_() for x in (We, Wd, v)]
    evaluate(leaves, None, "triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(additive_pointer_attention(*leaves).sum(), leaves)
    assert torch.cuda.max_memory_allocated() - before < 4 * (3 * 64**3 + 4 * We.numel())


def test_a_hundred_lengths_compile_nothing():
    def run(batch, steps, n):
        evaluate(*on_gpu(batch, steps, n, 64, "left", dtype=torch.bfloat16), "triton")

    run(2, 100, 100)
    run(2, 1, 100)
    kernels = sys.modules[f"{_dispatch._KERNELS['pointer'].__name__}.kernels"]

    def compiled():
        found = (kernels.forward, kernels.backward)
        return sum(len(caches[0]) for kernel in found for caches in kernel.device_caches.values())

    before, rng = compiled(), random.Random(0)
    for i in range(100):
        run(1 + i % 3, rng.randint(1, 300), rng.randint(1, 300))
    assert compiled() == before


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    inputs, mask = on_gpu(4, 20, 30, 64)
    leaves = [x.requires_grad_() for x in inputs]

    def double(*x):
        return 2 * additive_pointer_attention(*x, mask=mask)

    got, want = torch.compile(double, fullgraph=True, backend="aot_eager")(*leaves), double(*leaves)
    assert torch.equal(got, want)
    for x, y in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(x, y)
