"""Every backend against all scores sorted; then the op's own laws."""

import importlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import _dispatch, explain
from undersong.ops.topk_items import topk_items

pytestmark = pytest.mark.usefixtures("one_thread")
module = importlib.import_module("undersong.ops.topk_items")
BACKENDS = [b for b in _dispatch.available_backends("topk_items") if b != "reference"]


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch):
    """Several pieces, spans and rounds also for small catalogues."""
    monkeypatch.setattr(module, "AT_ONCE", 256)
    monkeypatch.setattr(module, "SPAN", 256)
    if "triton" in BACKENDS:
        topk_items(torch.ones(1, 1), torch.ones(1, 1), 1, backend="triton")  # loads the package
        kernel = sys.modules[f"{_dispatch._KERNELS['recommendation'].__name__}.topk"]
        monkeypatch.setitem(kernel.SELECT, "WIDTH", 64)


def make_case(batch, n, d, seen=0, whole=False, dtype=torch.float32, seed=0):
    """(h, E) and options; `whole`: small integers, so that many scores are equal and every sum is exact."""
    generator = torch.Generator().manual_seed(seed)
    h, E = (torch.randn(rows, d, generator=generator) for rows in (batch, n))
    bias, allow = torch.randn(n, generator=generator), torch.rand(n, generator=generator) > 0.3
    h, E, bias = (x.round() if whole else x for x in (h, E, bias))
    options = {"exclude": torch.randint(-1, n, (batch, seen), generator=generator), "bias": bias, "allow": allow}
    return (h.to(dtype), E.to(dtype)), options if seen else {}


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], want[1])


# batch, N, d, k: one of each, more than a block, more than a piece and a span, fewer items than asked for
SHAPES = [(1, 1, 1, 1), (2, 70, 7, 5), (3, 600, 16, 10), (2, 9, 4, 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seen", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_equals_the_definition(shape, seen, whole, dtype):
    batch, n, d, k = shape
    tensors, options = make_case(batch, n, d, seen, whole, dtype)
    assert_same(topk_items(*tensors, k, **options), topk_items(*tensors, k, **options, backend="reference"))


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is off, or Triton is not installed")
@pytest.mark.parametrize(
    ("shape", "seen", "whole", "dtype"),
    [
        ((1, 1, 1, 1), 0, False, torch.float32),
        ((2, 70, 7, 5), 4, True, torch.float32),
        ((2, 150, 20, 3), 60, False, torch.bfloat16),
        ((1, 9, 4, 12), 4, False, torch.float16),
        ((17, 70, 5, 1), 3, True, torch.float32),
    ],
)
def test_the_kernel_equals_the_definition(shape, seen, whole, dtype):
    batch, n, d, k = shape
    tensors, options = make_case(batch, n, d, seen, whole, dtype)
    want = topk_items(*tensors, k, **options, backend="reference")
    assert_same(topk_items(*tensors, k, **options, backend="triton"), want)


def test_by_hand():
    h, E = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 3.0], [0.0, 4.0]])
    scores, rows = topk_items(h, E, 2, exclude=torch.tensor([[0, -1], [3, 2]]))
    assert rows.tolist() == [[2, 1], [1, 0]]
    assert scores.tolist() == [[2.0, 1.0], [2.0, 1.0]]
    scores, rows = topk_items(
        h, E, 3, bias=torch.tensor([0.0, 9.0, 0.0, 0.0]), allow=torch.tensor([1, 1, 0, 0]).bool()
    )
    assert rows.tolist() == [[1, 0, -1], [1, 0, -1]]
    assert scores.tolist() == [[10.0, 3.0, -torch.inf], [11.0, 1.0, -torch.inf]]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equal_scores_favour_no_end_of_the_catalogue(backend):
    """A model that knows nothing must not recommend what a table sorted by popularity begins with."""
    n, k = (100, 20) if backend == "triton" else (2000, 200)
    _, rows = topk_items(
        torch.zeros(1, 3), torch.ones(n, 3), min(k, 12 if backend == "triton" else k), backend=backend
    )
    mixed = (torch.arange(n) * 2654435761 % 2**32).argsort(descending=True)
    assert torch.equal(rows[0], mixed[: rows.shape[1]])
    if backend != "triton":
        assert abs(rows.double().mean() - n / 2) < n / 50


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_signed_zeros_are_equal_and_nan_shows(backend):
    E = torch.tensor([[0.0], [-0.0], [0.0], [-1.0], [torch.nan]])
    scores, rows = topk_items(torch.ones(1, 1), E, 4, backend=backend)
    order = sorted(range(3), key=lambda row: -(row * 2654435761 % 2**32))
    assert rows[0].tolist() == [4, *order]
    assert scores[0, 0].isnan()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    batch=st.integers(1, 4),
    k=st.integers(1, 40),
    seen=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_never_an_item_that_is_excluded_and_never_twice(n, batch, k, seen, seed):
    tensors, options = make_case(batch, n, 3, seen, whole=True, seed=seed)
    scores, rows = topk_items(*tensors, k, **options)
    left = torch.ones(batch, n, dtype=torch.bool) & options["allow"]
    for user, row in enumerate(rows.tolist()):
        left[user, [item for item in options["exclude"][user].tolist() if item >= 0]] = False
        found = [item for item in row if item >= 0]
        assert len(found) == len(set(found)) == min(k, left[user].sum().item())
        assert left[user, found].all()
        assert row[len(found) :] == [-1] * (k - len(found))
    assert scores.diff(dim=1).nan_to_num(0.0).le(0).all()


