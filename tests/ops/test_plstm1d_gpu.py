"""plstm1d on a real GPU: exact at real sizes, no recompilation for lengths, visible to torch.compile."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain
from undersong.ops.plstm1d import plstm1d

pytestmark = pytest.mark.gpu


def make(batch, length, heads=4, dim=128, dtype=torch.bfloat16, double=False):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn((batch, length, heads, *shape), generator=generator)

    x = [normal(dim, 1).to(dtype) for _ in range(3)]
    x += [normal(1, 1, 1).sigmoid(), torch.tanh(normal(1, 1) + 1), normal(1, 1, 1).sigmoid(), normal(1, 1, 1, 1)]
    return [(t.double() if double else t).cuda().requires_grad_() for t in x]


def outputs_and_gradients(x, **options):
    y, state = plstm1d(*x, return_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], x, upstream)]


@pytest.mark.parametrize("length", [1, 64, 300])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_equals_the_definition_in_float64(length, dim, dtype, tolerance):
    got = outputs_and_gradients(make(2, length, dim=dim, dtype=dtype), backend="triton")
    want = outputs_and_gradients(make(2, length, dim=dim, dtype=dtype, double=True), backend="torch")
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


def test_auto_takes_the_kernel_and_gradients_are_bit_identical():
    first, second = (outputs_and_gradients(make(2, 200)) for _ in range(2))
    assert explain()["plstm1d"].backend == "triton", explain()["plstm1d"].reason
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_lengths_and_batches_compile_nothing_new():
    outputs_and_gradients(make(2, 70))
    outputs_and_gradients(make(1, 71))
    package = _dispatch._KERNELS["plstm"].__name__
    kernels = sys.modules[f"{package}.plstm1d_kernels"]

    def compiled():
        return sum(
            len(cache[0]) for name in ("forward", "states", "tokens")
            for cache in getattr(kernels, name).device_caches.values()
        )  # fmt: skip

    before = compiled()
    rng = random.Random(0)
    for _ in range(30):
        outputs_and_gradients(make(rng.randint(1, 3), rng.randint(1, 400)))
    assert compiled() == before


def test_torch_compile_keeps_one_graph():
    x = make(2, 96)
    want = plstm1d(*x)
    got = torch.compile(plstm1d, fullgraph=True)(*x)
    torch.testing.assert_close(got, want)
