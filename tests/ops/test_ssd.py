"""Every backend against the float64 reference; then the op's own laws, and stock transformers where it is right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import ssd

INF = float("inf")
CASES = ["plain", "state", "left", "right", "middle", "state middle", "all masked", "packed", "packed state"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_case(
    case,
    length,
    batch=2,
    heads=4,
    groups=2,
    head_dim=3,
    state=5,
    skip="heads",
    gate=False,
    softplus=True,
    limit=(0.0, INF),
    dtype=torch.float32,
):
    """(inputs by name, keywords). The step sizes span 1e-3 to 5, the decays e^-20 to 1."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch = 1 if "packed" in case else batch
    inputs = {"x": normal(batch, length, heads, head_dim).to(dtype), "dt": 2 * normal(batch, length, heads) - 1}
    inputs["A"] = -4 * torch.rand(heads, generator=generator)
    inputs |= {name: normal(batch, length, groups, state).to(dtype) for name in "BC"}
    if skip:
        inputs["D"] = normal(heads, head_dim) if skip == "head_dim" else normal(heads)
    if gate:
        inputs["z"] = normal(batch, length, heads, head_dim).to(dtype)
    if softplus:
        inputs["dt_bias"] = normal(heads)
    else:
        inputs["dt"] = inputs["dt"].exp()
    options, rows = {"dt_softplus": softplus, "dt_limit": limit}, batch
    if "packed" in case:  # an empty sequence in the middle and one at the end
        offsets = [0, length // 3, length // 3, length - length // 4, length, length]
        options["cu_seqlens"], rows = torch.tensor(offsets).int(), 5
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"] = mask
            for name in {"x", "dt", "B", "C", "z"} & inputs.keys():  # padding may hold anything
                inputs[name][~mask] = torch.nan
    if "state" in case:
        inputs["state"] = normal(rows, heads, head_dim, state)
    return inputs, options


def call(inputs, options, **more):
    inputs = dict(inputs)
    state = inputs.pop("state", None)
    return ssd(**inputs, **options, initial_state=state, return_final_state=True, **more)


def evaluate(case, backend, double=False, **more):
    """Output, state, and the gradients of everything under random upstream gradients on output and state, by name."""
    inputs, options = case
    leaves = {
        k: x.detach().to(torch.float64 if double else x.dtype, copy=True).requires_grad_() for k, x in inputs.items()
    }
    y, state = call(leaves, options, backend=backend, **more)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream, materialize_grads=True)
    return {"y": y, "state": state} | {f"d{k}": g for k, g in zip(leaves, gradients, strict=True)}


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        difference, scale = (x.double() - y).abs().max().item(), y.abs().max().item() or 1.0
        assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 35])
def test_matches_reference(length, case):
    case = make_case(case, length)
    assert_equal(evaluate(case, "torch", chunk_size=16), evaluate(case, "reference", double=True), 1e-5)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"skip": None, "softplus": False},
        {"skip": "head_dim", "gate": True, "limit": (0.05, 1.0)},
        {"head_dim": 1, "state": 1, "limit": (0.05, INF)},
    ],
    ids=["bare", "everything", "one by one"],
)
def test_every_option_in_every_grouping(options, groups, case):
    case = make_case(case, 21, groups=groups, **options)
    assert_equal(evaluate(case, "torch", chunk_size=8), evaluate(case, "reference", double=True), 1e-5)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
