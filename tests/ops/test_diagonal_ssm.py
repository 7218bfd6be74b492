"""Convolution and scan against the float64 recurrence, states and gradients included; kernels against powers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import diagonal_scan, diagonal_ssm, fft_conv
from undersong.ops.hippo import diagonal_init, discretise

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = ["plain", "state", "left", "right", "middle", "state left", "state middle", "all masked", "packed"]
CASES += ["packed state"]
NAMES = ("y", "state", "du", "dlog_a", "dB", "dC", "dD", "dinitial")
CHANNELS, STATE = 3, 4


def make_case(case, length, seed=0):
    """((u, log_a, B, C, D), keywords); padding holds NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, dtype=torch.float32):
        return torch.randn(size, generator=generator, dtype=dtype)

    packed = "packed" in case
    batch, rows = (1, 4) if packed else (2, 2)
    dt = 10 ** (-2 * torch.rand(CHANNELS, 1, generator=generator))  # from 0.01 to 1
    log_a, B = discretise(diagonal_init(2 * STATE).to(torch.complex64), dt)
    u, options = normal(batch, length, CHANNELS), {}
    if packed:  # an empty sequence in the middle
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"], u = mask, u.masked_fill(~mask[..., None], torch.nan)
    if "state" in case:
        options["initial_state"] = normal(rows, CHANNELS, STATE, dtype=torch.complex64)
    C = normal(CHANNELS, STATE, dtype=torch.complex64)
    return (u, log_a, B, C, normal(CHANNELS)), options


def evaluate(case, double=False, **more):
    """Output, state, and all gradients under random upstream gradients on both, by name."""
    inputs, options = case

    def leaf(x):
        wide = torch.complex128 if x.is_complex() else torch.float64
        return x.detach().to(wide if double else x.dtype, copy=True).requires_grad_()

    leaves, options = [leaf(x) for x in inputs], dict(options) | more
    if "initial_state" in options:
        leaves.append(leaf(options["initial_state"]))
        options["initial_state"] = leaves[-1]
    y, state = diagonal_ssm(*leaves[:5], **options, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(y.shape, generator=generator).to(y.dtype),
        torch.randn(state.shape, generator=generator, dtype=torch.complex64).to(state.dtype),
    ]
    return dict(zip(NAMES, (y, state, *torch.autograd.grad([y, state], leaves, upstream)), strict=False))


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        difference = (x.to(y.dtype) - y).abs().max() / max(y.abs().max().item(), 1.0)
        assert difference <= tolerance, f"{name} is off by {difference:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("lowering", ["convolution", "scan"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 66])
def test_both_forms_match_the_recurrence(length, case, lowering, reverse):
    case = make_case(case, length)
    want = evaluate(case, double=True, backend="reference", reverse=reverse)
    assert_equal(evaluate(case, lowering=lowering, reverse=reverse), want, 1e-5)
    assert_equal(evaluate(case, double=True, lowering=lowering, reverse=reverse), want, 1e-11)


def test_forms_agree_over_thousands_of_steps():
    case = make_case("state", 3001)
    convolution, scan = (evaluate(case, lowering=lowering) for lowering in ("convolution", "scan"))
    assert_equal(convolution, scan, 1e-4)
    double = [evaluate(case, double=True, lowering=lowering) for lowering in ("convolution", "scan")]
    assert_equal(*double, 1e-9)


def test_step_by_step_equals_the_whole():
    inputs, options = make_case("state", 40)
    y, state = diagonal_ssm(*inputs, **options, return_final_state=True)
    x, steps = options["initial_state"], []
    for u in inputs[0].split(1, 1):
        step, x = diagonal_ssm(u, *inputs[1:], initial_state=x, return_final_state=True)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, 1), y, rtol=0, atol=2e-5)
    torch.testing.assert_close(x, state, rtol=0, atol=2e-5)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 17, 200])
