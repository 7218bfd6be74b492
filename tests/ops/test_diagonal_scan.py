"""The torch path against the float64 reference and a hand-written loop; then the recurrence's own laws."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import diagonal_scan

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = ["plain", "state", "left", "middle", "state middle", "all masked", "packed", "packed state"]
LENGTHS = [1, 2, 31, 63, 64, 65, 97]  # around one block of 32 steps, two blocks, and a remainder
NAMES = ("x", "state", "da", "db", "dinitial")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_case(case, length, *, constant=False, dtype=torch.complex64, shape=(3, 2), seed=0):
    """(a, b, keywords) with |a| < 1; padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=dtype)

    packed = "packed" in case
    batch = 1 if packed else 2
    a = normal(1 if constant else batch, 1 if constant else length, *shape)
    a = a / a.abs() * torch.rand(a.shape, generator=generator).to(a.real.dtype)
    b, options, rows = normal(batch, length, *shape), {}, batch
    if packed:  # an empty sequence in the middle
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
        rows = 4
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"] = mask
            b = b.masked_fill(~mask[..., None, None], torch.nan)
            if not constant:
                a = a.masked_fill(~mask[..., None, None], torch.nan)
    if "state" in case:
        options["initial_state"] = normal(rows, *shape)
    return a, b, options


def evaluate(case, backend, double=False, **more):
    """Output, state, and all gradients under random upstream gradients on both, by name."""
    a, b, options = case

    def leaf(x):
        wide = torch.complex128 if x.is_complex() else torch.float64
        return x.detach().to(wide if double else x.dtype, copy=True).requires_grad_()

    leaves, options = [leaf(a), leaf(b)], dict(options) | more
    if "initial_state" in options:
        leaves.append(leaf(options["initial_state"]))
        options["initial_state"] = leaves[2]
    x, state = diagonal_scan(*leaves[:2], **options, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in (x.to(b.dtype), state.to(b.dtype))]
    gradients = torch.autograd.grad(
        [x, state], leaves, [g.to(y.dtype) for g, y in zip(upstream, (x, state), strict=True)]
    )
    return dict(zip(NAMES, (x, state, *gradients), strict=False))


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        difference = (x.to(y.dtype) - y).abs().max() / max(y.abs().max().item(), 1.0)
        assert difference <= tolerance, f"{name} is off by {difference:.1e}, allowed {tolerance}"


@pytest.fixture(params=["step by step", "doubling"])
def inside_blocks(request, monkeypatch):
    """Either way through a block, whatever the size of the inputs."""
    module = sys.modules["undersong.ops.diagonal_scan"]
    monkeypatch.setattr(module, "SHORT", 0)
    monkeypatch.setattr(module, "SMALL", 0 if request.param == "step by step" else 2**40)