def test_float64_to_the_last_digits(case):
    case = make_case(case, 40, gate=True)
    got, want = (evaluate(case, backend, double=True, chunk_size=7) for backend in ("torch", "reference"))
    assert {x.dtype for x in got.values()} == {torch.float64}
    assert_equal(got, want, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_in_half_out_and_states_in_float32(backend, dtype):
    case = make_case("state right", 70, gate=True, dtype=dtype)
    got, want = evaluate(case, backend), evaluate(case, "reference", double=True)
    assert {got[name].dtype for name in ("y", "dx", "dB", "dC", "dz")} == {dtype}
    assert {got[name].dtype for name in ("state", "ddt", "dA", "dD", "dstate")} == {torch.float32}
    half = {name: x for name, x in got.items() if x.dtype == dtype}
    assert_equal(half, {name: want[name] for name in half}, torch.finfo(dtype).eps)  # one rounding, at the end
    assert_equal({"state": got["state"]}, {"state": want["state"]}, 1e-5)


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 64, 1000])
def test_chunk_size_does_not_change_the_result(chunk_size):
    case = make_case("state left", 100)
    assert_equal(evaluate(case, "torch", chunk_size=chunk_size), evaluate(case, "reference", double=True), 1e-5)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize("length", [1, 9])
def test_gradcheck(case, length):
    inputs, options = make_case(case, length, heads=2, head_dim=2, state=2, skip="head_dim", gate=True)
    leaves = [x.nan_to_num().double().requires_grad_() for x in inputs.values()]

    def function(*tensors):
        return call(dict(zip(inputs, tensors, strict=True)), options, chunk_size=4, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("case", ["plain", "packed state"])
def test_very_strong_decay_loses_nothing_that_comes_after_it(case):
    """Decays of e^-1e4 and e^-1e-3 in one chunk: float32 sums of their logarithms would be off by 1e-3."""
    torch.manual_seed(0)
    inputs, options = make_case(case, 60, softplus=False)
    inputs["A"] = -1 - torch.rand(4)
    inputs["dt"] = torch.where(torch.rand(inputs["dt"].shape) < 0.2, 1e4, 1e-3 * (1 + torch.rand(inputs["dt"].shape)))
    inputs["x"] = inputs["x"] / inputs["dt"][..., None]
    got, want = evaluate((inputs, options), "torch"), evaluate((inputs, options), "reference", double=True)
    assert_equal(got, want, 1e-5)
    inputs["x"], inputs["dt"] = 1e-35 * inputs["x"], torch.full_like(inputs["dt"], 1e35)
    inputs["A"] = torch.full_like(inputs["A"], -1e5)  # dt A is beyond float32
    assert all(x.isfinite().all() for x in call(inputs, options))


@pytest.mark.parametrize("length", [1, 30])
def test_transposed_inputs_and_slices_of_a_projection(length):
    inputs, options = make_case("state left", length, gate=True)
    views = dict(inputs)
    for name in ("x", "z", "B", "C"):  # [batch, ..., length] in memory
        views[name] = inputs[name].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    views["dt"] = torch.stack([inputs["dt"]] * 3, -1)[..., 1]
    views["state"] = inputs["state"].mT.contiguous().mT
    with torch.no_grad():
        for got, want in zip(call(views, options), call(inputs, options), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert_equal(evaluate((views, options), "torch"), evaluate((inputs, options), "reference", double=True), 1e-5)


def test_masked_tokens_take_no_step_even_where_the_limit_asks_for_one():
    inputs, options = make_case("state right", 12, limit=(0.5, 1.0))
    inputs = {name: x[:1] if x.shape[0] == 2 and name != "A" else x for name, x in inputs.items()}
    mask = options.pop("mask")[:1]
    kept = {name: x[:, mask[0]] if name in ("x", "dt", "B", "C") else x for name, x in inputs.items()}
    (y, state), (want_y, want_state) = call(inputs, options, mask=mask), call(kept, options)
    torch.testing.assert_close(y[mask], want_y[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(state, want_state, rtol=0, atol=1e-5)
    assert y[~mask].eq(0).all()


def test_all_masked_rows_and_empty_sequences_return_the_state_they_were_given():
    inputs, options = make_case("all masked state", 9)
    assert torch.equal(call(inputs, options)[1][0], inputs["state"][0])
    inputs, options = make_case("packed state", 9)
    assert torch.equal(call(inputs, options)[1][[1, 4]], inputs["state"][[1, 4]])


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("length", [1, 5])
def test_no_rows_in_no_rows_out(backend, length):
    inputs, options = make_case("state", length, batch=0)
    got = evaluate((inputs, options), backend)
    assert got["y"].shape == (0, length, 4, 3)
    assert got["state"].shape == (0, 4, 3, 5)
    assert got["dA"].eq(0).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 89), max_size=4, unique=True), groups=st.sampled_from([1, 2, 4]))
def test_any_split_chained_by_its_states_equals_the_whole(cuts, groups):
    inputs, options = make_case("plain", 90, groups=groups)
    whole, want = call(inputs, options)
    outputs = []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 90], strict=True):
        part = {k: v[:, begin:end] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items() if k != "state"}
        y, inputs["state"] = call(part | ({"state": inputs["state"]} if begin else {}), options)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs["state"], want, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_packed_equals_separate(lengths):
    inputs, options = make_case("plain", sum(lengths), batch=1)
    initial = torch.randn(len(lengths), 4, 3, 5)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    y, state = call(inputs | {"state": initial}, options, cu_seqlens=offsets, chunk_size=16)
    begin = 0
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[n], initial[n])
            continue
        part = {k: v[:, begin : begin + length] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
        want_y, want_state = call(part | {"state": initial[n : n + 1]}, options)
        torch.testing.assert_close(y[:, begin : begin + length], want_y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state[n : n + 1], want_state, rtol=1e-5, atol=1e-5)
        begin += length


@pytest.mark.parametrize("length", [1, 7, 64, 100])
def test_equals_the_chunk_scan_of_transformers(length):
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    inputs, options = make_case("state", length, limit=(0.01, 2.0))
    want, want_state = mamba2_chunk_scan(
        *(inputs[k] for k in ("x", "dt", "A", "B", "C")),
        chunk_size=32,
        D=inputs["D"],
        dt_bias=inputs["dt_bias"],
        initial_states=inputs["state"],
        return_final_states=True,
        **options,
    )
    y, state = call(inputs, options)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, want_state, rtol=1e-5, atol=1e-5)