def test_impulse_response_is_the_sum_of_explicit_powers(length):
    (_, log_a, B, C, _), _ = make_case("plain", 1)
    log_a, B, C = log_a.cdouble(), B.cdouble(), C.cdouble()
    impulse = torch.zeros(1, length, CHANNELS, dtype=torch.float64)
    impulse[:, 0] = 1
    a, powers = log_a.exp(), [torch.ones_like(log_a)]
    for _ in range(length - 1):
        powers.append(powers[-1] * a)
    kernel = 2 * torch.einsum("cn,cn,lcn->cl", C, B, torch.stack(powers)).real
    got = diagonal_ssm(impulse, log_a, B, C, lowering="convolution")[0]
    torch.testing.assert_close(got.T, kernel, rtol=0, atol=1e-12)
    u = torch.randn(2, length, CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(diagonal_ssm(u, log_a, B, C), fft_conv(u, kernel), rtol=0, atol=1e-11)


def test_the_state_is_that_of_the_scan():
    (u, log_a, B, C, _), _ = make_case("plain", 50)
    x = diagonal_scan(log_a.exp()[None, None], B * u[..., None])
    _, state = diagonal_ssm(u, log_a, B, C, return_final_state=True)
    torch.testing.assert_close(state, x[:, -1], rtol=0, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any), reverse=st.booleans())
def test_packed_equals_separate(lengths, reverse):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs, options = make_case("packed state", max(4, sum(lengths)))
    u = inputs[0][:, : sum(lengths)].double()
    first = torch.randn(len(lengths), CHANNELS, STATE, dtype=torch.cdouble)
    more = {"reverse": reverse, "return_final_state": True}
    y, state = diagonal_ssm(u, *inputs[1:], initial_state=first, cu_seqlens=offsets, **more)
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[n], first[n])
            continue
        part = slice(int(offsets[n]), int(offsets[n + 1]))
        want, last = diagonal_ssm(u[:, part], *inputs[1:], initial_state=first[n : n + 1], **more)
        torch.testing.assert_close(y[:, part], want, rtol=0, atol=1e-11)
        torch.testing.assert_close(state[n : n + 1], last, rtol=0, atol=1e-11)


def test_gradcheck():
    inputs, options = make_case("state middle", 6)
    leaves = [x.nan_to_num().to(torch.complex128 if x.is_complex() else torch.float64) for x in inputs]
    leaves = [x.requires_grad_() for x in (*leaves, options["initial_state"].cdouble())]

    def function(*leaves):
        return diagonal_ssm(
            *leaves[:5], initial_state=leaves[5], mask=options["mask"], return_final_state=True, lowering="convolution"
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_half_in_half_out_and_nothing_is_rounded_by_autocast():
    inputs, _ = make_case("plain", 40)
    half = inputs[0].bfloat16(), *inputs[1:]
    want, want_state = diagonal_ssm(half[0].float(), *inputs[1:], return_final_state=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = diagonal_ssm(*half, return_final_state=True)
    assert torch.equal(y, want.bfloat16())
    assert torch.equal(state, want_state)


U, A = torch.zeros(2, 6, 3), torch.zeros(3, 4, dtype=torch.complex64)
WRONG = {
    "u is flat": ((U[0], A, A, A), {}, r"u \(float32 \[6, 3\]\) must be a float \[batch, length, channels\]"),
    "log_a is real": ((U, A.real, A, A), {}, r"log_a \(float32 \[3, 4\]\) must be a complex .*view_as_complex"),
    "log_a has other channels": ((U, A[:2], A, A), {}, r"log_a \(complex64 \[2, 4\]\) .* = \[3, 4\] because u is"),
    "C differs": ((U, A, A, A[:, :2]), {}, r"C \(complex64 \[3, 2\]\) .* = \[3, 4\] .* log_a is complex64 \[3, 4\]"),
    "D": ((U, A, A, A, U[0]), {}, r"D \(float32 \[6, 3\]\) must be a float \[channels\] = \[3\]"),
    "state is real": (
        (U, A, A, A),
        {"initial_state": U},
        r"initial_state \(float32 \[2, 6, 3\]\) must be a complex \[batch, channels, state\] = \[2, 3, 4\]",
    ),
    "lowering": (
        (U, A, A, A),
        {"lowering": "fft"},
        r"lowering \('fft'\) must be one of 'auto', 'convolution', 'scan'",
    ),
    "lowering of the reference": (
        (U, A, A, A),
        {"lowering": "scan", "backend": "reference"},
        r"lowering \('scan'\) is a choice of the torch backend, but backend is 'reference'",
    ),
    "no steps": ((U[:, :0], A, A, A), {}, "length is 0 in u"),
    "mask": ((U, A, A, A), {"mask": U[..., 0]}, r"mask \(float32 \[2, 6\]\) must be a bool"),
    "device": ((U, A.to("meta"), A, A), {}, r"log_a \(meta\) must be on the device of u \(cpu\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        diagonal_ssm(*inputs, **options)
