"""The kernels on a real GPU: catalogues that the interpreter is too slow for, half precision, ties, determinism."""

import pytest
import torch

from undersong.ops import explain
from undersong.ops.linear_cross_entropy import linear_cross_entropy
from undersong.ops.topk_items import topk_items

pytestmark = pytest.mark.gpu


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "n", "d", "k"), [(1, 100_003, 128, 10), (33, 20_001, 64, 256), (257, 5000, 33, 1)])
def test_topk_of_a_large_catalogue(batch, n, d, k, dtype):
    h, E = normal(batch, d, dtype=dtype), normal(n, d, dtype=dtype, seed=1)
    exclude = torch.randint(-1, n, (batch, 100), device="cuda")
    scores, rows = topk_items(h, E, k, exclude=exclude, backend="triton")
    want, _ = topk_items(h.double(), E.double(), k, exclude=exclude, backend="reference")
    torch.testing.assert_close(scores.double(), want, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close((h[:, None].double() * E[rows].double()).sum(2), want, rtol=1e-4, atol=1e-3)
    assert not (rows[:, :, None] == exclude[:, None]).any()
    assert (rows.sort(1).values.diff(dim=1) > 0).all()


def test_ties_are_in_the_documented_order():
    n = 50_000
    _, rows = topk_items(torch.zeros(2, 16, device="cuda"), normal(n, 16), 200, backend="triton")
    mixed = (torch.arange(n, device="cuda") * 2654435761 % 2**32).argsort(descending=True)
    assert torch.equal(rows, mixed[None, :200].expand(2, -1))


def test_auto_takes_the_kernel_and_changing_sizes_do_not_compile_again():
    for n in range(1000, 1100, 7):
        topk_items(normal(3, 64), normal(n, 64), 10, exclude=torch.full((3, n % 13 + 1), -1, device="cuda"))
    assert explain()["topk_items"].backend == "triton"


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize(("tokens", "n", "d"), [(300, 10_007, 64), (65, 5000, 128), (129, 3001, 200)])
@pytest.mark.parametrize("biased", [False, True])
def test_cross_entropy_and_its_gradients(tokens, n, d, biased, dtype, tolerance):
    shapes = [(tokens, d), (n, d), *([(n,)] if biased else [])]
    leaves = [normal(*s, dtype=dtype, seed=i).mul(0.3).requires_grad_() for i, s in enumerate(shapes)]
    labels = torch.randint(n, (tokens,), device="cuda")
    labels[::5] = -100
    outcomes = []
    for backend, inputs in (("triton", leaves), ("reference", [x.detach().double().requires_grad_() for x in leaves])):
        bias = inputs[2] if biased else None
        loss = linear_cross_entropy(*inputs[:2], labels, bias=bias, label_smoothing=0.1, scale=2.0, backend=backend)
        outcomes.append([loss, *torch.autograd.grad(loss, inputs)])
    for got, want in zip(*outcomes, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_gradients_do_not_change_from_run_to_run():
    h, E = normal(300, 64).requires_grad_(), normal(9001, 64, seed=1).requires_grad_()
    labels = torch.randint(9001, (300,), device="cuda")
    first, second = (
        torch.autograd.grad(linear_cross_entropy(h, E, labels, backend="triton"), (h, E)) for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
