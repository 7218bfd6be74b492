"""The selective scan's kernel on a real GPU: exact at real sizes, no recompilation for lengths, one operator."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain, selective_scan

from .test_selective_scan_kernel import CASES, NAMES, assert_equal, evaluate, make_case

pytestmark = pytest.mark.gpu


def on_gpu(case):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_the_float64_reference(case, dtype):
    """float32 arithmetic throughout, but for the sums over channels in dB and dC, whose products are about as precise
    as the inputs."""
    case = on_gpu(make_case(case, 300, channels=160, size=16, dtype=dtype))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}[dtype]
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), tolerance)


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(1, 1, None), (96, 16, 3), (33, 5, None), (48, 64, None), (24, 128, 1)]
)
def test_any_number_of_channels_states_and_groups(channels, size, groups):
    case = on_gpu(make_case("state", 77, channels=channels, size=size, groups=groups))
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 2e-5)


def test_channels_first_memory_needs_no_copy():
    case = on_gpu(make_case("plain", 130, channels=64, size=16, dtype=torch.bfloat16))
    want = evaluate(case, "triton")
    for name in ("u", "delta", "z"):
        case[name] = case[name].mT.contiguous().mT
    got = evaluate(case, "triton")
    assert got["y"].mT.is_contiguous()
    assert_equal(got, want, 1e-6)


def test_auto_takes_the_kernel_and_runs_are_bit_identical():
    case = on_gpu(make_case("plain", 700, channels=256, size=16, dtype=torch.bfloat16))
    first = evaluate(case, "auto")
    assert explain()["selective_scan"].backend == "triton"
    for _ in range(5):
        assert all(torch.equal(x, first[name]) for name, x in evaluate(case, "auto").items())


def test_a_hundred_lengths_compile_nothing():
    def run(batch, length):
        evaluate(on_gpu(make_case("plain", length, batch=batch, channels=64, size=16, dtype=torch.bfloat16)), "triton")

    run(2, 100)
    package = _dispatch._KERNELS["state_space"].__name__
    modules = {name: sys.modules[f"{package}.scan_{name}"] for name in ("forward", "backward", "common")}
    kernels = modules["forward"].forward, modules["backward"].backward, modules["common"].gather

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    before = compiled()
    for n, length in enumerate(random.Random(0).sample(range(1, 3000), 100)):
        run(1 + n % 3, length)
    assert compiled() == before


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    case = on_gpu(make_case("plain", 100, channels=64, size=16, dtype=torch.bfloat16))
    leaves = [case[name].requires_grad_() for name in NAMES if name in case]

    def double():
        return selective_scan(**case) * 2

    got, want = torch.compile(double, fullgraph=True, backend="aot_eager")(), double()
    assert torch.equal(got, want)
    for x, y in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(x, y)
