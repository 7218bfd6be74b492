"""Every backend against PyTorch's cross-entropy of all logits, with gradients; then the op's own laws."""

import itertools
import sys

import pytest
import torch
from torch.nn import functional as F

from undersong.ops import _dispatch, explain
from undersong.ops.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = _dispatch.available_backends("linear_cross_entropy")
SHAPES = [(1, 1, 1), (7, 50, 5), (33, 90, 20)]
SETTINGS = list(itertools.product((False, True), (0.0, 0.1), (1.0, 3.0)))


@pytest.fixture(autouse=True)
def small_cuts(monkeypatch):
    """Several parts and tiles also for small tables."""
    if "triton" in BACKENDS:
        linear_cross_entropy(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1).long(), backend="triton")
        kernel = sys.modules[f"{_dispatch._KERNELS['recommendation'].__name__}.cross_entropy"]
        cut = {"TOKENS": 16, "ITEMS": 16, "STAGES": 1, "num_warps": 1}
        for table in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(kernel, table, {True: cut, False: cut})
        monkeypatch.setattr(kernel, "FEWEST", 32)


def make_case(tokens, n, d, biased=False, dtype=torch.float32):
    """Leaves (h, E, bias or nothing) and labels, every third token ignored."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, d), (n, d), *([(n,)] if biased else [])]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(n, (tokens,), generator=generator)
    labels[1::3] = -100
    return leaves, labels


def evaluate(leaves, labels, **options):
    """The loss and all gradients."""
    loss = linear_cross_entropy(*leaves[:2], labels, bias=leaves[2] if len(leaves) > 2 else None, **options)
    return loss, *torch.autograd.grad(loss, leaves)


def oracle(leaves, labels, scale=1.0, **options):
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    logits = scale * leaves[0] @ leaves[1].T
    logits = logits + leaves[2] if len(leaves) > 2 else logits
    loss = F.cross_entropy(logits, labels, **options)
    return loss, *torch.autograd.grad(loss, leaves)


def assert_equal(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance * max(y.abs().max().item(), 1.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("biased", "smoothing", "scale"), SETTINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_cross_entropy(backend, biased, smoothing, scale, shape):
    leaves, labels = make_case(*shape, biased)
    got = evaluate(leaves, labels, label_smoothing=smoothing, scale=scale, backend=backend, chunk_size=16)
    assert_equal(got, oracle(leaves, labels, scale, label_smoothing=smoothing), 2e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 10_000])
def test_the_cut_into_pieces_does_not_show(chunk_size):
    leaves, labels = make_case(7, 50, 5, True, torch.float64)
    assert_equal(evaluate(leaves, labels, chunk_size=chunk_size), oracle(leaves, labels), 1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(smoothing):
    leaves, labels = make_case(4, 9, 3, True, torch.float64)

    def loss(h, E, bias):
        return linear_cross_entropy(h, E, labels, bias=bias, label_smoothing=smoothing, scale=0.7, chunk_size=4)

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_inputs_give_a_float32_loss_and_half_gradients(backend, dtype):
    leaves, labels = make_case(20, 70, 16, True, dtype)
    got = evaluate(leaves, labels, backend=backend)
    assert got[0].dtype == torch.float32
    assert {x.dtype for x in got[1:]} == {dtype}
    assert_equal(got, oracle(leaves, labels), torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_some_inputs_without_gradient(backend):
    leaves, labels = make_case(6, 40, 5, True)
    want = oracle(leaves, labels)
    for wanted in range(3):
        given = [x.detach().requires_grad_(n == wanted) for n, x in enumerate(leaves)]
        loss = linear_cross_entropy(given[0], given[1], labels, bias=given[2], backend=backend)
        (got,) = torch.autograd.grad(loss, given[wanted])
        assert_equal([got], [want[1 + wanted]], 2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_neither_overflow_nor_vanish(backend):
    leaves, labels = make_case(5, 40, 4)
    got = evaluate(leaves, labels, scale=300.0, backend=backend, chunk_size=8)
    assert_equal(got, oracle(leaves, labels, 300.0), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_minus_infinity_takes_rows_out(backend):
    (h, E), labels = make_case(5, 40, 4)
    bias = torch.zeros(40)
    bias[:20] = -torch.inf
    labels = labels.clamp(max=19) + 20 * labels.ge(0)
    got = linear_cross_entropy(h, E, labels, bias=bias, backend=backend, chunk_size=8)
    want = F.cross_entropy(h @ E[20:].T, torch.where(labels < 0, -100, labels - 20))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_that_counts_gives_zero(backend):
    leaves, labels = make_case(4, 9, 3, True)
    got = evaluate(leaves, torch.full_like(labels, -100), backend=backend)
    assert all(x.eq(0).all() for x in got)
    empty = evaluate([leaves[0][:0].detach().requires_grad_(), *leaves[1:]], labels[:0], backend=backend)
    assert all(x.eq(0).all() for x in empty)


def test_the_sum_is_divided_by_what_trainer_counts():
    (h, E), labels = make_case(9, 20, 4)
    whole = F.cross_entropy(h @ E.T, labels, reduction="sum")
    for count in (40, torch.tensor(40)):
        torch.testing.assert_close(linear_cross_entropy(h, E, labels, num_items_in_batch=count), whole / 40)


def test_another_label_to_ignore():
    (h, E), labels = make_case(9, 20, 4)
    marked = torch.where(labels < 0, 3, labels)
    got = linear_cross_entropy(h, E, marked, ignore_index=3)
    torch.testing.assert_close(got, F.cross_entropy(h @ E.T, marked, ignore_index=3))


def test_memory_does_not_grow_with_the_logits():
    leaves, labels = make_case(64, 20_000, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate(leaves, labels, chunk_size=256)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert 4 * 20_000 * 4 < peak < 4 * 64 * 20_000 / 10  # at least the table's gradient


# torch.compile looks at the gradients of what it goes on with after the graph break, and only hides the warning
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_gives_the_same_loss_and_gradients():
    leaves, labels = make_case(7, 50, 5, True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, E, bias: linear_cross_entropy(h, E, labels, bias=bias), backend="aot_eager")
    loss = compiled(*leaves)
    assert_equal((loss, *torch.autograd.grad(loss, leaves)), oracle(leaves, labels), 2e-6)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton's interpreter is off, or Triton is not installed")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_kernels_operator_is_registered_soundly(smoothing):
    leaves, labels = make_case(5, 40, 4, True)
    package = _dispatch._KERNELS["recommendation"].__name__
    operator = getattr(torch.ops, package.replace(".", "_")).losses.default
    torch.library.opcheck(operator, (*leaves[:2], labels, leaves[2], -100, smoothing, 1.5, True))


def test_explain_names_the_backend():
    (h, E), labels = make_case(2, 3, 2)
    linear_cross_entropy(h, E, labels)
    assert explain()["linear_cross_entropy"].backend == "torch"


H, E, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.tensor([0, 4])
WRONG = {
    "h is flat": ((H[0], E, Y), {}, r"h \(float32 \[3\]\) must be a float \[tokens, d\]"),
    "E's width": ((H, E[:, :2], Y), {}, r"E \(float32 \[5, 2\]\) must be a float \[N, d\] = \[5, 3\] because h is"),
    "no rows": ((H, E[:0], Y), {}, r"E \(float32 \[0, 3\]\) must have at least 1 row"),
    "labels": ((H, E, Y.float()), {}, r"labels \(float32 \[2\]\) must be an int64 \[tokens\] = \[2\]"),
    "a label": ((H, E, Y + 1), {}, r"labels \(5\) must be rows of E, 0 to 4, or ignore_index \(-100\)"),
    "bias": ((H, E, Y), {"bias": torch.zeros(4)}, r"bias \(float32 \[4\]\) must be a float \[N\] = \[5\]"),
    "smoothing": ((H, E, Y), {"label_smoothing": 1.0}, r"label_smoothing \(1.0\) must lie in \[0, 1\)"),
    "chunk": ((H, E, Y), {"chunk_size": 0}, r"chunk_size \(0\) must be a positive integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    arguments, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)
