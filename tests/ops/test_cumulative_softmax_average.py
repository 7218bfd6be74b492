"""Every backend against the float64 reference; then the op's own laws. Memory handed to kernels is filled with NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import available_backends, cumulative_softmax_average
from undersong.ops.cumulative_softmax_average import _prefixes

BACKENDS = [b for b in available_backends("cumulative_softmax_average") if b != "reference"]
CASES = ["plain", "state", "left", "right", "middle", "state middle", "all masked", "packed", "packed state"]
NAMES = ("o", "m", "u", "w", "ds", "dv", "du0", "dw0")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, and groups of chunks, at lengths the interpreter can afford."""
    function = kernel_module("function")
    forward = {"CHUNK": 16, "ROWS": 2, "BATCH": 4, "num_warps": 1}
    backward = {"CHUNK": 16, "SUM_T": 16, "SUM_STAGES": 1, "BLOCK_T": 16, "num_warps": 1}
    monkeypatch.setattr(function, "FORWARD", dict.fromkeys((True, False), forward))
    monkeypatch.setattr(function, "BACKWARD", dict.fromkeys((True, False), backward))


def kernel_module(name):
    import sys

    from undersong.ops import _dispatch

    cumulative_softmax_average(*make_case("plain", 1)[:2], backend="triton")  # loads it
    return sys.modules[f"{_dispatch._KERNELS['cumulative_softmax_average'].__name__}.{name}"]


def make_case(case, length, batch=2, heads=2, dim=5, dtype=torch.float32, seed=0):
    """(s, v, keywords): s spans [-80, 80], with an outlier of 80 at the end of the first tile."""
    generator = torch.Generator().manual_seed(seed)
    packed = "packed" in case
    batch = 1 if packed else batch
    s = torch.rand(batch, length, heads, generator=generator) * 160 - 80
    if length >= 64:
        s[:, 63] = 80.0
    v = torch.randn(batch, length, heads, dim, generator=generator).to(dtype)
    options, rows = {}, batch
    if packed:  # an empty sequence in the middle
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
        rows = 4
    mask = torch.ones(batch, length, dtype=torch.bool)
    spans = {"left": slice(0, (length + 1) // 2), "right": slice(length // 2, None), "all masked": slice(None)}
    spans["middle"] = slice(length // 3, length // 3 + 1 + length // 4)
    for name, span in spans.items():
        if name in case:
            mask[0, span] = False
            options["mask"] = mask
            s, v = s.clone(), v.masked_fill(~mask[..., None, None], torch.nan)  # padding may hold anything
            s[~mask] = torch.nan
    if "state" in case:
        u = torch.rand(rows, heads, generator=generator) + 0.1
        u[0, 0] = 0.0  # empty, whatever its m is
        m = torch.randn(rows, heads, generator=generator) * 20
        options["initial_state"] = (m, u, torch.randn(rows, heads, dim, generator=generator))
    return s, v, options


def evaluate(case, backend, double=False):
    """Output, state, and the gradients of everything under random upstream gradients on output and state, by name."""
    s, v, options = case
    options = dict(options)

    def leaf(x):
        return x.detach().to(torch.float64 if double else x.dtype, copy=True).requires_grad_()

    leaves = [leaf(s), leaf(v)]
    if "initial_state" in options:
        m, u, w = options["initial_state"]
        leaves += [leaf(u), leaf(w)]
        options["initial_state"] = (m.double() if double else m, *leaves[2:])
    o, (m, u, w) = cumulative_softmax_average(*leaves[:2], **options, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, u, w)]
    gradients = torch.autograd.grad([o, u, w], leaves, upstream)
    return dict(zip(NAMES, (o, m, u, w, *gradients), strict=False))


def assert_equal(got, want, tolerance, gradient_tolerance):
    assert got.keys() == want.keys()
    for name, x in got.items():
        y = want[name]
        assert x.shape == y.shape, name
        scale = max(y[y.isfinite()].abs().max().item(), 1.0) if y.isfinite().any() else 1.0
        difference = torch.where(x.double() == y, 0.0, (x.double() - y).abs())
        limit = gradient_tolerance if name.startswith("d") else tolerance
        assert not difference.isnan().any(), f"{name} has NaN"
        assert difference.max() <= limit * scale, f"{name} is off by {difference.max() / scale:.1e}, allowed {limit}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend, length, case):
    case = make_case(case, length)
    assert_equal(evaluate(case, backend), evaluate(case, "reference", double=True), 1e-5, 1e-4)


def test_torch_matches_reference_over_many_tiles():
    case = make_case("state middle", 4097, batch=1, heads=1)
    assert_equal(evaluate(case, "torch"), evaluate(case, "reference", double=True), 1e-5, 1e-4)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
def test_triton_matches_reference_over_chunks_and_groups(small_chunks, case):
    case = make_case(case, 34 * 16 - 5, heads=1)  # more chunks than one group has
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", double=True), 1e-5, 1e-4)


@pytest.mark.parametrize("dim", [1, 33, 70])
def test_triton_takes_any_dim_and_views(dim):
    s, v, options = make_case("state left", 20, dim=dim)
    wide = torch.zeros(2, 20, 3, 2, dim)
    wide[:, :, 1] = v
    views = s.transpose(1, 2).contiguous().transpose(1, 2), wide[:, :, 1], options  # of a fused projection
    assert_equal(evaluate(views, "triton"), evaluate((s, v, options), "reference", double=True), 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_half_in_half_out_and_states_in_float32(backend, dtype):
    case = make_case("state right", 65, dtype=dtype)
    got, want = evaluate(case, backend), evaluate(case, "reference", double=True)
    assert {got[name].dtype for name in ("o", "dv")} == {dtype}
    assert {got[name].dtype for name in ("m", "u", "w", "ds", "dw0")} == {torch.float32}
    one_ulp = torch.finfo(dtype).eps  # Triton's interpreter cuts bfloat16 off where the device rounds
    for name, tolerance in {"o": one_ulp, "m": 1e-5, "u": 1e-5, "w": 1e-5}.items():
        assert_equal({name: got[name]}, {name: want[name]}, tolerance, None)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
def test_gradcheck(case):
    """Of functions of the true state (u e^m, w e^m): m moves with s, but is carried without gradient."""
    s, v, options = make_case(case, 35, batch=1, heads=1, dim=1)
    leaves = [(s / 40).nan_to_num().double().requires_grad_(), v.nan_to_num().double().requires_grad_()]
    m, u, w = options.pop("initial_state", (None, None, None))
    if u is not None:
        leaves += [(u + 0.5).double().requires_grad_(), w.double().requires_grad_()]

    def function(s, v, *state):
        state = (m.double() / 20, *state) if state else None
        o, (m1, u1, w1) = cumulative_softmax_average(
            s, v, initial_state=state, return_final_state=True, backend="torch", **options
        )
        return o, w1 / u1[..., None], m1 + u1.log()

    assert torch.autograd.gradcheck(function, leaves)


def test_double_backward_of_the_torch_path():
    s, v, _ = make_case("plain", 6, batch=1, heads=1, dim=2)
    s, v = (s / 40).double().requires_grad_(), v.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s, v: cumulative_softmax_average(s, v, backend="torch"), (s, v))


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 150), max_size=4))
def test_any_split_chained_by_its_states_equals_the_whole(cuts):
    s, v, _ = make_case("plain", 150)
    whole, want = cumulative_softmax_average(s, v, return_final_state=True)
    state, outputs = None, []
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), 150], strict=True):
        o, state = cumulative_softmax_average(
            s[:, begin:end], v[:, begin:end], initial_state=state, return_final_state=True
        )
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-5)
    for x, y in zip(state, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), empty=st.sets(st.integers(0, 2)))
