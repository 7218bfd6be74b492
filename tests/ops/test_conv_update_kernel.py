"""The Triton kernels of causal_conv1d, causal_conv1d_update and selective_state_update under Triton's interpreter.

Every case is compared with the float64 definition; memory handed to the kernels is filled with NaN.
"""

import importlib.util
import sys

import pytest
import torch

from undersong.ops import _dispatch
from undersong.ops.causal_conv1d import causal_conv1d, causal_conv1d_update
from undersong.ops.selective_state_update import selective_state_update

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="runs Triton's interpreter"
    ),
]
CASES = ["plain", "state", "left", "right", "middle", "state middle", "all masked", "packed", "packed state"]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles and several programs at lengths the interpreter can afford."""
    conv = kernel_module("conv")
    cut = {"ROWS": 4, "BLOCK_C": 4, "num_warps": 1}
    monkeypatch.setattr(conv, "FORWARD", dict.fromkeys((True, False), cut))
    monkeypatch.setattr(conv, "BACKWARD", dict.fromkeys((True, False), cut | {"TILES": 2}))
    monkeypatch.setattr(conv, "BLOCK_C", 4)


def kernel_module(name):
    x = torch.zeros(1, 1, 1)
    causal_conv1d(x, x[0], backend="triton")  # loads the package
    return sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.{name}"]


def conv_case(case, length, channels=6, width=4, bias=True, dtype=torch.float32):
    """(x, weight, bias), options; masked tokens hold NaN."""
    generator = torch.Generator().manual_seed(0)
    packed = "packed" in case
    batch = 1 if packed else 2
    x = torch.randn(batch, length, channels, generator=generator)
    weight, shift = (torch.randn(shape, generator=generator) for shape in ((channels, width), (channels,)))
    options, rows = {}, batch
    if packed:  # an empty sequence in the middle, and one of a single token
        cuts = sorted({0, min(1, length), length // 3, length - length // 4})
        options["cu_seqlens"] = torch.tensor([*cuts, cuts[-1], length]).int()
        rows = len(options["cu_seqlens"]) - 1
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"] = mask
            x = x.masked_fill(~mask[..., None], torch.nan)
    if "state" in case:
        options["initial_state"] = torch.randn(rows, channels, width, generator=generator)
    inputs = [x.to(dtype), weight.to(dtype), shift.to(dtype) if bias else None]
    return inputs, options


def evaluate(inputs, options, backend, activation="silu", double=False):
    """Output, final window and all gradients under random upstream gradients of both, by name."""

    def leaf(x):
        return None if x is None else x.detach().to(torch.float64 if double else x.dtype).clone().requires_grad_()

    named = dict(zip(("x", "weight", "bias"), map(leaf, inputs), strict=True))
    options = dict(options)
    if "initial_state" in options:
        named["state"] = options["initial_state"] = leaf(options["initial_state"])
    y, window = causal_conv1d(
        named["x"], named["weight"], named["bias"], activation, **options, return_final_state=True, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (y, window)]
    leaves = {name: t for name, t in named.items() if t is not None}
    gradients = torch.autograd.grad([y, window], list(leaves.values()), upstream)
    return {"y": y, "window": window} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_equal(got, want, tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        difference = (x.double() - y.double()).abs().max().item() if x.numel() else 0.0
        scale = max(y.abs().max().item(), 1.0)
        assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [2, 13])
def test_convolution_equals_the_definition(small_tiles, case, length):
    inputs, options = conv_case(case, length)
    got = evaluate(inputs, options, "triton")
    assert_equal(got, evaluate(inputs, options, "reference", double=True), 1e-5)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("activation", [None, "swish"])
@pytest.mark.parametrize("bias", [False, True])
def test_widths_biases_and_activations(small_tiles, width, activation, bias):
    inputs, options = conv_case("state middle", 9, width=width, bias=bias)
    got = evaluate(inputs, options, "triton", activation)
    assert_equal(got, evaluate(inputs, options, "reference", activation, double=True), 1e-5)


def test_convolution_at_the_shipped_tile_sizes():
    inputs, options = conv_case("state middle", 150, channels=70)
    assert_equal(evaluate(inputs, options, "triton"), evaluate(inputs, options, "reference", double=True), 1e-5)


@pytest.mark.parametrize("layout", ["time contiguous", "half of a projection"])
def test_convolution_reads_views_where_they_lie(layout):
    inputs, options = conv_case("state", 21, channels=16)
    want = evaluate(inputs, options, "reference", double=True)
    x = inputs[0]
    if layout == "time contiguous":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = torch.cat([x, x + 1], 2)[..., :16]
    # evaluate() clones its leaves, which would undo the view
    got = {}
    x = x.detach().requires_grad_()
    weight, bias, state = (t.clone().requires_grad_() for t in (*inputs[1:], options["initial_state"]))
    y, window = causal_conv1d(x, weight, bias, "silu", initial_state=state, return_final_state=True, backend="triton")
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator) for t in (y, window)]
    upstream[0] = upstream[0].transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad([y, window], [x, weight, bias, state], upstream)
    got = {"y": y, "window": window} | dict(zip(("dx", "dweight", "dbias", "dstate"), gradients, strict=True))
    assert x.stride() != y.stride()
    assert_equal(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    inputs, options = conv_case("state", 11, dtype=dtype)
    got = evaluate(inputs, options, "triton")
    assert got["y"].dtype == got["dweight"].dtype == dtype
    assert got["window"].dtype == torch.float32
    assert_equal(got, evaluate(inputs, options, "reference", double=True), {torch.bfloat16: 8e-3}.get(dtype, 1e-3))


def test_offsets_that_lie_never_leave_the_row(small_tiles):
    """On a GPU the host does not read the offsets: whatever they hold, nothing outside the row may come in."""
    conv = kernel_module("conv")
    room = torch.full((3, 8, 4), 1e30)
    room[1] = torch.randn(8, 4)
    x, weight = room[1:2], torch.randn(4, 4)
    for offsets in ([-9, 5, 3, 99], [0, 400, -7, 8], [2, 3, 3, 4]):
        y, window = conv.causal_conv1d(x, weight, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
        assert y.shape == x.shape
        assert window.shape == (3, 4, 4)
        assert y.nan_to_num().abs().max() < 1e6  # NaN: no sequence covers the token


def step_inputs(batch=3, channels=5, width=4):
    generator = torch.Generator().manual_seed(2)
    shapes = (batch, channels), (batch, channels, width), (channels, width), (channels,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_step_equals_the_definition(masked, inplace, width):
    x, state, weight, bias = step_inputs(width=width)
    mask = torch.tensor([True, False, True]) if masked else None
    if masked:
        x[1] = torch.nan
    want, new = causal_conv1d_update(x, state, weight, bias, "silu", mask=mask, backend="reference")
    held = state.clone()
    y, got = causal_conv1d_update(x, held, weight, bias, "silu", mask=mask, inplace=inplace, backend="triton")
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(got, new)
    assert (got is held) == inplace
    if not inplace:
        assert torch.equal(held, state)


def test_convolution_step_keeps_the_dtype_of_a_window_in_place():
    x, state, weight, bias = step_inputs()
    held = state.bfloat16()
    want, new = causal_conv1d_update(x, held, weight, bias, backend="reference")
    y, got = causal_conv1d_update(x, held, weight, bias, inplace=True, backend="triton")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(got, new.bfloat16())


def test_convolution_step_has_the_gradients_of_the_convolution():
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in step_inputs()]
        mask = torch.tensor([True, False, True])
        y, new = causal_conv1d_update(*leaves, "silu", mask=mask, backend=backend)
        results.append(torch.autograd.grad(y.sum() + new.square().sum(), leaves))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def update_inputs(kind, groups=1, batch=3, n=6):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "mamba":
        channels = 8
        inner = {"state": normal(batch, channels, n), "x": normal(batch, channels), "dt": normal(batch, channels)}
        inner |= {"A": -normal(channels, n).exp(), "z": normal(batch, channels)}
        heads = channels
    else:
        heads, dim = 4, 3
        inner = {"state": normal(batch, heads, dim, n), "x": normal(batch, heads, dim), "dt": normal(batch, heads)}
        inner |= {"A": -normal(heads).exp(), "z": normal(batch, heads, dim)}
    B, C = (normal(batch, groups, n) if groups else normal(batch, n) for _ in range(2))
    return inner | {"B": B, "C": C, "D": normal(heads), "dt_bias": normal(heads), "dt_softplus": True}


@pytest.mark.parametrize(("kind", "groups"), [("mamba", 0), ("mamba", 2), ("mamba2", 1), ("mamba2", 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_state_update_equals_the_definition(kind, groups, masked, inplace):
    inputs = update_inputs(kind, groups)
    mask = torch.tensor([True, False, True]) if masked else None
    if masked:
        for name in ("x", "dt", "B", "C", "z"):
            inputs[name][1] = torch.nan
    want, new = selective_state_update(**inputs, mask=mask, backend="reference")
    held = inputs["state"].clone()
    y, got = selective_state_update(**inputs | {"state": held}, mask=mask, inplace=inplace, backend="triton")
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, new, rtol=1e-5, atol=1e-5)
    assert (got is held) == inplace
    if not inplace:
        assert torch.equal(held, inputs["state"])


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("left_out", ["D", "z", "dt_bias", "dt_softplus"])
@pytest.mark.parametrize("limit", [(0.0, float("inf")), (0.2, 0.7)])
def test_state_update_options(kind, left_out, limit):
    inputs = update_inputs(kind)
    inputs[left_out] = False if left_out == "dt_softplus" else None
    want = selective_state_update(**inputs, dt_limit=limit, backend="reference")
    got = selective_state_update(**inputs, dt_limit=limit, backend="triton")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_state_update_over_several_programs_and_views(monkeypatch):
    monkeypatch.setattr(kernel_module("update"), "TILE", 16)  # two rows a program
    inputs = update_inputs("mamba2", groups=2)
    inputs["x"] = inputs["x"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["B"] = torch.cat([inputs["B"], inputs["B"]], 2)[..., :6]
    want = selective_state_update(**inputs, backend="reference")
    got = selective_state_update(**inputs, backend="triton")
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "want"), [(-40.0, 4.248354255291589e-18), (-12.0, 6.144193e-06), (60.0, 60.0)])
def test_softplus_is_exact_far_from_zero(x, want):
    """A step size of 1e-18 is not 0: the state takes it in."""
    state, one = torch.zeros(1, 1, 1), torch.ones(1, 1)
    _, new = selective_state_update(state, one, x * one, -0.0 * one, one, one, dt_softplus=True, backend="triton")
    assert new.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_state_update_has_the_gradients_of_the_scan(kind):
    results = []
    for backend in ("triton", "reference"):
        inputs = update_inputs(kind)
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        mask = torch.tensor([True, False, True])
        y, new = selective_state_update(**inputs | leaves, dt_limit=(0.05, 2.0), mask=mask, backend=backend)
        results.append(torch.autograd.grad(y.sum() + new.square().sum(), list(leaves.values())))
    for name, got, want in zip(leaves, *results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_kernels_refuse_what_they_cannot_compute():
    conv = kernel_module("conv")
    x, state, weight, bias = step_inputs()
    with pytest.raises(TypeError, match="the kernel computes in float32, got float64 inputs"):
        conv.causal_conv1d_update(x.double(), state, weight, bias)
    with pytest.raises(ValueError, match=r"activation \('gelu'\) must be one of None, 'silu', 'swish'"):
        conv.causal_conv1d(x[:, None], weight, bias, "gelu")


def test_torch_compile_sees_operators():
    """A plain call launches at once; traced code, and code that records gradients, goes through the operators."""
    conv, update = kernel_module("conv"), kernel_module("update")
    x, state, weight, bias = step_inputs()
    inputs = update_inputs("mamba2")
    flags = inputs.pop("dt_softplus")

    def steps(x, window, state):
        y, window = conv.causal_conv1d_update(x, window, weight, bias, "silu")
        full, _ = conv.causal_conv1d(x[:, None], weight, bias)
        out, state = update.selective_state_update(**inputs | {"state": state}, dt_softplus=flags)
        return y, full, window, out, state

    torch._dynamo.reset()
    want = steps(x, state, inputs["state"])
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(x, state, inputs["state"]), want, strict=True):
        assert torch.equal(got, expected)


def test_a_backward_pass_does_not_use_a_state_that_was_overwritten():
    x, state, weight, bias = step_inputs()
    loss = (state * weight.clone().requires_grad_()).sum()  # saves the state
    causal_conv1d_update(x, state, weight, bias, inplace=True, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operators_pass_torchs_own_checks():
    """Schemas, fake results and autograd registration, as `torch.compile` relies on them."""
    operators = kernel_module("registry").OPERATORS
    x, state, weight, bias = step_inputs(batch=2)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    leaves = [t.clone().requires_grad_() for t in (x[:, None].repeat(1, 3, 1), weight, bias, state)]
    torch.library.opcheck(operators.conv_forward.default, (*leaves, mask, None, True))
    for name in ("conv_step", "conv_step_"):
        torch.library.opcheck(getattr(operators, name).default, (x, state.clone(), weight, bias, None, True))
    inputs = list(update_inputs("mamba2").values())
    state, x, dt, A, z, B, C, D, dt_bias, _ = inputs
    arguments = (state, x, dt, A, B, C, D, z, dt_bias, True, 0.0, float("inf"), None)
    for name in ("update", "update_"):
        torch.library.opcheck(getattr(operators, name).default, arguments)
