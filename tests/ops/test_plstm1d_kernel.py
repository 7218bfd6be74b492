"""The Triton kernels of plstm1d under Triton's interpreter, against the float64 definition."""

import importlib.util
import sys

import pytest
import torch

from undersong.ops import _dispatch
from undersong.ops.plstm1d import plstm1d

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="runs Triton's interpreter"
    ),
]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def kernel():
    x = torch.zeros(1, 1, 1, 1, 1)
    plstm1d(x, x, x, x[..., None], x, x[..., None], x[..., None, None], backend="triton")  # loads the package
    return sys.modules[f"{_dispatch._KERNELS['plstm'].__name__}.plstm1d"]


@pytest.fixture(autouse=True)
def small_chunks(kernel, monkeypatch):
    """Several chunks and blocks of values at sizes the interpreter can afford."""
    for name in ("CHUNK", "BLOCK_V"):
        monkeypatch.setattr(kernel, name, dict.fromkeys((True, False), 16))


def evaluate(length, backend, dtype=torch.float32, mask=None, state=False, double=False, DK=20, DV=24, strided=False):
    """Outputs and all gradients; transitions of both signs, every fifth of them zero."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape, rows=length):
        return torch.randn((2, rows, 2, *shape), generator=generator)

    x = [normal(DK, 1), normal(DK, 1), normal(DV, 1)]
    x = [t.to(dtype) for t in x] + [normal(1, 1, 1), torch.tanh(normal(1, 1)), normal(1, 1, 1), normal(1, 1, 1, 1)]
    x[4][:, 2::5] = 0
    x.append(normal(DK, DV, 1, rows=1)[:, 0] if state else None)
    upstream = normal(DV, 1), normal(DK, DV, 1, rows=1)[:, 0]
    if strided:  # [batch, heads, ..., length] in memory
        x = [t.movedim(1, -1).contiguous().movedim(-1, 1) for t in x[:-1]] + x[-1:]
    x = [None if t is None else (t.double() if double else t).requires_grad_() for t in x]
    y, last = plstm1d(*x[:-1], initial_state=x[-1], mask=mask, return_final_state=True, backend=backend)
    leaves = [t for t in x if t is not None]
    gradients = torch.autograd.grad(
        [y, last], leaves, [up.to(out) for up, out in zip(upstream, (y, last), strict=True)]
    )
    return [y, last, *gradients]


def check(length, tolerance=1e-5, **case):
    got, want = evaluate(length, "triton", **case), evaluate(length, "reference", double=True, **case)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, 16, 35])
def test_matches_the_definition(length, state):
    check(length, state=state)


@pytest.mark.parametrize("hidden", ["begin", "end", "middle"])
def test_padding_anywhere(hidden):
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[0, {"begin": slice(0, 17), "end": slice(20, 35), "middle": slice(7, 19)}[hidden]] = False
    mask[1, 2::3] = False
    check(35, mask=mask, state=True)


def test_sizes_of_more_than_one_block_and_not_of_whole_blocks():
    check(20, DK=33, DV=40)


def test_any_strides():
    check(20, strided=True)


def test_bfloat16():
    check(35, dtype=torch.bfloat16, state=True, tolerance=1e-2)


def test_a_state_nobody_needs_a_gradient_of():
    x = [torch.ones(1, 20, 1, *shape, requires_grad=True) for shape in ((4, 1), (4, 1), (4, 1), (1, 1, 1), (1, 1),
                                                                         (1, 1, 1), (1, 1, 1, 1))]  # fmt: skip
    results = []
    for backend in ("triton", "torch"):
        results.append(torch.autograd.grad(plstm1d(*x, backend=backend).sum(), x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64 inputs are computed in float64"),
        ({"JT": 2}, "the kernel takes T and gates that are numbers, got JT=2; use backend='torch'"),
        ({"DK": 257}, "the kernel takes DK up to 256, got 257"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "the kernel takes padded rows, got cu_seqlens"),
    ],
)
def test_what_the_kernel_refuses_is_named(change, message):
    JT, DK, cu_seqlens = change.get("JT", 1), change.get("DK", 4), change.get("cu_seqlens")
    shapes = (DK, 1), (DK, 1), (4, 1), (JT, 1, 1), (JT, JT), (1, 1, JT), (1, 1, 1, 1)
    x = [torch.ones(1, 3, 1, *shape, dtype=change.get("dtype", torch.float32)) for shape in shapes]
    with pytest.raises(RuntimeError, match=message):
        plstm1d(*x, cu_seqlens=cu_seqlens, backend="triton")
