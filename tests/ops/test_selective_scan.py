"""The torch path against the float64 recurrence; then the op's own laws. Fresh memory is filled with NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import explain, selective_scan

TOKENS = ("u", "delta", "B", "C", "z")  # what has a time axis
CASES = [
    "bare", "D", "z", "softplus", "softplus bias", "full", "full groups", "full state", "full left", "full right",
    "full middle state", "full all masked state", "full packed", "full packed groups state", "bare state groups",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_case(case, length, batch=3, channels=6, size=4, dtype=torch.float64, seed=0):
    """(tensors by name, other options). `packed` has four sequences, the second one empty; NaN stands under masks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    packed, full = "packed" in case, "full" in case
    batch = 1 if packed else batch
    shape = (batch, length, channels)
    # for an op without softplus a delta that is positive, as every model's is
    delta = normal(*shape) if full or "softplus" in case else normal(*shape).exp() / 4
    tensors = {"u": normal(*shape), "delta": delta, "A": -normal(channels, size).exp()}
    grouped = (batch, length, 2, size) if "groups" in case else (batch, length, size)
    tensors |= {"B": normal(*grouped), "C": normal(*grouped)}
    options = {"delta_softplus": full or "softplus" in case}
    for name, word, wanted in (("D", "D", (channels,)), ("z", "z", shape), ("delta_bias", "bias", (channels,))):
        if full or word in case:
            tensors[name] = normal(*wanted)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
    if "state" in case:
        tensors["initial_state"] = normal(4 if packed else batch, channels, size)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for word, span in spans.items():
        if word in case:
            mask = torch.ones(batch, length, dtype=torch.bool)
            mask[0, span] = False
            options["mask"] = mask
            for name in TOKENS:
                tensors[name][~mask] = torch.nan
    return {name: x.to(dtype) for name, x in tensors.items()}, options