@pytest.mark.usefixtures("inside_blocks")
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("constant", [False, True], ids=["varying", "constant"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_reference(length, case, constant, reverse):
    case = make_case(case, length, constant=constant)
    assert_equal(evaluate(case, "torch", reverse=reverse), evaluate(case, "reference", True, reverse=reverse), 1e-5)


@pytest.mark.usefixtures("inside_blocks")
@pytest.mark.parametrize("case", ["state middle", "packed state"])
def test_matches_reference_over_blocks_of_blocks(case):
    case = make_case(case, 2 * 32 * 32 + 45, shape=(2, 1))
    assert_equal(evaluate(case, "torch", double=True), evaluate(case, "reference", double=True), 1e-12)


def test_real_numbers_and_a_loop_by_hand():
    a, b, options = make_case("state", 70, dtype=torch.float64)
    x, want = options["initial_state"], []
    for t in range(70):
        x = a[:, t] * x + b[:, t]
        want.append(x)
    got, state = diagonal_scan(a, b, **options, return_final_state=True)
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=0, atol=1e-13)
    torch.testing.assert_close(state, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_and_gradients_of_gradients(case, dtype, reverse):
    a, b, options = make_case(case, 6, dtype=dtype, shape=(1, 1))
    a, b = a.nan_to_num(), b.nan_to_num()
    leaves = [a.requires_grad_(), b.requires_grad_()]
    if "initial_state" in options:
        leaves.append(options.pop("initial_state").requires_grad_())

    def function(a, b, *state):
        state = state[0] if state else None
        return diagonal_scan(a, b, initial_state=state, return_final_state=True, reverse=reverse, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("constant", [False, True])
def test_reverse_is_the_flipped_scan_of_flipped_inputs(constant):
    a, b, options = make_case("state middle", 77, constant=constant)
    got, state = diagonal_scan(a, b, **options, reverse=True, return_final_state=True)
    flipped = {"mask": options["mask"].flip(1), "initial_state": options["initial_state"]}
    want, want_state = diagonal_scan(a.flip(1), b.flip(1), **flipped, return_final_state=True)
    torch.testing.assert_close(got.flip(1), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 149), max_size=4, unique=True))
def test_any_split_chained_by_its_states_equals_the_whole(cuts):
    a, b, _ = make_case("plain", 150)
    whole, want = diagonal_scan(a, b, return_final_state=True)
    state, parts = None, []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 150], strict=True):
        x, state = diagonal_scan(a[:, begin:end], b[:, begin:end], initial_state=state, return_final_state=True)
        parts.append(x)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(state, want, rtol=0, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_packed_equals_separate(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    a, b, _ = make_case("packed", sum(lengths))
    x, states = diagonal_scan(a, b, cu_seqlens=offsets, return_final_state=True)
    for n, length in enumerate(lengths):
        part = slice(int(offsets[n]), int(offsets[n + 1]))
        if length == 0:
            assert states[n].eq(0).all()
            continue
        want, state = diagonal_scan(a[:, part], b[:, part], return_final_state=True)
        torch.testing.assert_close(x[:, part], want, rtol=0, atol=1e-5)
        torch.testing.assert_close(states[n : n + 1], state, rtol=0, atol=1e-5)


def test_all_decays_one_is_a_cumulative_sum_and_all_zero_the_input():
    b = torch.randn(2, 200, 3, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(diagonal_scan(one, b), b.cumsum(1), rtol=0, atol=1e-12)
    assert torch.equal(diagonal_scan(0 * one, b), b)


def test_half_in_half_out_and_states_in_float32():
    a, b, _ = make_case("plain", 70, dtype=torch.float32)
    x, state = diagonal_scan(a, b.bfloat16(), return_final_state=True)
    assert (x.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want = diagonal_scan(a, b.bfloat16().float())
    assert torch.equal(x, want.bfloat16())


def test_a_complex_decay_makes_the_output_complex():
    a, b = torch.full((1, 1, 1), 0.5j), torch.ones(1, 3, 1)
    assert diagonal_scan(a, b).flatten().tolist() == [1, 1 + 0.5j, 0.75 + 0.5j]
    assert diagonal_scan(a, b.double()).dtype == torch.complex128


def test_strides_do_not_matter():
    a, b, options = make_case("state", 70)
    views = a.transpose(1, 3).contiguous().transpose(1, 3), b.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(diagonal_scan(*views, **options), diagonal_scan(a, b, **options), rtol=0, atol=1e-5)


def test_memory_is_linear_in_the_length_and_no_long_product_overflows():
    a, b = torch.full((1, 1, 2), 0.999), torch.ones(1, 5000, 2)
    x = diagonal_scan(a, b)
    torch.testing.assert_close(x[0, -1], torch.full((2,), (1 - 0.999**5000) / 0.001), rtol=1e-3, atol=0)


A, B = torch.zeros(1, 1, 4), torch.zeros(2, 6, 4)
OFFSETS = torch.tensor([0, 2, 6]).int()
WRONG = {
    "b is an int": ((A, B.long()), {}, r"b \(int64 \[2, 6, 4\]\) must be a float or complex \[batch, length, ...\]"),
    "a has other sizes": ((B[:, :5], B), {}, r"a \(float32 \[2, 5, 4\]\) .* sizes are 1 or those of b, \[2, 6, 4\]"),
    "a lacks dimensions": ((A[0, 0], B), {}, r"a \(float32 \[4\]\) .*unsqueeze"),
    "no steps": ((A, B[:, :0]), {}, r"length is 0 in b \(float32 \[2, 0, 4\]\)"),
    "mask is float": ((A, B), {"mask": B[..., 0]}, r"mask \(float32 \[2, 6\]\) must be a bool .* = \[2, 6\]"),
    "mask and packed": (
        (A, B[:1]),
        {"mask": B[:1, :, 0].bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets and batch": ((A, B), {"cu_seqlens": OFFSETS}, r"cu_seqlens \(3 offsets\) must come with batch 1"),
    "offsets too short": ((A, B[:1]), {"cu_seqlens": OFFSETS[:2]}, r"\(from 0 to 2\) must go from 0 to the length 6"),
    "state": (
        (A, B),
        {"initial_state": B},
        r"initial_state \(float32 \[2, 6, 4\]\) must be a float or complex \[batch, ...\] = \[2, 4\]",
    ),
    "packed state": (
        (A, B[:1]),
        {"initial_state": B[:1, 0], "cu_seqlens": OFFSETS},
        r"initial_state \(float32 \[1, 4\]\) must be a float or complex \[sequences, ...\] = \[2, 4\]",
    ),
    "device": ((A.to("meta"), B), {}, r"a \(meta\) must be on the device of b \(cpu\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        diagonal_scan(*inputs, **options)


def test_there_is_no_kernel_to_ask_for():
    with pytest.raises(RuntimeError, match='backend="triton" cannot run diagonal_scan: this op has no kernel'):
        diagonal_scan(A, B, backend="triton")
