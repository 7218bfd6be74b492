"""The Triton kernels of the grid recurrence on a GPU: checked, exact, stable under new sizes, and quick to start."""

import pytest
import torch

from undersong.ops import explain, status
from undersong.ops.plstm2d import plstm2d

from .test_plstm2d import MODES, assert_all_close, make_case

pytestmark = pytest.mark.gpu


def on_gpu(case, dtype):
    return {
        name: tuple(x.cuda() for x in value) if isinstance(value, tuple) else value.to("cuda", dtype)
        for name, value in case.items()
    }


def evaluate(case, **options):
    leaves = {}
    for name, value in case.items():
        values = value if isinstance(value, tuple) else (value,)
        leaves |= {f"{name}{i}": x.detach().clone().requires_grad_() for i, x in enumerate(values)}
    given = {
        name: tuple(leaves[f"{name}{i}"] for i in range(len(value)))
        if isinstance(value, tuple)
        else leaves[f"{name}0"]
        for name, value in case.items()
    }
    y = plstm2d(*(given[name] for name in "QKVSTMD"), **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream, materialize_grads=True)
    return {"Y": y} | dict(zip(leaves, gradients, strict=True))


def in_float64(case):
    return {
        name: tuple(x.double() for x in value) if isinstance(value, tuple) else value.double()
        for name, value in case.items()
    }


def test_the_self_check_passes():
    row = next(row for row in status() if row["op"] == "plstm2d" and row["backend"] == "triton")
    assert row["available"], row
    assert row["cold_start_s"] < 20


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("grid", [(14, 14), (1, 9), (9, 1), (16, 32), (5, 64), (64, 7), (23, 19)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_equals_the_float64_lowering_with_gradients(kind, grid, dtype, tolerance):
    case = make_case(MODES[kind]["mode"], grid, batch=2, heads=3, key_dim=64, value_dim=48, dtype=torch.float32)
    case["T"] = tuple(x * 0.5 for x in case["T"])  # sums over all paths stay of the size of what is written
    case = on_gpu(case, dtype)
    got = evaluate(case, backend="triton", **MODES[kind])
    want = evaluate(in_float64(case), lowering="parallel", **MODES[kind])
    assert_all_close(got, {name: x.double() for name, x in want.items()}, tolerance)


def test_auto_takes_the_kernel_for_small_grids_and_torch_for_large_ones():
    for grid, backend in (((14, 14), "triton"), ((40, 40), "torch")):
        case = on_gpu(make_case("P", grid, batch=1, heads=1, dtype=torch.float32), torch.float32)
        plstm2d(*(case[name] for name in "QKVSTMD"))
        assert explain()["plstm2d"].backend == backend
