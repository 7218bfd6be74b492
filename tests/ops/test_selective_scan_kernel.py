"""The Triton kernel of the selective scan in the interpreter, against the float64 reference."""

import sys

import pytest
import torch

from undersong.ops import _dispatch, available_backends, selective_scan

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("triton" not in available_backends("selective_scan"), reason="needs Triton's interpreter"),
]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CASES = ["plain", "state", "left", "right", "middle state", "all masked", "packed", "packed state", "bare"]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def kernel_module(name):
    selective_scan(**make_case("plain", 1), backend="triton")  # loads it
    return sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.{name}"]


def make_case(case, length, batch=2, channels=20, size=3, groups=None, dtype=torch.float32, seed=0):
    """Keywords of the op. "bare": without any option; "packed": with an empty sequence in the middle."""
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if "packed" in case else batch

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    heads = (size,) if groups is None else (groups, size)
    x = {name: normal(batch, length, channels).to(dtype) for name in ("u", "delta", "z")}
    x |= {name: normal(batch, length, *heads).to(dtype) for name in ("B", "C")}
    x |= {"A": -4 * torch.rand(channels, size, generator=generator), "D": normal(channels)}
    x |= {"delta_bias": normal(channels), "delta_softplus": True}
    rows = batch
    if "packed" in case:
        x["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
        rows = 4
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask = torch.ones(batch, length, dtype=torch.bool)
            mask[0, span] = False
            x["mask"] = mask
            for padded in ("u", "delta", "z", "B", "C"):  # padding may hold anything
                x[padded][~mask] = torch.nan
    if "state" in case:
        x["initial_state"] = normal(rows, channels, size)
    if case == "bare":
        x = {name: x[name] for name in ("u", "delta", "A", "B", "C")}
        x["delta"] = x["delta"].abs()
    return x


def evaluate(case, backend, dtype=None):
    """Output, state, and the gradients of everything under random upstream gradients on output and state, by name."""
    case = dict(case)
    for name in NAMES:
        if name in case:
            case[name] = case[name].detach().to(dtype or case[name].dtype).requires_grad_()
    y, state = selective_scan(**case, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (y, state)]
    leaves = {name: case[name] for name in NAMES if name in case}
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream)
    return {"y": y.detach(), "state": state.detach()} | {
        f"d{name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name].double()
        assert x.shape == y.shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        error = (x.double() - y).abs().max() / max(float(y.abs().max()), 1e-30)
        assert error <= tolerance, f"{name} is off by {error:.1e} of its scale, allowed {tolerance}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 21])
def test_matches_the_reference(length, case):
    """Less than a tile; more than a window between saved states, with a tile begun."""
    case = make_case(case, length)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize("case", ["plain", "left"])
def test_matches_the_reference_in_whole_tiles_and_where_many_programs_run(case):
    """More programs than the interpreter's one multiprocessor is said to hold: they are cut another way."""
    case = make_case(case, 16, batch=6, channels=3)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5)


@pytest.mark.parametrize(
    ("channels", "size", "groups"), [(1, 1, None), (40, 16, None), (12, 5, 3), (33, 2, 1), (3, 100, None)]
)
def test_any_number_of_channels_states_and_groups(channels, size, groups):
    case = make_case("state", 11, channels=channels, size=size, groups=groups)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5)


def test_takes_any_strides_and_answers_in_the_layout_of_u():
    case = make_case("state", 19, channels=16)
    want = evaluate(case, "reference", torch.float64)
    views = dict(case)
    views["u"], views["z"] = (case[name].mT.contiguous().mT for name in ("u", "z"))  # [batch, channels, length]
    views["delta"] = torch.stack([case["delta"]] * 3, -1)[..., 1]
    both = torch.cat([case["B"], case["C"]], -1)
    views["B"], views["C"] = both[..., :3], both[..., 3:]
    assert_equal(evaluate(views, "triton"), want, 1e-5)
    y = selective_scan(**views, backend="triton")
    assert y.mT.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_in_half_out_and_states_in_float32(dtype):
    case = make_case("plain", 20, dtype=dtype)
    got = evaluate(case, "triton")
    assert {got[name].dtype for name in ("y", "du", "ddelta", "dz", "dB", "dC")} == {dtype}
    assert {got[name].dtype for name in ("state", "dA", "dD", "ddelta_bias")} == {torch.float32}
    # All arithmetic is in float32, so each result carries one rounding of its own dtype. The interpreter cuts bfloat16
    # off, 2^-7 of a number at most, where a GPU rounds.
    assert_equal(got, evaluate(case, "reference", torch.float64), {torch.bfloat16: 8e-3, torch.float16: 5e-4}[dtype])


def test_steps_of_any_size_stay_finite():
    """softplus far on both sides, decays that underflow."""
    case = make_case("plain", 9, channels=8)
    case["delta"] = torch.linspace(-100, 100, case["delta"].numel()).view_as(case["delta"])
    case["A"] = case["A"] * 100
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5)


def test_split_with_carried_state_equals_one_run():
    case = make_case("plain", 30)
    whole, state = selective_scan(**case, return_final_state=True, backend="triton")
    sequences = ("u", "delta", "B", "C", "z")
    first = {name: x[:, :13] if name in sequences else x for name, x in case.items()}
    second = {name: x[:, 13:] if name in sequences else x for name, x in case.items()}
    y1, middle = selective_scan(**first, return_final_state=True, backend="triton")
    y2, last = selective_scan(**second, initial_state=middle, return_final_state=True, backend="triton")
    assert torch.equal(torch.cat([y1, y2], 1), whole)
    assert torch.equal(last, state)


def test_wild_offsets_touch_nothing_outside_the_row():
    """Offsets on a GPU are not checked; a row is a view into memory that must stay as it is."""
    case = make_case("packed", 10)
    kernel = kernel_module("scan").selective_scan
    x = {name: case[name].requires_grad_() for name in ("u", "delta", "A", "B", "C")}
    y, state = kernel(*x.values(), cu_seqlens=torch.tensor([-5, 3, 2, 99]).int())
    assert y.shape == case["u"].shape
    assert state.shape[0] == 3
    torch.autograd.grad(state.nan_to_num().sum(), list(x.values()))


def test_no_state_is_saved_without_a_gradient():
    case = make_case("plain", 10)
    operators = kernel_module("registry").OPERATORS
    x = [case.get(name) for name in NAMES]
    x[3], x[4] = x[3].unsqueeze(2), x[4].unsqueeze(2)
    assert operators.scan_forward(*x, None, None, True, False)[2].numel() == 0
    assert operators.scan_forward(*x, None, None, True, True)[2].shape == (2, 20, 3)  # one window in each row


def test_float64_is_refused_with_the_way_out():
    case = make_case("plain", 4)
    case["u"] = case["u"].double()
    with pytest.raises(RuntimeError, match=r"float64 .* use backend='torch'"):
        selective_scan(**case, backend="triton")


def test_a_state_beyond_what_the_kernel_holds_is_refused():
    x = make_case("bare", 2, size=129)
    with pytest.raises(ValueError, match=r"A's state \(129\) must be at most 128; use the torch path"):
        kernel_module("scan").selective_scan(x["u"], x["delta"], x["A"], x["B"], x["C"])
    with pytest.raises(RuntimeError, match=r"a state of 129 is more than the 128 .* use backend='torch'"):
        selective_scan(**x, backend="triton")