def test_without_decay_it_is_linear_attention_and_with_full_decay_it_sees_one_token():
    x, B, C = torch.randn(1, 50, 2, 3), torch.randn(1, 50, 1, 4), torch.randn(1, 50, 1, 4)
    dt = torch.rand(1, 50, 2)
    weights = (C[:, :, 0] @ B[:, :, 0].mT).tril()
    y = ssd(x, dt, torch.zeros(2), B, C)
    torch.testing.assert_close(y, torch.einsum("bij,bjh,bjhp->bihp", weights, dt, x), rtol=1e-5, atol=1e-5)
    y = ssd(x, dt, torch.full((2,), -1e9), B, C)
    own = weights.diagonal(dim1=1, dim2=2)[..., None, None]
    torch.testing.assert_close(y, own * dt[..., None] * x, rtol=1e-5, atol=1e-6)


def test_training_keeps_no_matrix_of_the_chunks():
    """What waits for the backward pass: the inputs, and one state a chunk."""
    inputs, options = make_case("plain", 256, heads=8, groups=1, head_dim=8, state=8)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call(leaves, options)
    inputs_bytes = sum(x.nbytes for x in leaves.values())
    states_bytes = 256 // 64 * 8 * 8 * 8 * 4
    assert (
        sum({x.data_ptr(): x.nbytes for x in saved}.values()) <= inputs_bytes + states_bytes + 3 * leaves["dt"].nbytes
    )


