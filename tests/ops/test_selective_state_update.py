"""One step of Mamba and Mamba-2: the torch path against the equations in float64, and against the scans."""

import math

import pytest
import torch

from undersong.ops import selective_scan, selective_state_update, ssd

CASES = ["bare", "D", "z", "bias", "softplus", "limit", "full", "full groups", "full mask", "full groups mask limit"]
LAYOUTS = {"mamba": (8,), "mamba2": (4, 3)}
TOKENS = ("x", "dt", "B", "C", "z")


def make_case(layout, case, dtype=torch.float64, batch=3, size=5, seed=0):
    """(tensors by name, other options); NaN stands in masked rows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    full, inner = "full" in case, LAYOUTS[layout]
    blocks = inner[0]
    tensors = {"state": normal(batch, *inner, size), "x": normal(batch, *inner), "dt": normal(batch, blocks)}
    tensors["A"] = -(normal(blocks) if layout == "mamba2" else normal(blocks, size)).exp()
    groups = (2,) if "groups" in case else (1,) if layout == "mamba2" else ()
    tensors |= {"B": normal(batch, *groups, size), "C": normal(batch, *groups, size)}
    for name, word, shape in (("D", "D", (blocks,)), ("z", "z", (batch, *inner)), ("dt_bias", "bias", (blocks,))):
        if full or word in case:
            tensors[name] = normal(*shape)
    options = {"dt_softplus": full or "softplus" in case}
    if "limit" in case:
        options["dt_limit"] = (0.2, 0.9)
    if "mask" in case:
        options["mask"] = torch.tensor([True, False, True])
        for name in TOKENS:
            tensors[name][1] = torch.nan
    return {name: x.to(dtype) for name, x in tensors.items()}, options


def evaluate(tensors, options, backend="torch"):
    """Output, new state, and every gradient under random upstream gradients of both, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, state = selective_state_update(**leaves, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream)
    return {"y": y, "state": state} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_equal(got, want, tolerance):
    """By name, within `tolerance` of the largest entry of what is wanted."""
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name].double()
        assert x.shape == y.shape, name
        difference, scale = (x.double() - y).abs().max().item(), max(y.abs().max().item(), 1e-3)
        assert not math.isnan(difference), f"{name} has NaN"
        assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


