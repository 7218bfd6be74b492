"""Every backend against the float64 reference; then the laws of both ops, and stock transformers where it is right."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import causal_conv1d, causal_conv1d_update

CASES = ["plain", "state", "left", "right", "middle", "scattered state", "all masked", "packed", "packed state"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens, the fewest."""
    monkeypatch.setattr(sys.modules["undersong.ops.causal_conv1d"], "CPU_BLOCK", 1)


def make_case(case, length, batch=2, channels=3, width=4, bias=True, dtype=torch.float32):
    """(inputs by name, keywords)."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    batch = 1 if "packed" in case else batch
    inputs = {"x": normal(batch, length, channels), "weight": normal(channels, width)}
    if bias:
        inputs["bias"] = normal(channels)
    options, rows = {}, batch
    if "packed" in case:  # an empty sequence in the middle and one at the end, and one shorter than the window
        offsets = [0, length // 3, length // 3, length // 2, max(length // 2, length - 2), length, length]
        options["cu_seqlens"], rows = torch.tensor(offsets).int(), 6
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans |= {"middle": slice(length // 3, length // 3 + 1 + length // 4), "scattered": slice(None, None, 2)}
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"] = mask
            inputs["x"][~mask] = torch.nan  # padding may hold anything
    if "state" in case:
        inputs["state"] = normal(rows, channels, width).float()
    return inputs, options


def call(inputs, options, **more):
    inputs = dict(inputs)
    state = inputs.pop("state", None)
    return causal_conv1d(**inputs, **options, initial_state=state, return_final_state=True, **more)


def evaluate(case, backend, double=False, **more):
    """Output, state, and the gradients of everything under random upstream gradients on output and state, by name."""
    inputs, options = case
    dtypes = {name: torch.float64 if double else tensor.dtype for name, tensor in inputs.items()}
    leaves = {name: tensor.detach().to(dtypes[name], copy=True).requires_grad_() for name, tensor in inputs.items()}
    y, state = call(leaves, options, backend=backend, **more)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), upstream, materialize_grads=True)
    return {"y": y, "state": state} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        difference, scale = (x.double() - y).abs().max().item(), y.abs().max().item() or 1.0
        assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 3, 16, 37])
def test_matches_reference(small_blocks, length, case):
    case = make_case(case, length)
    got, want = evaluate(case, "torch", activation="silu"), evaluate(case, "reference", double=True, activation="silu")
    assert_equal(got, want, 1e-5)
    got, want = (evaluate(case, backend, double=True, activation="silu") for backend in ("torch", "reference"))
    assert_equal(got, want, 1e-12)


@pytest.mark.parametrize("case", ["plain", "scattered state", "packed state"])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "swish"])
def test_every_width_and_option(small_blocks, activation, bias, width, case):
    case = make_case(case, 20, width=width, bias=bias)
    got = evaluate(case, "torch", activation=activation)
    assert_equal(got, evaluate(case, "reference", double=True, activation=activation), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", ["state right", "packed state"])
def test_half_in_half_out_and_states_in_float32(case, backend, dtype):
    case = make_case(case, 40, dtype=dtype)
    got, want = evaluate(case, backend, activation="silu"), evaluate(case, "reference", double=True, activation="silu")
    assert {got[name].dtype for name in ("y", "dx", "dweight", "dbias")} == {dtype}
    assert {got[name].dtype for name in ("state", "dstate")} == {torch.float32}
    assert torch.equal(got["state"].double(), want["state"])  # inputs are copied, not computed
    assert_equal({"y": got["y"]}, {"y": want["y"]}, torch.finfo(dtype).eps)  # one rounding, at the end


@pytest.mark.parametrize("case", ["plain", "scattered state", "packed state"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_gradcheck(case, activation):
    inputs, options = make_case(case, 7, batch=2, channels=2, width=3)
    leaves = [tensor.nan_to_num().double().requires_grad_() for tensor in inputs.values()]

    def function(*tensors):
        return call(dict(zip(inputs, tensors, strict=True)), options, activation=activation, backend="torch")

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("case", ["plain", "scattered state"])
def test_transposed_inputs_and_slices_of_a_projection(small_blocks, case):
    inputs, options = make_case(case, 40)
    want = evaluate((inputs, options), "reference", double=True)
    for x in (inputs["x"].mT.contiguous().mT, torch.cat([inputs["x"]] * 2, 2)[..., 3:]):
        assert_equal(evaluate((inputs | {"x": x}, options), "torch"), want, 1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_taps_of_a_token_are_the_valid_tokens_before_it(backend):
    x = torch.tensor([1.0, 2.0, torch.nan, 4.0, torch.nan, 8.0]).view(1, 6, 1)
    mask = ~x[..., 0].isnan()
    weight, state = torch.tensor([[100.0, 10.0, 1.0]]), torch.tensor([[[7.0, 5.0, 3.0]]])
    y, new = causal_conv1d(x, weight, initial_state=state, mask=mask, return_final_state=True, backend=backend)
    assert y.flatten().tolist() == [531, 312, 0, 124, 0, 248]
    assert new.flatten().tolist() == [2, 4, 8]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_fewer_tokens_than_the_window_shift_the_old_one(backend):
    state = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[5.0, 6.0, 7.0, 8.0]]])
    x, weight = torch.tensor([9.0, 10.0, 0.0]).view(1, 3, 1), torch.ones(1, 4)
    options = {"return_final_state": True, "backend": backend}
    _, new = causal_conv1d(x[:, :2], weight, initial_state=state[:1], **options)
    assert new.tolist() == [[[3, 4, 9, 10]]]
    mask = torch.tensor([[False, True, False]])
    _, new = causal_conv1d(x, weight, initial_state=state[:1], mask=mask, **options)
    assert new.tolist() == [[[2, 3, 4, 10]]]
    _, new = causal_conv1d(x, weight, initial_state=state, cu_seqlens=torch.tensor([0, 3, 3]).int(), **options)
    assert new.tolist() == [[[4, 9, 10, 0]], [[5, 6, 7, 8]]]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("case", ["plain", "state"])
def test_no_rows_in_no_rows_out(backend, case):
    got = evaluate(make_case(case, 5, batch=0), backend, mask=torch.ones(0, 5).bool())
    assert got["y"].shape == (0, 5, 3)
    assert got["state"].shape == (0, 3, 4)
    assert got["dweight"].eq(0).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5, unique=True), width=st.integers(1, 5))
def test_any_split_chained_by_its_states_equals_the_whole(cuts, width):
    inputs, options = make_case("plain", 40, width=width)
    whole, want = call(inputs, options)
    outputs, state = [], None
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 40], strict=True):
        part = inputs | {"x": inputs["x"][:, begin:end]}
        y, state = call(part if state is None else part | {"state": state}, options)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, want)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), width=st.integers(1, 5))
def test_packed_equals_separate(lengths, width):
    inputs, options = make_case("plain", sum(lengths), batch=1, width=width)
    initial = torch.randn(len(lengths), 3, width)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    y, state = call(inputs | {"state": initial}, options, cu_seqlens=offsets, activation="silu")
    begin = 0
    for n, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(state[n], initial[n])
            continue
        part = inputs | {"x": inputs["x"][:, begin : begin + length], "state": initial[n : n + 1]}
        want_y, want_state = call(part, options, activation="silu")
        torch.testing.assert_close(y[:, begin : begin + length], want_y, rtol=1e-5, atol=1e-6)
        assert torch.equal(state[n : n + 1], want_state)
        begin += length


@settings(max_examples=25, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=30).filter(any))
def test_any_mask_equals_the_sequence_without_the_masked_tokens(mask):
    inputs, options = make_case("state", len(mask), batch=1)
    seen = torch.tensor(mask)
    (y, state), (want_y, want_state) = (
        call(inputs, options, mask=seen[None]),
        call(inputs | {"x": inputs["x"][:, seen]}, options),
    )
    torch.testing.assert_close(y[:, seen], want_y, rtol=1e-5, atol=1e-6)
    assert torch.equal(state, want_state)
    assert y[:, ~seen].eq(0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_steps_equal_the_whole_and_write_in_place_when_asked(backend, activation):
    inputs, options = make_case("scattered state", 12)
    want, want_state = call(inputs, options, activation=activation, backend=backend)
    state, held = inputs["state"], inputs["state"].clone()
    more = {"weight": inputs["weight"], "bias": inputs["bias"], "activation": activation, "backend": backend}
    for t in range(12):
        x, mask = inputs["x"][:, t], options["mask"][:, t]
        y, state = causal_conv1d_update(x, state, mask=mask, **more)
        y_inplace, same = causal_conv1d_update(x, held, mask=mask, inplace=True, **more)
        assert same is held
        assert torch.equal(y, y_inplace)
        torch.testing.assert_close(y, want[:, t], rtol=1e-5, atol=1e-6)
    assert torch.equal(state, want_state)
    assert torch.equal(held, want_state)
    assert torch.equal(inputs["state"], make_case("scattered state", 12)[0]["state"])  # only inplace=True writes


def test_a_step_has_gradients():
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (2, 3, 4), (3, 4), (3,))]
    mask = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d_update(*t, "silu", mask=mask), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_keeps_the_state_in_the_dtype_it_is_held_in(dtype):
    x, state, weight = torch.randn(2, 3).to(dtype), torch.randn(2, 3, 4), torch.randn(3, 4).to(dtype)
    y, new = causal_conv1d_update(x, state, weight)
    assert (y.dtype, new.dtype) == (dtype, torch.float32)
    held = state.to(dtype)
    assert causal_conv1d_update(x, held, weight, inplace=True)[1] is held
    assert torch.equal(held, new.to(dtype))


@pytest.mark.parametrize("activation", [None, "silu"])
def test_equals_the_convolutions_of_transformers(activation):
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_fn
    from transformers.models.mamba2.modeling_mamba2 import causal_conv1d_update as stock_update

    inputs, options = make_case("plain", 20)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    y, state = call(inputs, options, activation=activation)
    want = causal_conv1d_fn(x.mT, weight, bias, activation).mT
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    stock_state = torch.zeros(2, 3, 4)
    for t in range(20):
        out = stock_update(x[:, t, :, None], stock_state, weight, bias, activation)
    torch.testing.assert_close(y[:, -1], out[..., 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(state, stock_state)


X, W, STATE = torch.zeros(2, 6, 3), torch.zeros(3, 4), torch.zeros(2, 3, 4)
OFFSETS = torch.tensor([0, 2, 6]).int()
WRONG = {
    "x is flat": ((X[0], W), {}, r"x \(float32 \[6, 3\]\) must be a float \[batch, length, channels\]"),
    "weight differs": (
        (X, W.T),
        {},
        r"weight \(float32 \[4, 3\]\) must be a float \[channels, width\] = \[3, 3\] because x is float32 \[2, 6, 3\]",
    ),
    "weight of a module": ((X, W[:, None]), {}, r"weight \(float32 \[3, 1, 4\]\) must be a float \[channels, width\]"),
    "no width": ((X, W[:, :0]), {}, r"weight \(float32 \[3, 0\]\) must have a width of at least 1"),
    "bias": ((X, W, W[0]), {}, r"bias \(float32 \[4\]\) must be a float \[channels\] = \[3\]"),
    "activation": ((X, W, None, "gelu"), {}, r"activation \('gelu'\) must be one of None, 'silu', 'swish'"),
    "length 0": ((X[:, :0], W), {}, r"length is 0 in x \(float32 \[2, 0, 3\]\)"),
    "mask is float": ((X, W), {"mask": X[..., 0]}, r"mask \(float32 \[2, 6\]\) must be a bool .* = \[2, 6\]"),
    "mask and packed": (
        (X[:1], W),
        {"mask": torch.ones(1, 6).bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets and batch": (
        (X, W),
        {"cu_seqlens": OFFSETS},
        r"cu_seqlens \(3 offsets\) must come with batch 1 but batch is 2",
    ),
    "state": (
        (X, W),
        {"initial_state": STATE[..., 1:]},
        r"initial_state \(float32 \[2, 3, 3\]\) must be a float \[batch, channels, width\] = \[2, 3, 4\]",
    ),
    "packed state": (
        (X[:1], W),
        {"initial_state": STATE[:1], "cu_seqlens": OFFSETS},
        r"initial_state \(float32 \[1, 3, 4\]\) must be a float \[sequences, channels, width\] = \[2, 3, 4\]",
    ),
    "backend": ((X, W), {"backend": "cuda"}, r"backend \('cuda'\) must be one of"),
}
WRONG_STEP = {
    "x is a sequence": ((X, STATE, W), {}, r"x \(float32 \[2, 6, 3\]\) must be a float \[batch, channels\]"),
    "state": ((X[:, 0], STATE.mT, W), {}, r"state \(float32 \[2, 4, 3\]\) must be a float .* = \[2, 3, 4\]"),
    "mask": ((X[:, 0], STATE, W), {"mask": X[0, 0] > 0}, r"mask \(bool \[3\]\) must be a bool \[batch\] = \[2\]"),
    "inplace with gradient": (
        (X[:, 0], STATE, W.clone().requires_grad_()),
        {"inplace": True},
        r"inplace \(True\) must be False because a gradient is needed",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*inputs, **options)


@pytest.mark.parametrize("name", WRONG_STEP)
def test_errors_of_a_step(name):
    inputs, options, message = WRONG_STEP[name]
    with pytest.raises(ValueError, match=message):
        causal_conv1d_update(*inputs, **options)
