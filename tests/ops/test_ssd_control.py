"""controlled_ssd: the definition against brute force, every backend against the definition, and the laws of both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import explain, ssd
from undersong.ops.ssd_control import controlled_ssd

from .test_ssd import assert_equal, make_case

CONTROLS = {
    "threshold": {"granularity": 8, "threshold": torch.tensor([1.0, 2.0, 4.0, torch.inf])},
    "window": {"granularity": 8, "window": 16},
    "window of one": {"granularity": 8, "window": 8},
    "window of three": {"granularity": 5, "window": 15},
    "every token": {"granularity": 1, "threshold": torch.tensor([0.5, 1.0, 2.0, 3.0])},
    "last tokens": {"granularity": 1, "window": 6},
}
CASES = ["plain", "left", "right", "middle", "all masked", "packed"]
SEQUENCE = ("x", "dt", "B", "C", "z")

pytestmark = pytest.mark.usefixtures("one_thread")


def make(case, length, double=False, **options):
    """`make_case` with decays weak enough that a state keeps what a window has to drop: e^-0.1 at most, 1 at best."""
    inputs, options = make_case(case, length, **options)
    inputs["A"] = -torch.tensor([0.1, 0.05, 0.01, 0.0])[: len(inputs["A"])]
    if double:
        inputs = {name: x.double() for name, x in inputs.items()}
    return inputs, options


def past(control, length=13, rows=2, **sizes):
    """State and position after rows of different lengths."""
    inputs, options = make("plain", length, batch=rows, **sizes)
    mask = torch.arange(length) < length - 3 * torch.arange(rows)[:, None].clamp(max=4)
    _, state = controlled_ssd(**inputs, **options, mask=mask, **control, return_final_state=True)
    return {"state": state, "position": mask.sum(1)}


def call(inputs, options, control, **more):
    y, state = controlled_ssd(**inputs, **(options | control | more), return_final_state=True)
    return {"y": y} | state


def columns(inputs, part):
    return {name: x[:, part] if name in SEQUENCE else x for name, x in inputs.items()}


def rows(inputs, part):
    return {name: x[part] if name in SEQUENCE else x for name, x in inputs.items()}


def plain_states(inputs, options):
    """h after every token, and the log decay of every token, from the plain definition; one row."""
    length = inputs["x"].shape[1]
    states = [
        ssd(**columns(inputs, slice(0, t + 1)), **options, return_final_state=True, backend="reference")[1][0]
        for t in range(length)
    ]
    steps = torch.nn.functional.softplus(inputs["dt"][0] + inputs["dt_bias"])
    return torch.stack([torch.zeros_like(states[0]), *states]), torch.cat(
        [inputs["A"].new_zeros(1, len(inputs["A"])), (steps * inputs["A"]).cumsum(0)]
    )


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [
    ("reference", torch.float64, 1e-12), ("torch", torch.float64, 1e-12), ("torch", torch.float32, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize(("granularity", "window"), [(4, 4), (4, 12), (1, 3), (16, 32)])
def test_the_window_is_the_difference_of_two_states_and_a_sum_over_its_tokens(
    granularity, window, backend, dtype, tolerance
):
    inputs, options = make("plain", 41, batch=1, double=True)
    states, logs = plain_states(inputs, options)
    steps = torch.nn.functional.softplus(inputs["dt"][0] + inputs["dt_bias"])
    x, B, C = inputs["x"][0], *(inputs[name][0].repeat_interleave(2, 1) for name in "BC")
    given = {name: t.to(dtype) for name, t in inputs.items()}
    got = call(given, options, {"granularity": granularity, "window": window, "backend": backend})
    for n in range(1, 42):
        first = n - min(n, window + (n - 1) % granularity + 1)
        difference = states[n] - (logs[n] - logs[first]).exp()[:, None, None] * states[first]
        brute = sum(
            ((logs[n] - logs[t + 1]).exp() * steps[t])[:, None, None] * x[t][..., None] * B[t][:, None]
            for t in range(first, n)
        )
        want = (brute @ C[n - 1][..., None])[..., 0] + inputs["D"][:, None] * x[n - 1]
        assert_equal({"h": difference}, {"h": brute}, 1e-12)
        assert_equal({"y": got["y"][0, n - 1]}, {"y": want}, tolerance)
    first = 41 - (window + 41 % granularity)
    want = states[41] - (logs[41] - logs[first]).exp()[:, None, None] * states[first]
    assert_equal({"h": got["ssm"][0]}, {"h": want}, tolerance)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_norms_stay_below_the_threshold_at_every_boundary_and_only_there(backend):
    inputs, options = make("plain", 40)
    control = CONTROLS["threshold"] | {"backend": backend}
    norms = torch.stack(
        [call(columns(inputs, slice(0, n)), options, control)["ssm"].norm(dim=(2, 3)) for n in range(1, 41)]
    )
    ends = torch.arange(1, 41) % 8 == 0
    assert (norms[ends] <= control["threshold"] * (1 + 1e-5)).all()
    assert (norms[ends][..., :2] >= control["threshold"][:2] * (1 - 1e-5)).all()  # these two need the control
    assert (norms[~ends][..., :2] > control["threshold"][:2]).any()


def test_the_threshold_acts_on_a_head_by_its_own_norm():
    x, ones = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2).expand(1, 2, 2, 2), torch.ones(1, 2, 1, 1)
    y, state = controlled_ssd(
        x,
        torch.ones(1, 2, 2),
        torch.zeros(2),
        ones,
        ones,
        granularity=1,
        threshold=torch.tensor([5.0, 8.0]),
        return_final_state=True,
    )
    # |(3, 4)| = 5; after two tokens (6, 8), of norm 10, which becomes 5 and 8
    torch.testing.assert_close(y[0], torch.tensor([[[3.0, 4.0]] * 2, [[6.0, 8.0]] * 2]))
    torch.testing.assert_close(state["ssm"][0, :, :, 0], torch.tensor([[3.0, 4.0], [4.8, 6.4]]))


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 37])
def test_torch_equals_the_definition(length, case, control):
    control = CONTROLS[control]
    inputs, options = make(case, length, gate=True)
    got = call(inputs, options, control, backend="torch")
    assert_equal(got, call({k: x.double() for k, x in inputs.items()}, options, control, backend="reference"), 1e-5)
    more = past(control, rows=5 if case == "packed" else 2)
    got = call(inputs, options, control, **more, backend="torch")
    more["state"] = {name: x.double() for name, x in more["state"].items()}
    assert_equal(got, call(inputs, options, control, **more, backend="reference"), 1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("skip", [None, "head_dim"])
@pytest.mark.parametrize("control", ["threshold", "window"])
def test_every_grouping_and_skip(control, skip, groups):
    inputs, options = make("middle", 20, groups=groups, skip=skip, limit=(0.05, 1.0))
    got = call(inputs, options, CONTROLS[control], backend="torch")
    assert_equal(got, call(inputs, options, CONTROLS[control], backend="reference"), 1e-5)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 49), max_size=8, unique=True), name=st.sampled_from(list(CONTROLS)))
def test_any_split_equals_one_pass(cuts, name):
    inputs, options = make("plain", 50, double=True)
    want, outputs, carried = call(inputs, options, CONTROLS[name]), [], {}
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 50], strict=True):
        got = call(columns(inputs, slice(begin, end)), options, CONTROLS[name], **carried)
        outputs.append(got.pop("y"))
        carried = {"state": got, "position": torch.full((2,), end)}
    assert_equal({"y": torch.cat(outputs, 1)} | got, want, 1e-12)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("control", CONTROLS)
def test_decoding_equals_one_pass_for_rows_at_different_positions(control, inplace):
    """A left-padded prompt of 11 columns, then single tokens, of which the first row skips some."""
    control = CONTROLS[control]
    inputs, options = make("plain", 40, double=True)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :7] = mask[0, 20:23] = False
    want = call(inputs, options, control, mask=mask)
    got = call(columns(inputs, slice(0, 11)), options, control, mask=mask[:, :11])
    outputs, state, position = [got.pop("y")], got, mask[:, :11].sum(1)
    for t in range(11, 40):
        token, held = columns(inputs, slice(t, t + 1)), {name: x.clone() for name, x in state.items()}
        got = call(token, options, control, mask=mask[:, t : t + 1], state=state, position=position, inplace=inplace)
        outputs.append(got.pop("y"))
        if inplace:
            assert all(got[name] is x for name, x in state.items())
        else:
            assert all(torch.equal(held[name], x) for name, x in state.items())
        state, position = got, position + mask[:, t]
    assert_equal({"y": torch.cat(outputs, 1)} | state, want, 1e-12)


@pytest.mark.parametrize("control", CONTROLS)
def test_padded_rows_equal_single_ones(control):
    """Left, right and middle padding, NaN inside."""
    control = CONTROLS[control]
    inputs, options = make("plain", 30, batch=4, double=True)
    mask = torch.ones(4, 30, dtype=torch.bool)
    mask[0, :13] = mask[1, 21:] = mask[2, 4:9] = mask[2, 15] = False
    padded = {k: x.masked_fill(~mask.view(4, 30, *[1] * (x.dim() - 2)), torch.nan) if k in SEQUENCE else x
              for k, x in inputs.items()}  # fmt: skip
    got = call(padded, options, control, mask=mask)
    assert got["y"][~mask].eq(0).all()
    for row in range(4):
        single = call(columns(rows(inputs, slice(row, row + 1)), mask[row]), options, control)
        assert_equal(
            {name: x[row : row + 1] if name != "y" else x[row][mask[row]][None] for name, x in got.items()},
            single,
            1e-12,
        )


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any), name=st.sampled_from(list(CONTROLS)))
def test_packed_equals_separate(lengths, name):
    inputs, options = make("plain", sum(lengths), batch=1, double=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    got = call(inputs, options, CONTROLS[name], cu_seqlens=offsets)
    for n, length in enumerate(lengths):
        if length:
            part = slice(int(offsets[n]), int(offsets[n + 1]))
            want = call(columns(inputs, part), options, CONTROLS[name])
            assert_equal({k: x[:, part] if k == "y" else x[n : n + 1] for k, x in got.items()}, want, 1e-12)
        else:
            assert got["ssm"][n].eq(0).all()


@pytest.mark.parametrize("control", CONTROLS)
def test_rows_of_the_state_are_rows_of_the_batch(control):
    """Beam search picks, doubles and drops rows."""
    control, beams = CONTROLS[control], torch.tensor([2, 0, 0])
    inputs, options = make("plain", 30, batch=3)
    whole = call(rows(inputs, beams), options, control)
    first = call(columns(inputs, slice(0, 19)), options, control)
    carried = {name: x[beams] for name, x in first.items() if name != "y"}
    rest = columns(rows(inputs, beams), slice(19, 30))
    got = call(rest, options, control, state=carried, position=torch.full((3,), 19))
    assert_equal(got, whole | {"y": whole["y"][:, 19:]}, 1e-5)


@pytest.mark.parametrize("case", ["plain", "right", "packed"])
def test_an_infinite_threshold_is_the_plain_op_bit_by_bit(case):
    inputs, options = make(case, 300, batch=1)
    mask = options.pop("mask", None)
    control = {"granularity": 128, "threshold": torch.full((4,), torch.inf)}
    got = call(inputs, options, control, mask=mask)
    y, state = ssd(**inputs, **options, mask=mask, return_final_state=True)
    if case == "right":  # without the padding the last chunk is shorter
        assert_equal(got, {"y": y, "ssm": state}, 1e-6)
    else:
        assert torch.equal(got["y"], y)
        assert torch.equal(got["ssm"], state)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [304, 400])
def test_a_window_of_the_whole_length_is_the_plain_op(window, case):
    inputs, options = make(case, 300)
    got = call(inputs, options, {"granularity": 8, "window": window})
    y, state = ssd(**inputs, **options, return_final_state=True)
    assert_equal({"y": got["y"], "ssm": got["ssm"]}, {"y": y, "ssm": state}, 2e-6)  # sums of 300 terms in float32


@pytest.mark.parametrize("control", CONTROLS)
def test_masked_rows_keep_their_state_even_at_a_boundary(control):
    control = CONTROLS[control]
    inputs, options = make("plain", 5)
    more = past(control, length=16)
    more["position"] = torch.tensor([16, 13])
    for length in (1, 5):
        got = call(columns(inputs, slice(0, length)), options, control, **more, mask=torch.zeros(2, length).bool())
        assert got.pop("y").eq(0).all()
        assert all(torch.equal(got[name], x) for name, x in more["state"].items())


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("control", ["threshold", "window"])
def test_half_in_half_out_and_states_in_float32(control, backend):
    inputs, options = make("left", 30, gate=True, dtype=torch.bfloat16)
    got = call(inputs, options, CONTROLS[control], backend=backend)
    want = call({k: x.double() for k, x in inputs.items()}, options, CONTROLS[control], backend="reference")
    assert got["y"].dtype == torch.bfloat16
    assert {x.dtype for name, x in got.items() if name != "y"} == {torch.float32}
    assert_equal({"y": got.pop("y")}, {"y": want.pop("y")}, torch.finfo(torch.bfloat16).eps)
    assert_equal(got, want, 1e-5)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("control", [
    {"granularity": 2, "threshold": torch.tensor([0.3, torch.inf])}, {"granularity": 2, "window": 4},
], ids=["threshold", "window"])  # fmt: skip
def test_gradcheck(control, length):
    inputs, options = make_case("middle", length, heads=2, head_dim=2, state=2, gate=True)
    state = call(*make_case("plain", 5, heads=2, head_dim=2, state=2), control)
    names, state = [*inputs, *list(state)[1:]], list(state.values())[1:]
    leaves = [x.nan_to_num().double().requires_grad_() for x in [*inputs.values(), *state]]

    def function(*tensors):
        given = dict(zip(names, tensors, strict=True))
        held = {name: given.pop(name) for name in names[len(inputs) :]}
        return tuple(call(given, options, control, state=held, position=torch.tensor([5, 4])).values())

    assert torch.autograd.gradcheck(function, leaves)


def test_explain_names_the_control():
    inputs, options = make("plain", 9)
    call(inputs, options, CONTROLS["window"])
    call(inputs, options, CONTROLS["threshold"])
    assert explain()["ssd_window"].backend == explain()["ssd_threshold"].backend == "torch"


def test_no_rows_in_no_rows_out():
    inputs, options = make_case("plain", 5, batch=0)
    for backend in ("reference", "torch"):
        got = call(inputs, options, CONTROLS["window"], backend=backend)
        assert got["y"].shape == (0, 5, 4, 3)
        assert got["ring"].shape == (0, 2, 4, 3, 5)


X, DT, A, B = torch.zeros(2, 6, 4, 3), torch.zeros(2, 6, 4), torch.zeros(4), torch.zeros(2, 6, 2, 5)
H, POSITION = torch.zeros(2, 4, 3, 5), torch.zeros(2).long()
WRONG = {
    "granularity": ({"granularity": 0, "window": 4}, r"granularity \(0\) must be an integer of at least 1"),
    "both": ({"window": 128, "threshold": A + 1}, "exactly one of threshold and window must be given but both are"),
    "neither": ({}, "exactly one of threshold and window must be given but neither is"),
    "threshold": ({"threshold": A[:2]}, r"threshold \(float32 \[2\]\) must be a float \[heads\] = \[4\]"),
    "not positive": (
        {"threshold": torch.tensor([1.0, 2.0, -3.0, 4.0])},
        r"threshold \(lowest -3\) must be positive; use float\('inf'\)",
    ),
    "not a number": ({"threshold": A + torch.nan}, r"threshold \(lowest nan\) must be positive"),
    "window": (
        {"window": 130},
        r"window \(130\) must be a positive multiple of granularity \(128\); use 256",
    ),
    "no window": ({"window": 0}, r"window \(0\) must be a positive multiple of granularity \(128\); use 128"),
    "position": (
        {"window": 128, "position": POSITION.int()},
        r"position \(int32 \[2\]\) must be an int64 \[batch\] = \[2\]",
    ),
    "state without position": ({"threshold": A + 1, "state": {"ssm": H}}, r"position \(None\) must come with a state"),
    "state of another control": (
        {"window": 128, "state": {"ssm": H}, "position": POSITION},
        r"state \(\['ssm'\]\) must be a dict of ssm, local, local_decay, ring, ring_decay",
    ),
    "state": (
        {"threshold": A + 1, "state": {"ssm": H.mT}, "position": POSITION},
        r"state\['ssm'\] \(float32 \[2, 4, 5, 3\]\) must be a float \[batch, heads, .* = \[2, 4, 3, 5\]; pass what",
    ),
    "inplace": ({"window": 128, "inplace": True}, r"inplace \(True\) must be False because length is 6"),
    "x": ({"window": 128, "x": X.long()}, r"x \(int64 \[2, 6, 4, 3\]\) must be a float"),
    "backend": ({"window": 128, "backend": "cuda"}, r"backend \('cuda'\) must be one of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    options, message = WRONG[name]
    inputs = {"x": X, "dt": DT, "A": A, "B": B, "C": B} | options
    with pytest.raises(ValueError, match=message):
        controlled_ssd(**inputs)


def test_inplace_is_refused_where_it_would_lose_a_gradient():
    inputs = {name: t[:, :1] for name, t in {"x": X, "dt": DT, "B": B, "C": B}.items()}
    more = {"threshold": A + 1, "position": POSITION, "inplace": True}
    with pytest.raises(ValueError, match=r"inplace \(True\) must be False because state is None"):
        controlled_ssd(**inputs, A=A, threshold=A + 1, inplace=True)
    with pytest.raises(ValueError, match=r"inplace \(True\) must be False because A requires a gradient"):
        controlled_ssd(**inputs, A=A.clone().requires_grad_(), **more, state={"ssm": H})