X, DT, A, B = torch.zeros(2, 6, 4, 3), torch.zeros(2, 6, 4), torch.zeros(4), torch.zeros(2, 6, 2, 5)
OFFSETS = torch.tensor([0, 2, 6]).int()
ROW = X[:1], DT[:1], A, B[:1], B[:1]
WRONG = {
    "x is flat": (
        (X[0], DT, A, B, B),
        {},
        r"x \(float32 \[6, 4, 3\]\) must be a float \[batch, length, heads, head_dim\]",
    ),
    "x is int": ((X.long(), DT, A, B, B), {}, r"x \(int64 \[2, 6, 4, 3\]\) must be a float"),
    "dt differs": (
        (X, DT[:, :5], A, B, B),
        {},
        r"dt \(float32 \[2, 5, 4\]\) must be a float .* = \[2, 6, 4\] because x is float32 \[2, 6, 4, 3\]",
    ),
    "A is a matrix": ((X, DT, DT[0], B, B), {}, r"A \(float32 \[6, 4\]\) must be a float \[heads\] = \[4\]"),
    "B is too long": (
        (X, DT, A, torch.zeros(2, 7, 2, 5), B),
        {},
        r"B \(float32 \[2, 7, 2, 5\]\) must be .* = \[2, 6, 2, 5\]",
    ),
    "groups do not divide": (
        (X, DT, A, torch.zeros(2, 6, 3, 5), B),
        {},
        r"B \(float32 \[2, 6, 3, 5\]\) has 3 groups, which must divide the heads \(4\)",
    ),
    "C differs": (
        (X, DT, A, B, B[..., :4]),
        {},
        r"C \(float32 \[2, 6, 2, 4\]\) must be .* because B is float32 \[2, 6, 2, 5\]",
    ),
    "D": ((X, DT, A, B, B, A[:3]), {}, r"D \(float32 \[3\]\) must be a float \[heads\] = \[4\]"),
    "D of channels": ((X, DT, A, B, B, X[0, 0].T), {}, r"D \(float32 \[3, 4\]\) must be .* = \[4, 3\]"),
    "z": ((X, DT, A, B, B, A, DT), {}, r"z \(float32 \[2, 6, 4\]\) must be .* = \[2, 6, 4, 3\]"),
    "dt_bias": ((X, DT, A, B, B, A, X, A[:1]), {}, r"dt_bias \(float32 \[1\]\) must be a float \[heads\] = \[4\]"),
    "limit": (
        (X, DT, A, B, B),
        {"dt_limit": (1.0, 0.1)},
        r"dt_limit \(\(1.0, 0.1\)\) must be a pair \(lowest, highest\)",
    ),
    "chunk": ((X, DT, A, B, B), {"chunk_size": 0}, r"chunk_size \(0\) must be an integer of at least 1"),
    "length 0": ((X[:, :0], DT[:, :0], A, B[:, :0], B[:, :0]), {}, r"length is 0 in x \(float32 \[2, 0, 4, 3\]\)"),
    "mask is float": (
        (X, DT, A, B, B),
        {"mask": DT[..., 0]},
        r"mask \(float32 \[2, 6\]\) must be a bool .* = \[2, 6\]",
    ),
    "mask and packed": (
        ROW,
        {"mask": torch.ones(1, 6).bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets are int64": (
        ROW,
        {"cu_seqlens": OFFSETS.long()},
        r"cu_seqlens \(int64 \[3\]\) must be a 1-D int32 tensor",
    ),
    "offsets and batch": (
        (X, DT, A, B, B),
        {"cu_seqlens": OFFSETS},
        r"cu_seqlens \(3 offsets\) must come with batch 1 but batch is 2",
    ),
    "offsets too short": (
        ROW,
        {"cu_seqlens": OFFSETS[:2]},
        r"cu_seqlens \(from 0 to 2\) must go from 0 to the length 6",
    ),
    "state": (
        (X, DT, A, B, B),
        {"initial_state": torch.zeros(2, 4, 5, 3)},
        r"initial_state \(float32 \[2, 4, 5, 3\]\) must be a float \[batch, heads, head_dim, state\] = \[2, 4, 3, 5\]",
    ),
    "packed state": (
        ROW,
        {"initial_state": torch.zeros(1, 4, 3, 5), "cu_seqlens": OFFSETS},
        r"initial_state \(float32 \[1, 4, 3, 5\]\) must be a float \[sequences, .* = \[2, 4, 3, 5\]",
    ),
    "backend": (
        (X, DT, A, B, B),
        {"backend": "cuda"},
        r"backend \('cuda'\) must be one of 'auto', 'reference', 'torch', 'triton'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        ssd(*inputs, **options)