def evaluate(tensors, options, backend="torch"):
    """Output, last state, and every gradient under random upstream gradients of both, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, state = selective_scan(**leaves, **options, return_final_state=True, backend=backend)
    return {"y": y, "state": state} | gradients(y, state, leaves)


def gradients(y, state, leaves):
    upstream = upstream_of(y), upstream_of(state)
    found = torch.autograd.grad([y, state], list(leaves.values()), upstream)
    return {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


def upstream_of(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(x)


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
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 70])
def test_matches_the_recurrence(length, case):
    tensors, options = make_case(case, length)
    want = evaluate(tensors, options, "reference")
    assert_equal(evaluate(tensors, options), want, 1e-12)
    tensors = {name: x.float() for name, x in tensors.items()}
    assert_equal(evaluate(tensors, options), evaluate(double(tensors), options, "reference"), 1e-5)


@pytest.mark.parametrize(("channels", "size"), [(1, 1), (5, 1), (1, 7), (4, 16)])
def test_any_number_of_channels_and_states(channels, size):
    tensors, options = make_case("full state", 35, channels=channels, size=size)
    assert_equal(evaluate(tensors, options), evaluate(tensors, options, "reference"), 1e-12)


@pytest.mark.parametrize(("of_B", "of_C"), [(None, 3), (3, 2), (2, 1)])
def test_groups_of_B_and_C_may_differ(of_B, of_C):
    tensors, options = make_case("full state", 35)
    for name, groups in (("B", of_B), ("C", of_C)):
        if groups:
            tensors[name] = torch.randn(3, 35, groups, 4, dtype=torch.float64)
    assert_equal(evaluate(tensors, options), evaluate(tensors, options, "reference"), 1e-12)


@pytest.mark.parametrize("numbers", [1, 24, 60])
def test_rows_are_cut_into_pieces_that_fit_the_cache(monkeypatch, numbers):
    """One, one and two of five rows at once: the result does not depend on it."""
    from undersong.ops import _selective_blocks

    monkeypatch.setattr(_selective_blocks, "CACHED", numbers)
    tensors, options = make_case("full middle state", 40, batch=5)
    assert_equal(evaluate(tensors, options), evaluate(tensors, options, "reference"), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_in_half_out_and_the_state_in_float32(dtype):
    tensors, options = make_case("full state right", 70)
    exact = {"A", "D", "delta_bias", "initial_state"}  # what models keep in float32
    tensors = {name: x.float() if name in exact else x.to(dtype) for name, x in tensors.items()}
    got = evaluate(tensors, options)
    assert {name for name, x in got.items() if x.dtype == dtype} == {"y", *(f"d{name}" for name in TOKENS)}
    assert got["state"].dtype == torch.float32
    assert_equal(got, evaluate(double(tensors), options, "reference"), 2e-2)
    exactly = {"state": 1e-5, "y": torch.finfo(dtype).eps}  # nothing but the output is rounded
    for name, tolerance in exactly.items():
        assert_equal({name: got[name]}, {name: evaluate(double(tensors), options)[name]}, tolerance)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("case", ["full state", "full groups middle", "full packed state", "bare"])
def test_gradcheck(case, length):
    tensors, options = make_case(case, length, batch=2, channels=2, size=2)
    names = list(tensors)

    def function(*leaves):
        return selective_scan(**dict(zip(names, leaves, strict=True)), **options, return_final_state=True)

    assert torch.autograd.gradcheck(function, [x.nan_to_num().requires_grad_() for x in tensors.values()])


def test_a_second_derivative_is_refused():
    tensors, options = make_case("bare", 4)
    u = tensors.pop("u").requires_grad_()
    (du,) = torch.autograd.grad(selective_scan(u, **tensors, **options).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        du.sum().backward()


@pytest.mark.parametrize("needed", ["A", "B", "initial_state", "z"])
def test_one_gradient_alone_equals_that_of_all(needed):
    tensors, options = make_case("full state", 40)
    want = evaluate(tensors, options)[f"d{needed}"]
    tensors[needed].requires_grad_()
    y, state = selective_scan(**tensors, **options, return_final_state=True)
    loss = (y * upstream_of(y)).sum() + (state * upstream_of(state)).sum()
    (got,) = torch.autograd.grad(loss, tensors[needed])
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 33])
def test_strongly_negative_steps_forget_and_do_not_overflow(length):
    tensors, options = make_case("bare state", length)
    tensors["A"] = tensors["A"] * 1e30
    got = evaluate({name: x.float() for name, x in tensors.items()}, options)
    assert all(x.isfinite().all() for x in got.values())
    memoryless = (tensors["C"] * tensors["B"]).sum(-1, keepdim=True) * tensors["delta"] * tensors["u"]
    assert_equal({"y": got["y"]}, {"y": memoryless}, 1e-5)
    assert got["dinitial_state"].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", ["full left state", "full middle", "full right state", "full all masked state"])
def test_masked_positions_give_zeros_and_take_nothing(backend, case):
    tensors, options = make_case(case, 40)
    got = evaluate(tensors, options, backend)
    hidden = ~options["mask"]
    for name in ("y", *(f"d{name}" for name in TOKENS)):
        assert got[name][hidden].eq(0).all(), name
    if "all masked" in case:
        assert torch.equal(got["state"][0], tensors["initial_state"][0])


@pytest.mark.parametrize("case", ["full left state", "full middle state", "full right state"])
def test_padding_anywhere_equals_the_compacted_row(case):
    tensors, options = make_case(case, 40)
    y, state = selective_scan(**tensors, **options, return_final_state=True)
    keep = options.pop("mask")[0]
    row = {name: x[:1, keep] if name in TOKENS else x for name, x in tensors.items()}
    row["initial_state"] = row["initial_state"][:1]
    want, want_state = selective_scan(**row, **options, return_final_state=True)
    torch.testing.assert_close(y[:1, keep], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(state[:1], want_state, rtol=0, atol=1e-12)


def test_views_are_read_as_they_stand():
    """Transposed and sliced views, as a fused projection or [batch, channels, length] code hands them over."""
    tensors, options = make_case("full groups state", 40)
    views = {
        name: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x for name, x in tensors.items()
    }
    wide = torch.full((*tensors["u"].shape[:2], 3, 6), torch.nan, dtype=torch.float64)
    wide[:, :, 1] = tensors["u"]
    views["u"] = wide[:, :, 1]
    assert not any(views[name].is_contiguous() for name in (*TOKENS, "A", "initial_state"))
    assert_equal(evaluate(views, options), evaluate(tensors, options), 1e-13)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 79), max_size=5, unique=True))
def test_any_split_chained_by_its_states_equals_the_whole(cuts):
    tensors, options = make_case("full", 80)
    whole, want = selective_scan(**tensors, **options, return_final_state=True)
    state, outputs = None, []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 80], strict=True):
        part = {name: x[:, begin:end] if name in TOKENS else x for name, x in tensors.items()}
        y, state = selective_scan(**part, **options, initial_state=state, return_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, want, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_packed_equals_separate(lengths):
    """Outputs, last states, and the gradients of a loss of both."""
    tensors, options = make_case("full", sum(lengths), batch=1)
    tensors["initial_state"] = torch.randn(len(lengths), 6, 4, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    got = evaluate(tensors, options | {"cu_seqlens": offsets})

    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs, states = [], []
    for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        part = {name: x[:, begin:end] if name in TOKENS else x for name, x in leaves.items()}
        part["initial_state"] = part["initial_state"][n : n + 1]
        y, state = part["u"], part["initial_state"]  # of an empty sequence
        if end > begin:
            y, state = selective_scan(**part, **options, return_final_state=True)
        outputs.append(y)
        states.append(state)
    y, state = torch.cat(outputs, 1), torch.cat(states)
    assert_equal(got, {"y": y, "state": state} | gradients(y, state, leaves), 1e-12)


def test_time_invariant_input_gives_the_geometric_sum():
    """With everything constant h_t = x (1 - a^t) / (1 - a), by hand for a = 1/2."""
    one = torch.ones(1, 5, 1)
    y = selective_scan(one, one, torch.tensor([[-math.log(2)]]), one, one, torch.tensor([10.0]))
    torch.testing.assert_close(y.flatten(), 10 + 2 * (1 - 0.5 ** torch.arange(1.0, 6)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_rows_give_no_rows(backend):
    tensors, options = make_case("full", 5, batch=0)
    y, state = selective_scan(**tensors, **options, return_final_state=True, backend=backend)
    assert y.shape == (0, 5, 6)
    assert state.shape == (0, 6, 4)


@pytest.mark.parametrize("length", [1, 40])
def test_autocast_changes_nothing(length):
    tensors, options = make_case("full state", length)
    tensors = {name: x.float() for name, x in tensors.items()}
    want = evaluate(tensors, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(evaluate(tensors, options), want, 0.0)


def test_memory_does_not_hold_the_states_of_all_steps():
    """What the graph keeps grows by a few numbers a token and channel, not by `state` of them."""
    length, channels, size = 512, 64, 64
    tensors, options = make_case("full", length, batch=1, channels=channels, size=size, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(**{name: x.requires_grad_() for name, x in tensors.items()}, **options)
    assert sum(x.numel() for x in {x.data_ptr(): x for x in kept}.values()) < length * channels * size / 4


def test_a_compiled_step_has_no_graph_break_and_a_compiled_scan_does_not_unroll():
    def function(u, delta, A, B, C):
        return selective_scan(u * 2, delta, A, B, C, delta_softplus=True, return_final_state=True)

    for length in (1, 300):  # unrolled, 300 steps would take minutes
        tensors, _ = make_case("bare", length, batch=1)
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="eager", fullgraph=length == 1)
        for got, want in zip(compiled(**tensors), function(**tensors), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_one_token_exports():
    class Step(torch.nn.Module):
        def forward(self, u, delta, A, B, C, initial_state):
            return selective_scan(u, delta, A, B, C, initial_state=initial_state, return_final_state=True)

    inputs = tuple(make_case("bare state", 1)[0].values())
    got, want = torch.export.export(Step(), inputs).module()(*inputs), Step()(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_explain_names_the_path():
    tensors, options = make_case("bare", 3)
    selective_scan(**tensors, **options)
    assert explain()["selective_scan"].backend == "torch"
    assert explain()["selective_scan"].reason == "auto: the inputs are on cpu"


U, A, B = torch.zeros(2, 6, 8), torch.zeros(8, 3), torch.zeros(2, 6, 3)
GROUPED, OFFSETS = torch.zeros(2, 6, 3, 3), torch.tensor([0, 2, 6]).int()
GIVEN = {"u": U, "delta": U, "A": A, "B": B, "C": B}
ONE = GIVEN | {"u": U[:1], "delta": U[:1], "B": B[:1], "C": B[:1]}
WRONG = {
    "u is flat": (GIVEN | {"u": U[0]}, r"u \(float32 \[6, 8\]\) must be a float \[batch, length, channels\]; reshape"),
    "u is int": (GIVEN | {"u": U.long()}, r"u \(int64 \[2, 6, 8\]\) must be a float"),
    "no length": (
        {"u": U[:, :0], "delta": U[:, :0], "A": A, "B": B[:, :0], "C": B[:, :0]},
        r"length is 0 in u \(float32 \[2, 0, 8\]\) but must be at least 1",
    ),
    "delta": (
        GIVEN | {"delta": U[:, :5]},
        r"delta \(float32 \[2, 5, 8\]\) must be a float \[batch, length, channels\] = \[2, 6, 8\] because u is",
    ),
    "A is flat": (GIVEN | {"A": A[:, 0]}, r"A \(float32 \[8\]\) must be a float \[channels, state\]"),
    "A is transposed": (GIVEN | {"A": A.T}, r"A \(float32 \[3, 8\]\) must be a float \[channels, state\] = \[8, 8\]"),
    "B": (
        GIVEN | {"B": B[..., :2]},
        r"B \(float32 \[2, 6, 2\]\) must be .* = \[2, 6, 3\] because u .* and A is float32",
    ),
    "groups": (
        GIVEN | {"B": GROUPED, "C": GROUPED},
        r"B \(float32 \[2, 6, 3, 3\]\) has 3 groups, which must divide the channels \(8\)",
    ),
    "C": (GIVEN | {"C": B[:, :5]}, r"C \(float32 \[2, 5, 3\]\) must be a float .* = \[2, 6, 3\] because u"),
    "D": (GIVEN | {"D": A}, r"D \(float32 \[8, 3\]\) must be a float \[channels\] = \[8\]"),
    "bias": (GIVEN | {"delta_bias": A[:7, 0]}, r"delta_bias \(float32 \[7\]\) must be a float \[channels\] = \[8\]"),
    "z": (GIVEN | {"z": B}, r"z \(float32 \[2, 6, 3\]\) must be a float \[batch, length, channels\] = \[2, 6, 8\]"),
    "mask": (
        GIVEN | {"mask": U[..., 0]},
        r"mask \(float32 \[2, 6\]\) must be a bool \[batch, length\] = \[2, 6\]; use",
    ),
    "mask and packed": (
        ONE | {"mask": U[:1, :, 0].bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets are int64": (ONE | {"cu_seqlens": OFFSETS.long()}, r"cu_seqlens \(int64 \[3\]\) must be a 1-D int32"),
    "offsets are a list": (ONE | {"cu_seqlens": [0, 6]}, r"cu_seqlens \(list\) must be a 1-D int32"),
    "offsets and batch": (
        GIVEN | {"cu_seqlens": OFFSETS},
        r"cu_seqlens \(3 offsets\) must come with batch 1 but .* 2",
    ),
    "offsets too short": (ONE | {"cu_seqlens": OFFSETS[:2]}, r"cu_seqlens \(from 0 to 2\) must go from 0 to .* 6"),
    "offsets fall": (
        ONE | {"cu_seqlens": torch.tensor([0, 4, 3, 6]).int()},
        r"cu_seqlens \(offset 2 is 3, after 4\) must not decrease",
    ),
    "state": (
        GIVEN | {"initial_state": torch.zeros(2, 3, 8)},
        r"initial_state \(float32 \[2, 3, 8\]\) must be a float \[batch, channels, state\] = \[2, 8, 3\]",
    ),
    "packed state": (
        ONE | {"cu_seqlens": OFFSETS, "initial_state": torch.zeros(1, 8, 3)},
        r"initial_state \(float32 \[1, 8, 3\]\) must be a float \[sequences, channels, state\] = \[2, 8, 3\]",
    ),
    "device": (GIVEN | {"A": A.to("meta")}, r"A \(meta\) must be on the device of u \(cpu\); move it"),
    "backend": (
        GIVEN | {"backend": "cuda"},
        r"backend \('cuda'\) must be one of 'auto', 'reference', 'torch', 'triton'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)
