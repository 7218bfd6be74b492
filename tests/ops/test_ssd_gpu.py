"""ssd on a real GPU: exact at real sizes, no recompilation for lengths, visible to torch.compile."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain, ssd

from .test_ssd import CASES, assert_equal, evaluate, make_case

pytestmark = pytest.mark.gpu


def on_gpu(case):
    return tuple({k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in part.items()} for part in case)


def check(case, tolerance):
    """The reference runs on the CPU: a loop over tokens waits for a GPU at every step."""
    got = {name: x.cpu() for name, x in evaluate(on_gpu(case), "triton").items()}
    want = evaluate(case, "torch", double=True)
    # evaluate draws its upstream gradients on the CPU and casts them: the same ones for both
    assert_equal(got, want, tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 64, 300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_equals_the_definition(case, length, dtype, tolerance):
    check(make_case(case, length, heads=4, head_dim=64, state=128, gate=True, dtype=dtype), tolerance)


@pytest.mark.parametrize(("head_dim", "state"), [(16, 16), (64, 256), (80, 48), (128, 64)])
def test_other_sizes(head_dim, state):
    case = make_case("state middle", 200, heads=2, groups=1, head_dim=head_dim, state=state, dtype=torch.bfloat16)
    check(case, 3e-2)


def test_sequences_cut_in_runs():
    """One head fills no device, so that long sequences are cut."""
    for case in ("state", "packed state"):
        check(make_case(case, 2500, batch=1, heads=1, groups=1, head_dim=64, state=64), 1e-4)


def inputs(batch, length, heads=8):
    normal = torch.randn
    x = normal(batch, length, heads, 64, device="cuda").bfloat16().requires_grad_()
    dt = normal(batch, length, heads, device="cuda").bfloat16().requires_grad_()
    A, D, bias = (normal(heads, device="cuda").requires_grad_() for _ in range(3))
    B, C = (normal(batch, length, 1, 128, device="cuda").bfloat16().requires_grad_() for _ in range(2))
    return x, dt, A, B, C, D, bias


def run(x, dt, A, B, C, D, bias, **options):
    return ssd(x, dt, -A.exp(), B, C, D, dt_bias=bias, dt_softplus=True, **options)


def test_auto_takes_the_kernel_and_gradients_are_bit_identical():
    leaves = inputs(2, 1000)
    y = run(*leaves)
    assert explain()["ssd"].backend == "triton"
    first = torch.autograd.grad(y.float().sum(), leaves)
    for _ in range(10):
        for a, b in zip(torch.autograd.grad(run(*leaves).float().sum(), leaves), first, strict=True):
            assert torch.equal(a, b)


def test_a_hundred_lengths_compile_nothing():
    def both(batch, length, masked):
        leaves = inputs(batch, length)
        mask = torch.rand(batch, length, device="cuda") > 0.2 if masked else None
        torch.autograd.grad(run(*leaves, mask=mask).float().sum(), leaves)

    for masked in (False, True):
        both(2, 100, masked)
    module = sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.ssd"]
    names = ("steps", "forward", "states", "backward_tokens", "backward_groups", "steps_backward")

    def compiled():
        kernels = [getattr(module, name) for name in names]
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    before, rng = compiled(), random.Random(0)
    for length in rng.sample(range(1, 5000), 100):
        both(rng.randint(1, 3), length, rng.random() < 0.5)
    assert compiled() == before


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    leaves = inputs(2, 300)

    def double(*leaves):
        return run(*leaves) * 2

    got, want = torch.compile(double, fullgraph=True, backend="aot_eager")(*leaves), double(*leaves)
    assert torch.equal(got, want)
    upstream = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        assert torch.equal(a, b)