def test_users_do_not_depend_on_each_other():
    (h, E), _ = make_case(5, 400, 8)
    together = topk_items(h, E, 7)
    for user in range(5):
        assert_same(topk_items(h[user : user + 1], E, 7), [x[user : user + 1] for x in together])


def test_memory_is_that_of_a_piece_and_the_blocks(monkeypatch):
    monkeypatch.setattr(module, "AT_ONCE", 2**14)
    monkeypatch.setattr(module, "SPAN", 2**20)
    (h, E), _ = make_case(64, 20_000, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        topk_items(h, E, 3)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 4 * 64 * 20_000 / 32 < peak < 4 * 64 * 20_000 / 8


def test_float64_is_computed_in_float64():
    (h, E), _ = make_case(2, 50, 6, dtype=torch.float64)
    scores, _ = topk_items(h, E, 3)
    assert scores.dtype == torch.float64
    assert torch.equal(scores, (h @ E.T).topk(3).values)


def test_no_gradient_and_strided_tables():
    table = torch.randn(100, 12).requires_grad_()
    scores, rows = topk_items(torch.randn(2, 6), table[1:99, ::2], 4)
    assert not scores.requires_grad
    assert rows.max() < 98


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_in(backend, shape):
    batch, n, d = shape
    scores, rows = topk_items(torch.zeros(batch, d), torch.zeros(n, d), 2, backend=backend)
    assert scores.shape == rows.shape == (batch, 2)
    assert rows.lt(0).all() == (n == 0 or batch == 0)


def test_compiles_to_one_graph():
    tensors, options = make_case(2, 70, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(topk_items, backend="aot_eager", fullgraph=True)
    assert_same(compiled(*tensors, 6, **options), topk_items(*tensors, 6, **options))


def test_explain_names_the_backend():
    topk_items(*make_case(1, 3, 2)[0], 1)
    assert explain()["topk_items"].backend == "torch"


H, E = torch.zeros(2, 3), torch.zeros(5, 3)
WRONG = {
    "h is flat": ((H[0], E, 1), {}, r"h \(float32 \[3\]\) must be a float \[batch, d\]"),
    "E's width": ((H, E[:, :2], 1), {}, r"E \(float32 \[5, 2\]\) must be a float \[N, d\] = \[5, 3\] because h is"),
    "k is 0": ((H, E, 0), {}, r"k \(0\) must be a positive integer"),
    "k is a bool": ((H, E, True), {}, r"k \(True\) must be a positive integer"),
    "bias": (
        (H, E, 1),
        {"bias": torch.zeros(4)},
        r"bias \(float32 \[4\]\) must be a float \[N\] = \[5\] because E is",
    ),
    "allow": ((H, E, 1), {"allow": torch.ones(5)}, r"allow \(float32 \[5\]\) must be a bool \[N\] = \[5\]"),
    "exclude's batch": (
        (H, E, 1),
        {"exclude": torch.zeros(3, 1).long()},
        r"exclude \(int64 \[3, 1\]\) must be an int64 \[batch, m\] with batch = 2",
    ),
    "exclude's rows": (
        (H, E, 1),
        {"exclude": torch.tensor([[5], [0]])},
        r"exclude \(from 0 to 5\) must hold rows of E, 0 to 4, or -1",
    ),
    "below -1": ((H, E, 1), {"exclude": torch.tensor([[-2], [0]])}, r"exclude \(from -2 to 0\) must hold rows of E"),
    "backend": ((H, E, 1), {"backend": "cuda"}, r"backend \('cuda'\) must be one of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    arguments, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        topk_items(*arguments, **options)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is off, or Triton is not installed")
@pytest.mark.parametrize(
    ("tensors", "k", "message"),
    [
        ((H.double(), E), 1, "float64 inputs are computed in float64"),
        ((H, E), 257, "up to 256 columns and items, got d = 3 and k = 257"),
        ((torch.zeros(1, 300), torch.zeros(2, 300)), 1, "got d = 300 and k = 1"),
    ],
)
def test_the_kernel_says_what_it_cannot_take(tensors, k, message):
    with pytest.raises(RuntimeError, match=message):
        topk_items(*tensors, k, backend="triton")