def double(tensors):
    return {name: x.double() for name, x in tensors.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_the_equations(layout, case):
    tensors, options = make_case(layout, case)
    assert_equal(evaluate(tensors, options), evaluate(tensors, options, "reference"), 1e-12)
    tensors = {name: x.float() for name, x in tensors.items()}
    assert_equal(evaluate(tensors, options), evaluate(double(tensors), options, "reference"), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_one_step_by_hand(backend):
    """dt = 2, exp(dt A) = 1/4: h = 8/4 + 2 * 3 * 5 = 32, y = 7 * 32 + 11 * 3 = 257; half a gate of 0 is nothing."""
    one = torch.ones(1, 1, dtype=torch.float64)
    tensors = {
        "state": one[None] * 8,
        "x": one * 3,
        "dt": one * 2,
        "A": one * -math.log(2),
        "B": one * 5,
        "C": one * 7,
    }
    y, state = selective_state_update(**tensors, D=one[0] * 11, backend=backend)
    assert (y.item(), state.item()) == pytest.approx((257, 32))
    y, _ = selective_state_update(**tensors, z=one * 0, backend=backend)
    assert y.item() == 0


@pytest.mark.parametrize("case", ["full", "full groups", "bare"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_scan_of_one_token(layout, case):
    tensors, options = make_case(layout, case)
    tensors["dt"] = tensors["dt"].abs()  # ssd and the step cut negative steps off, selective_scan takes them
    y, state = selective_state_update(**tensors, **options)
    scan = {name: x[:, None] if name in TOKENS else x for name, x in tensors.items()}
    scan["initial_state"] = scan.pop("state")
    if layout == "mamba":
        names = {"x": "u", "dt": "delta", "dt_bias": "delta_bias", "dt_softplus": "delta_softplus"}
        scan, options = ({names.get(k, k): v for k, v in d.items()} for d in (scan, options))
    op = selective_scan if layout == "mamba" else ssd
    want, want_state = op(**scan, **options, return_final_state=True, backend="reference")
    torch.testing.assert_close(y, want[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("of_B", "of_C"), [(1, 2), (4, 2), (2, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_B_and_C_may_differ(layout, of_B, of_C):
    tensors, options = make_case(layout, "full")
    tensors["B"], tensors["C"] = torch.randn(3, of_B, 5).double(), torch.randn(3, of_C, 5).double()
    assert_equal(evaluate(tensors, options), evaluate(tensors, options, "reference"), 1e-12)


@pytest.mark.parametrize("case", ["full", "full groups mask limit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, case):
    tensors, options = make_case(layout, case, size=2)
    names = list(tensors)

    def function(*leaves):
        return selective_state_update(**dict(zip(names, leaves, strict=True)), **options)

    leaves = [x.nan_to_num().requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_in_half_out_and_the_state_in_float32(layout, dtype):
    tensors, options = make_case(layout, "full groups")
    tensors = {name: x.to(dtype) if name in TOKENS else x.float() for name, x in tensors.items()}
    got, want = evaluate(tensors, options), evaluate(double(tensors), options, "reference")
    assert got["y"].dtype == dtype
    assert got["state"].dtype == torch.float32
    assert_equal(got, want, 2e-2)
    for name, tolerance in {"state": 1e-5, "y": torch.finfo(dtype).eps}.items():
        assert_equal({name: got[name]}, {name: want[name]}, tolerance)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", ["full", "full groups mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inplace_writes_into_the_state_given(layout, case, backend):
    tensors, options = make_case(layout, case, torch.float32)
    want, want_state = selective_state_update(**tensors, **options, backend=backend)
    for held in (tensors["state"].clone(), tensors["state"].mT.contiguous().mT, tensors["state"].bfloat16()):
        before = held.clone()
        y, state = selective_state_update(**tensors | {"state": held}, **options, inplace=True, backend=backend)
        assert state is held
        tolerance = 1e-2 if held.dtype == torch.bfloat16 else 1e-6  # a bfloat16 state is rounded on both ways
        torch.testing.assert_close(held.float(), want_state, rtol=tolerance, atol=10 * tolerance)
        torch.testing.assert_close(y, want, rtol=tolerance, atol=10 * tolerance)
        if "mask" in options:
            assert torch.equal(held[1], before[1])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_rows_give_zeros_and_keep_their_state(layout, backend):
    tensors, options = make_case(layout, "full groups mask")
    got = evaluate(tensors, options, backend)
    for name in ("y", *(f"d{name}" for name in TOKENS)):
        assert got[name][1].eq(0).all(), name
    assert torch.equal(got["state"][1], tensors["state"][1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_softplus_a_negative_step_is_no_step(layout):
    tensors, options = make_case(layout, "bare")
    tensors["dt"] = -tensors["dt"].abs()
    y, state = selective_state_update(**tensors, **options)
    assert torch.equal(state, tensors["state"])
    C = tensors["C"].view(3, *[1] * len(LAYOUTS[layout]), 5)
    torch.testing.assert_close(y, (state * C).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strongly_negative_decays_forget_and_do_not_overflow(layout):
    tensors, options = make_case(layout, "full", torch.float32)
    tensors["A"] = tensors["A"] * 1e30
    got = evaluate(tensors, options)
    assert all(x.isfinite().all() for x in got.values())
    assert got["dstate"].eq(0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_are_read_as_they_stand(layout):
    tensors, options = make_case(layout, "full groups")
    views = {name: x.mT.contiguous().mT if x.dim() > 1 else x for name, x in tensors.items()}
    assert not views["state"].is_contiguous()
    assert_equal(evaluate(views, options), evaluate(tensors, options), 1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast_changes_nothing(layout):
    tensors, options = make_case(layout, "full", torch.float32)
    want = evaluate(tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(evaluate(tensors, options), want, 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_step_has_no_graph_break(layout):
    tensors, options = make_case(layout, "full groups")
    compiled = torch.compile(selective_state_update, backend="eager", fullgraph=True)
    for got, want in zip(compiled(**tensors, **options), selective_state_update(**tensors, **options), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


STATE, X, A, B = torch.zeros(2, 8, 5), torch.zeros(2, 8), torch.zeros(8, 5), torch.zeros(2, 5)
GIVEN = {"state": STATE, "x": X, "dt": X, "A": A, "B": B, "C": B}
HEADS = {
    "state": torch.zeros(2, 4, 3, 5),
    "x": torch.zeros(2, 4, 3),
    "dt": torch.zeros(2, 4),
    "A": torch.zeros(4),
    "B": torch.zeros(2, 1, 5),
    "C": torch.zeros(2, 1, 5),
}
WRONG = {
    "state": (
        GIVEN | {"state": STATE[0]},
        r"state \(float32 \[8, 5\]\) must be a float \[batch, channels, state\] \(Mamba\) or \[batch, heads",
    ),
    "x": (GIVEN | {"x": A}, r"x \(float32 \[8, 5\]\) must be a float \[batch, channels\] = \[2, 8\] because state is"),
    "x of heads": (
        HEADS | {"x": X},
        r"x \(float32 \[2, 8\]\) must be a float \[batch, heads, head_dim\] = \[2, 4, 3\]",
    ),
    "dt": (HEADS | {"dt": X}, r"dt \(float32 \[2, 8\]\) must be a float \[batch, heads\] = \[2, 4\]"),
    "A": (GIVEN | {"A": A[:, 0]}, r"A \(float32 \[8\]\) must be a float \[channels, state\] = \[8, 5\]"),
    "A of heads": (HEADS | {"A": A}, r"A \(float32 \[8, 5\]\) must be a float \[heads\] = \[4\]"),
    "B": (GIVEN | {"B": X}, r"B \(float32 \[2, 8\]\) must be a float \[batch, state\] = \[2, 5\]"),
    "B of heads": (HEADS | {"B": B}, r"B \(float32 \[2, 5\]\) must be a float \[batch, groups, state\]"),
    "groups": (
        HEADS | {"B": torch.zeros(2, 3, 5)},
        r"B \(float32 \[2, 3, 5\]\) has 3 groups, which must divide the heads \(4\)",
    ),
    "C": (GIVEN | {"C": X}, r"C \(float32 \[2, 8\]\) must be a float \[batch, state\] = \[2, 5\] because state"),
    "D": (HEADS | {"D": X}, r"D \(float32 \[2, 8\]\) must be a float \[heads\] = \[4\]"),
    "bias": (GIVEN | {"dt_bias": A}, r"dt_bias \(float32 \[8, 5\]\) must be a float \[channels\] = \[8\]"),
    "z": (GIVEN | {"z": X.long()}, r"z \(int64 \[2, 8\]\) must be a float \[batch, channels\] = \[2, 8\]"),
    "limit": (GIVEN | {"dt_limit": (1.0, 0.5)}, r"dt_limit \(\(1.0, 0.5\)\) must be a pair \(lowest, highest\)"),
    "mask": (GIVEN | {"mask": X.bool()}, r"mask \(bool \[2, 8\]\) must be a bool \[batch\] = \[2\]"),
    "device": (GIVEN | {"C": B.to("meta")}, r"C \(meta\) must be on the device of state \(cpu\)"),
    "inplace": (
        GIVEN | {"A": A.clone().requires_grad_(), "inplace": True},
        r"inplace \(True\) must be False because A requires a gradient; use inplace=False, or torch.no_grad\(\)",
    ),
    "backend": (
        GIVEN | {"backend": "cuda"},
        r"backend \('cuda'\) must be one of 'auto', 'reference', 'torch', 'triton'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        selective_state_update(**arguments)
