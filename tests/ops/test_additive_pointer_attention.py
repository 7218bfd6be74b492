"""Every backend against the float64 definition; then the op's own laws. Fresh memory is filled with NaN."""

import importlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import _dispatch, available_backends, explain
from undersong.ops.additive_pointer_attention import additive_pointer_attention

pytestmark = pytest.mark.usefixtures("one_thread")
module = importlib.import_module("undersong.ops.additive_pointer_attention")
BACKENDS = [b for b in available_backends("additive_pointer_attention") if b != "reference"]
MASKS = ["none", "left", "right", "middle", "a whole row"]
NAMES = ("logits", "dWe", "dWd", "dv")
# batch, T, n, hidden: one of each, odd sizes, one step, one position, more hidden units than positions and fewer
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (3, 1, 9, 16), (2, 17, 1, 33), (1, 20, 18, 130), (4, 6, 11, 3)]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def blocks_for_few_units(monkeypatch):
    """The blocked path also where it would not pay."""
    monkeypatch.setattr(module, "FEW", 0)


@pytest.fixture
def kernel():
    """The module that launches the kernels."""
    if "triton" not in BACKENDS:
        pytest.skip("Triton's interpreter is off, or Triton is not installed")
    additive_pointer_attention(*make_case(1, 1, 1, 1)[0], backend="triton")  # loads the package
    return sys.modules[f"{_dispatch._KERNELS['pointer'].__name__}.function"]