def test_joining_states_is_associative_and_the_empty_state_is_neutral(seed, empty):
    """(m, u, w) as elements of a scan: (A B) C = A (B C), whichever of them are empty."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.rand(1, 1, 3, generator=generator, dtype=torch.float64) * 160 - 80
    u = torch.rand(1, 1, 3, generator=generator, dtype=torch.float64) + 0.1
    w = torch.randn(1, 1, 3, 2, generator=generator, dtype=torch.float64)
    for index in empty:
        m[..., index], u[..., index], w[..., index, :] = -math.inf, 0.0, 0.0

    def join(*states):
        """One state out of several, `[1, 1, 1(, dim)]` each."""
        return tuple(x[:, :, -1:] for x in _prefixes(*(torch.cat(parts, 2) for parts in zip(*states, strict=True))))

    a, b, c = (tuple(x[:, :, i : i + 1] for x in (m, u, w)) for i in range(3))
    want = join(a, b, c)
    for got in (join(join(a, b), c), join(a, join(b, c))):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-300)
    nothing = (torch.full_like(m[:, :, :1], -math.inf), torch.zeros_like(u[:, :, :1]), torch.zeros_like(w[:, :, :1]))
    for got in (join(nothing, a), join(a, nothing)):
        for x, y in zip(got, a, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=0)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_packed_equals_separate(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    s, v, _ = make_case("plain", sum(lengths), batch=1)
    o, state = cumulative_softmax_average(s, v, cu_seqlens=offsets, return_final_state=True)
    parts = [
        cumulative_softmax_average(a, b, return_final_state=True)
        for a, b in zip(s.split(lengths, 1), v.split(lengths, 1), strict=True)
    ]
    torch.testing.assert_close(o, torch.cat([x for x, _ in parts], 1), rtol=0, atol=1e-5)
    for x, y in zip(state, map(torch.cat, zip(*(y for _, y in parts), strict=True)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_output_is_ordinary_attention_with_one_query(backend):
    q, k = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 70, 8)
    v = torch.randn(2, 1, 70, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0, 0]
    s = (q * k).sum(-1).transpose(1, 2) / math.sqrt(8)
    got = cumulative_softmax_average(s, v.transpose(1, 2), backend=backend)[:, -1, 0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_added_to_s_changes_nothing_and_equal_s_gives_the_running_mean(backend):
    s, v = torch.randint(-8, 8, (1, 66, 2)).float(), torch.randn(1, 66, 2, 3)
    shifted = cumulative_softmax_average(s + 32, v, backend=backend)
    torch.testing.assert_close(shifted, cumulative_softmax_average(s, v, backend=backend), rtol=0, atol=1e-6)
    mean = v.cumsum(1) / torch.arange(1, 67).view(1, -1, 1, 1)
    torch.testing.assert_close(cumulative_softmax_average(s * 0 - 7, v, backend=backend), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3)])
def test_nothing_in_nothing_out_and_the_state_passes_through(backend, shape):
    s, v = torch.zeros(shape[:3]), torch.zeros(shape)
    state = torch.full((shape[0], 2), 0.5), torch.ones(shape[0], 2), torch.ones(shape[0], 2, 3)
    o, new = cumulative_softmax_average(s, v, initial_state=state, return_final_state=True, backend=backend)
    assert o.shape == shape
    if shape[1] == 0:
        assert all(torch.equal(x, y) for x, y in zip(new, state, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_a_zeroed_state_is_empty_and_all_masked_rows_leave_it_so(backend):
    s, v, options = make_case("all masked", 9)
    o, (m, u, w) = cumulative_softmax_average(s, v, **options, return_final_state=True, backend=backend)
    assert o[0].eq(0).all()
    assert m[0].eq(-math.inf).all()
    assert u[0].eq(0).all()
    assert w[0].eq(0).all()
    s, v, _ = make_case("plain", 9)
    zeroed = tuple(torch.zeros(x) for x in ((2, 2), (2, 2), (2, 2, 5)))  # m = 0 lies far above many scores
    got = cumulative_softmax_average(s - 200, v, initial_state=zeroed, backend=backend)
    torch.testing.assert_close(got, cumulative_softmax_average(s - 200, v, backend="torch"), rtol=0, atol=1e-5)


def test_one_token_step_exports():
    class Step(torch.nn.Module):
        def forward(self, s, v, m, u, w):
            return cumulative_softmax_average(s, v, initial_state=(m, u, w), return_final_state=True)

    inputs = torch.randn(1, 1, 2), torch.randn(1, 1, 2, 3), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, 3)
    got, want = torch.export.export(Step(), inputs).module()(*inputs), Step()(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["plain", "state"])
def test_the_kernels_operator_is_registered_soundly(case):
    """Schema, fake tensors, autograd and dynamic tracing, which `can_torch_compile` of its layer promises."""
    s, v, options = make_case(case, 20)
    state = [x.requires_grad_(i > 0) for i, x in enumerate(options.get("initial_state", ()))] or [None] * 3
    operator = kernel_module("function")._operator.operator.default
    torch.library.opcheck(operator, (s.requires_grad_(), v.requires_grad_(), *state, None, None))


S, V = torch.zeros(2, 6, 3), torch.zeros(2, 6, 3, 4)
OFFSETS = torch.tensor([0, 2, 6]).int()
FALLING = torch.tensor([0, 4, 3, 6]).int()
WRONG = {
    "s is flat": ((S[0], V), {}, r"s \(float32 \[6, 3\]\) must be a float \[batch, length, heads\]"),
    "v differs": ((S, V[:, :5]), {}, r"v \(float32 \[2, 5, 3, 4\]\) must be .* because s is float32 \[2, 6, 3\]"),
    "v is int": ((S, V.long()), {}, r"v \(int64 \[2, 6, 3, 4\]\) must be a float"),
    "mask is float": ((S, V), {"mask": S[..., 0]}, r"mask \(float32 \[2, 6\]\) must be a bool .* = \[2, 6\]"),
    "mask and packed": (
        (S[:1], V[:1]),
        {"mask": S[:1, :, 0].bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets are int64": (
        (S[:1], V[:1]),
        {"cu_seqlens": OFFSETS.long()},
        r"cu_seqlens \(int64 \[3\]\) must be a 1-D int32 tensor",
    ),
    "offsets and batch": (
        (S, V),
        {"cu_seqlens": OFFSETS},
        r"cu_seqlens \(3 offsets\) must come with batch 1 but batch is 2",
    ),
    "offsets too short": (
        (S[:1], V[:1]),
        {"cu_seqlens": OFFSETS[:2]},
        r"cu_seqlens \(from 0 to 2\) must go from 0 to the length 6",
    ),
    "offsets fall": (
        (S[:1], V[:1]),
        {"cu_seqlens": FALLING},
        r"cu_seqlens \(offset 2 is 3, after 4\) must not decrease",
    ),
    "state is a tensor": ((S, V), {"initial_state": S}, r"initial_state \(Tensor\) must be a triple"),
    "state's w": (
        (S, V),
        {"initial_state": (S[:, 0], S[:, 0], S)},
        r"initial_state's w \(float32 \[2, 6, 3\]\) must be a float \[batch, heads, dim\] = \[2, 3, 4\]",
    ),
    "backend": (
        (S, V),
        {"backend": "cuda"},
        r"backend \('cuda'\) must be one of 'auto', 'reference', 'torch', 'triton'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        cumulative_softmax_average(*inputs, **options)
