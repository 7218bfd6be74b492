"""lightnet_attention's kernels on a GPU: dtypes, sizes of real models, memory, recompilation, torch.compile."""

import sys

import pytest
import torch

from undersong.ops import _dispatch
from undersong.ops.lightnet_attention import lightnet_attention

from .test_lightnet_attention import assert_equal, evaluate, make_case

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 2e-2), torch.float16: (4e-3, 1e-2)}


def on_gpu(case):
    *tensors, options = case
    moved = {name: tuple(y.cuda() for y in x) if isinstance(x, tuple) else x.cuda() for name, x in options.items()}
    return *(x.cuda() for x in tensors), moved


def on_cpu(results):
    return {name: x.cpu() for name, x in results.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ["plain", "state middle", "packed state", "left"])
@pytest.mark.parametrize("spread", [2.0, 60.0])
def test_matches_reference(case, dtype, spread):
    """Random upstream gradients on the state too; keys that rise far are walked token by token."""
    *tensors, options = make_case(case, 200, spread=spread, dim=64, value_dim=48)
    rounded = *(x.to(dtype) for x in tensors), options
    got = evaluate_on_gpu(rounded, dtype)
    assert_equal(got, evaluate(rounded, "reference", torch.float64), *TOLERANCE[dtype])


def evaluate_on_gpu(case, dtype, causal=True):
    *tensors, options = on_gpu(case)
    # the upstream gradients are drawn on the CPU in both runs
    return on_cpu(evaluate((*tensors, options), "triton", dtype, causal))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ["plain", "middle", "packed"])
def test_without_order_matches_reference(case, dtype):
    *tensors, options = make_case(case, 300, spread=20.0, dim=128, value_dim=128)
    rounded = *(x.to(dtype) for x in tensors), options
    got = evaluate_on_gpu(rounded, dtype, causal=False)
    assert_equal(got, evaluate(rounded, "reference", torch.float64, causal=False), *TOLERANCE[dtype])


def inputs(batch, length, heads=8, dim=128, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, dim, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("causal", [True, False])
def test_no_float32_tensor_of_the_inputs_size_is_made(causal):
    q, k, v = inputs(2, 4096)
    out = lightnet_attention(q, k, v, causal=causal)
    torch.cuda.synchronize()
    del out
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = lightnet_attention(q, k, v, causal=causal)
    held = torch.cuda.max_memory_allocated() - before
    assert held < 2 * v.nbytes, f"{held / v.nbytes:.1f} times the size of v"  # the output, states and levels
    del out


@pytest.mark.parametrize("causal", [True, False])
def test_random_lengths_and_batches_compile_nothing_anew(causal):
    def run(batch, length):
        tensors = inputs(batch, length)
        out = lightnet_attention(*tensors, causal=causal, backend="triton")
        torch.autograd.grad(out, tensors, torch.ones_like(out))

    run(2, 300)
    before = compiled()
    for n in range(1, 60, 7):
        run(1 + n % 3, 17 * n + 1)
    assert compiled() == before


def compiled():
    package = _dispatch._KERNELS["lightnet"].__name__
    kernels = [getattr(sys.modules[f"{package}.{module}"], name) for module, name in (
        ("forward", "forward"), ("backward", "queries"), ("backward", "keys"), ("backward", "values"),
        ("bidirectional_kernels", "gather"), ("bidirectional_kernels", "read"), ("bidirectional_kernels", "spread"),
    )]  # fmt: skip
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())


@pytest.mark.parametrize("causal", [True, False])
def test_torch_compile_sees_one_operator(causal):
    q, k, v = inputs(1, 256)
    function = torch.compile(lambda *x: lightnet_attention(*x, causal=causal), fullgraph=True)
    lightnet_attention(q, k, v, causal=causal)  # the self-check
    torch.testing.assert_close(function(q, k, v), lightnet_attention(q, k, v, causal=causal))