def make_case(batch, T, n, hidden, mask="none", scale=1.0, dtype=torch.float32, seed=0):
    """((We, Wd, v), mask); NaN stands under the mask."""
    generator = torch.Generator().manual_seed(seed)
    We, Wd, v = (torch.randn(s, generator=generator) for s in ((batch, n, hidden), (batch, T, hidden), (hidden,)))
    We, Wd = We * scale, Wd * scale
    spans = {"left": slice(0, n // 2), "right": slice(n - n // 2, None), "middle": slice(n // 3, n // 2)}
    spans["a whole row"] = slice(None)
    valid = None
    if mask != "none":
        valid = torch.ones(batch, n, dtype=torch.bool)
        valid[0, spans[mask]] = False
        We[~valid] = torch.nan
    return tuple(x.to(dtype) for x in (We, Wd, v)), valid


def evaluate(inputs, mask, backend, dtype=None):
    """Logits and all gradients under a random upstream gradient, by name. The gradient is NaN where no logit is."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    logits = additive_pointer_attention(*leaves, mask=mask, backend=backend)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    upstream = upstream.masked_fill(logits == -torch.inf, torch.nan)
    return dict(zip(NAMES, (logits, *torch.autograd.grad(logits, leaves, upstream)), strict=True))


def assert_equal(got, want, tolerance):
    """By name, within `tolerance` of the largest finite entry of what is wanted; infinities in the same places."""
    for name, x in got.items():
        y = want[name].double()
        assert x.shape == y.shape, name
        assert not x.isnan().any(), f"{name} has NaN"
        if not x.numel():
            continue
        difference = torch.where(x == y, 0.0, (x.double() - y).abs()).max().item()
        scale = max(y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0, 1e-30)
        assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-T{}-n{}-H{}".format(*s))
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_definition(backend, shape, mask):
    inputs, valid = make_case(*shape, mask)
    want = evaluate(inputs, valid, "reference", torch.float64)
    assert_equal(evaluate(inputs, valid, backend), want, 3e-6)


def test_the_definition_is_a_sum_over_units():
    (We, Wd, v), mask = make_case(2, 3, 4, 5, "right", dtype=torch.float64)
    logits = additive_pointer_attention(We, Wd, v, mask=mask, backend="reference")
    for b, t, j in ((0, 1, 1), (1, 2, 3)):
        want = sum(v[h] * torch.tanh(We[b, j, h] + Wd[b, t, h]) for h in range(5))
        torch.testing.assert_close(logits[b, t, j], want)
    assert logits[0, :, 2:].eq(-torch.inf).all()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 4.0, 10.0, 100.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_precise_for_small_and_for_saturated_units(backend, scale):
    """A thousandth of the units' range is as precise as the range, and so are sums in which We and Wd cancel."""
    (We, Wd, v), _ = make_case(2, 6, 7, 64, scale=scale)
    Wd[:, 0] = -We[:, 0]
    want = evaluate((We, Wd, v), None, "reference", torch.float64)
    assert_equal(evaluate((We, Wd, v), None, backend), want, 2e-6)


@pytest.mark.parametrize("far", [20.0, 30.0, 60.0, 500.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_far_below_the_others_is_exact_too(backend, dtype, far):
    """e^{2x} of either input over- or underflows, their sum is an ordinary number."""
    We = torch.tensor([far, far - 1.0, 0.5, -far]).view(1, 4, 1)
    Wd = torch.tensor([-far + 1.0, 0.25, far]).view(1, 3, 1)
    inputs = We, Wd, torch.ones(1)
    if (backend, dtype) == ("triton", torch.float64):
        with pytest.raises(RuntimeError, match="cannot run additive_pointer_attention: float64 inputs are computed"):
            evaluate(inputs, None, backend, dtype)
        return
    want = evaluate(inputs, None, "reference", torch.float64)
    assert_equal(evaluate(inputs, None, backend, dtype), want, 2e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_units_saturate_and_nan_shows(backend):
    We, Wd = torch.tensor([torch.inf, -torch.inf, 1.0]).view(1, 3, 1), torch.tensor([0.0, torch.inf]).view(1, 2, 1)
    logits = additive_pointer_attention(We, Wd, torch.ones(1), backend=backend)
    torch.testing.assert_close(logits[0, 0], torch.tensor([1.0, -1.0, 1.0]).mul(torch.tensor([1.0, 1.0, 0.7615942])))
    assert logits[0, 1].nan_to_num(7.0).eq(torch.tensor([1.0, 7.0, 1.0])).all()  # inf - inf is no number


@pytest.mark.parametrize("block", [1, 40, 200, 700])
def test_the_cut_into_blocks_does_not_show(monkeypatch, block):
    """One step, a few steps, one row and two rows of five at once."""
    inputs, mask = make_case(5, 7, 9, 5, "left", dtype=torch.float64)
    monkeypatch.setattr(module, "BLOCK", block)
    assert_equal(evaluate(inputs, mask, "torch"), evaluate(inputs, mask, "reference"), 1e-13)


@pytest.mark.parametrize("mask", ["none", "middle"])
def test_chunks_of_steps_add_up_in_the_kernel(kernel, monkeypatch, mask):
    """Three chunks of two tiles of steps, two tiles of positions and of units, none of them full."""
    cut = {"BLOCK_T": 2, "BLOCK_N": 4, "BLOCK_H": 4, "num_warps": 1}
    monkeypatch.setattr(kernel, "FORWARD", {True: cut, False: cut})
    monkeypatch.setattr(kernel, "BACKWARD", cut | {"CHUNK": 4})
    inputs, valid = make_case(2, 11, 7, 6, mask)
    got = evaluate(inputs, valid, "triton")
    assert_equal(got, evaluate(inputs, valid, "reference", torch.float64), 3e-6)


@pytest.mark.parametrize("mask", ["none", "left"])
def test_the_kernels_operator_is_registered_soundly(kernel, mask):
    """Schema, fake tensors, autograd and dynamic tracing, which `can_torch_compile` of its layer promises."""
    inputs, valid = make_case(2, 3, 5, 7, mask)
    leaves = [x.nan_to_num().requires_grad_() for x in inputs]
    torch.library.opcheck(kernel._operator.operator.default, (*leaves, valid))


@pytest.mark.parametrize("mask", ["none", "middle", "a whole row"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (1, 1, 1, 1), (2, 1, 3, 2)])
def test_gradcheck(shape, mask):
    inputs, valid = make_case(*shape, mask, dtype=torch.float64)
    leaves = [x.nan_to_num().requires_grad_() for x in inputs]

    def scores(*x):
        logits = additive_pointer_attention(*x, mask=valid, backend="torch")
        return logits if valid is None else logits.masked_fill(~valid[:, None], 0.0)

    assert torch.autograd.gradcheck(scores, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_views_in_place(backend):
    (We, Wd, v), mask = make_case(3, 5, 6, 8, "left")
    views = We.transpose(0, 2).contiguous().transpose(0, 2), torch.stack([Wd, Wd], -1)[..., 0], torch.stack([v, v], -1)
    views = *views[:2], views[2][:, 1]
    assert not any(x.is_contiguous() for x in views)
    want = evaluate((We, Wd, v), mask, "reference", torch.float64)
    assert_equal(evaluate(views, mask.repeat(1, 2)[:, :6], backend), want, 3e-6)
    expanded = We[:1].expand(3, -1, -1), Wd[:, :1].expand(-1, 5, -1), v
    got = additive_pointer_attention(*expanded, mask=mask[:1].expand(3, -1), backend=backend)
    want = additive_pointer_attention(*(x.double() for x in expanded), mask=mask[:1].expand(3, -1))
    assert_equal({"logits": got}, {"logits": want}, 3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_half_inputs_give_float32_logits_and_half_gradients(backend, dtype):
    """Of the rounded inputs; the gradients are rounded once."""
    inputs, mask = make_case(2, 4, 6, 40, "right", dtype=dtype)
    got, want = evaluate(inputs, mask, backend), evaluate(inputs, mask, "reference", torch.float64)
    assert got["logits"].dtype == torch.float32
    assert {got[name].dtype for name in NAMES[1:]} == {dtype}
    assert_equal({"logits": got["logits"]}, want, 3e-6)
    assert_equal(got, want, torch.finfo(dtype).eps)


def test_autocast_does_not_round_the_scores():
    inputs, mask = make_case(2, 4, 6, 40, "right")
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(inputs, mask, "torch")
    assert all(torch.equal(x, y) for x, y in zip(got.values(), evaluate(inputs, mask, "torch").values(), strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_in_nothing_out(backend, shape):
    inputs, _ = make_case(*shape)
    got = evaluate(inputs, None, backend)
    assert got["logits"].shape == (shape[0], shape[1], shape[2])
    assert all(x.eq(0).all() for x in got.values())


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), left=st.booleans(), T=st.integers(1, 4))
def test_padded_equals_each_row_alone(lengths, left, T):
    (We, Wd, v), _ = make_case(len(lengths), T, max(lengths), 6)
    places = torch.arange(max(lengths))
    mask = torch.stack([places >= max(lengths) - n if left else places < n for n in lengths])
    logits = additive_pointer_attention(We, Wd, v, mask=mask)
    for row, valid in enumerate(mask):
        alone = additive_pointer_attention(We[row : row + 1, valid], Wd[row : row + 1], v)
        torch.testing.assert_close(logits[row, :, valid], alone[0], rtol=1e-6, atol=1e-6)
        assert logits[row, :, ~valid].eq(-torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_positions_permutes_the_scores(backend):
    (We, Wd, v), _ = make_case(2, 4, 9, 12)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    logits = additive_pointer_attention(We, Wd, v, backend=backend)
    assert torch.equal(additive_pointer_attention(We[:, order], Wd, v, backend=backend), logits[..., order])


def test_memory_is_that_of_the_scores_and_a_block(monkeypatch):
    """Eager keeps four bytes a hidden unit for the backward pass, and twice as many within it."""
    monkeypatch.setattr(module, "BLOCK", 2**10)
    inputs, mask = make_case(4, 20, 20, 64, "right")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        evaluate(inputs, mask, "torch")
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    assert 4 * 4 * 20 * 20 < peak < 4 * 4 * 20 * 20 * 64 / 2


# torch.compile looks at the gradients of what it goes on with after the graph break, and only hides the warning
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_torch_compile_gives_the_same_scores_and_gradients():
    inputs, mask = make_case(2, 3, 5, 7, "left")
    leaves = [x.nan_to_num().requires_grad_() for x in inputs]

    def double(*x):
        return 2 * additive_pointer_attention(*x, mask=mask).masked_fill(~mask[:, None], 0.0)

    torch._dynamo.reset()
    got, want = torch.compile(double, backend="aot_eager")(*leaves), double(*leaves)
    assert torch.equal(got, want)
    for x, y in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        assert torch.equal(x, y)


def test_exports():
    class Scores(torch.nn.Module):
        def forward(self, We, Wd, v, mask):
            return additive_pointer_attention(We, Wd, v, mask=mask)

    inputs, mask = make_case(2, 3, 5, 7, "left")
    exported = torch.export.export(Scores(), (*inputs, mask)).module()
    torch.testing.assert_close(exported(*inputs, mask), Scores()(*inputs, mask), rtol=1e-6, atol=1e-6)


def test_explain_names_the_backend():
    inputs, _ = make_case(1, 1, 2, 3)
    additive_pointer_attention(*inputs)
    assert explain()["additive_pointer_attention"].backend == "torch"


WE, WD, V = torch.zeros(2, 6, 3), torch.zeros(2, 4, 3), torch.zeros(3)
WRONG = {
    "We is flat": ((WE[0], WD, V), {}, r"We \(float32 \[6, 3\]\) must be a float \[batch, n, hidden\]"),
    "Wd is int": ((WE, WD.long(), V), {}, r"Wd \(int64 \[2, 4, 3\]\) must be a float \[batch, T, hidden\]"),
    "Wd's batch": (
        (WE, WD[:1], V),
        {},
        r"Wd \(float32 \[1, 4, 3\]\) must be .* = \[2, 4, 3\] because We is float32 \[2, 6, 3\]",
    ),
    "Wd's width": ((WE, WD[..., :2], V), {}, r"Wd \(float32 \[2, 4, 2\]\) must be .* = \[2, 4, 3\] because"),
    "v's width": ((WE, WD, V[:2]), {}, r"v \(float32 \[2\]\) must be a float \[hidden\] = \[3\] because We is"),
    "mask is float": (
        (WE, WD, V),
        {"mask": WE[..., 0]},
        r"mask \(float32 \[2, 6\]\) must be a bool \[batch, n\] = \[2, 6\]; use attention_mask.bool\(\)",
    ),
    "mask is short": ((WE, WD, V), {"mask": WE[:, 1:, 0].bool()}, r"mask \(bool \[2, 5\]\) must be .* = \[2, 6\]"),
    "device": ((WE, WD.to("meta"), V), {}, r"Wd \(meta\) must be on the device of We \(cpu\); move it"),
    "backend": ((WE, WD, V), {"backend": "cuda"}, r"backend \('cuda'\) must be one of 'auto', 'reference'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        additive_pointer_attention(*inputs, **options)
