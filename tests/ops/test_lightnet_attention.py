"""Every backend against the float64 reference; then the op's own laws. Memory handed to kernels is filled with NaN."""

import sys

import pytest
import torch

from undersong.ops import _dispatch, available_backends
from undersong.ops.lightnet_attention import lightnet_attention

BACKENDS = [b for b in available_backends("lightnet_attention") if b != "reference"]
CASES = ["plain", "state", "left", "right", "middle", "state middle", "all masked", "packed", "packed state"]
NAMES = ("o", "S", "m", "u", "dq", "dk", "dv", "dS0", "du0")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks at lengths the interpreter can afford."""
    assert _dispatch._kernel_problem("lightnet_attention", torch.device("cpu")) is None  # loads the kernel
    plan = sys.modules[f"{_dispatch._KERNELS['lightnet'].__name__}.plan"]
    monkeypatch.setattr(plan, "CHUNK", dict.fromkeys((True, False), 16))


def make_case(case, length, *, spread=1.0, batch=2, heads=2, dim=4, value_dim=3, phase=False, seed=0):
    """(q, k, v, keywords) in float32; keys are uniform in [-spread, spread]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    packed = "packed" in case
    batch = 1 if packed else batch
    halves = 2 if phase else 1
    q, v = normal(batch, length, heads, halves * dim), normal(batch, length, heads, value_dim)
    k = (torch.rand(batch, length, heads, dim, generator=generator) * 2 - 1) * spread
    options, rows = {}, batch
    if phase:
        options["phase"] = normal(1, length, heads, dim) * 3
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
            q, k, v = (x.masked_fill(~mask[..., None, None], torch.nan) for x in (q, k, v))  # may hold anything
    if "state" in case:
        u = torch.rand(rows, heads, dim, generator=generator) + 0.1
        u[0, 0, 0] = 0.0  # an empty channel, whatever its m is
        options["initial_state"] = normal(rows, heads, halves * dim, value_dim), normal(*u.shape) * spread / 3, u
    return q, k, v, options


def evaluate(case, backend, dtype=torch.float32, causal=True):
    """Output, state, and the gradients of everything under random upstream gradients on output and state, by name."""
    *tensors, options = case
    options = dict(options)
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in tensors]
    wide = torch.promote_types(dtype, torch.float32)
    if "initial_state" in options:
        S, m, u = options["initial_state"]
        leaves += [x.detach().to(wide, copy=True).requires_grad_() for x in (S, u)]
        options["initial_state"] = leaves[3], m.to(wide), leaves[4]
    generator = torch.Generator().manual_seed(1)
    if not causal:
        o = lightnet_attention(*leaves[:3], causal=False, **options, backend=backend)
        gradients = torch.autograd.grad(o, leaves, torch.randn(o.shape, generator=generator).to(o))
        return dict(zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True))
    o, (S, m, u) = lightnet_attention(*leaves[:3], **options, return_final_state=True, backend=backend)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, S, u)]
    gradients = torch.autograd.grad([o, S, u], leaves, upstream)
    return dict(zip(NAMES, (o, S, m, u, *gradients), strict=False))


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
@pytest.mark.parametrize(("length", "spread"), [(1, 60.0), (20, 1.0), (67, 60.0)])
def test_torch_matches_reference(length, spread, case):
    """Keys near each other share a level; keys in [-60, 60] do not."""
    case = make_case(case, length, spread=spread)
    assert_equal(evaluate(case, "torch"), evaluate(case, "reference", torch.float64), 1e-5, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_triton_matches_reference(case):
    case = make_case(case, 35)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5, 1e-4)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize("length", [1, 18])
def test_triton_walks_token_by_token_where_keys_rise_far(length, case):
    case = make_case(case, length, spread=60.0, heads=1)
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", torch.float64), 1e-5, 1e-4)


@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("length", [63, 64, 65, 300])
def test_torch_matches_reference_at_chunk_edges(length, spread):
    case = make_case("plain", length, spread=spread, batch=1, heads=1)
    assert_equal(evaluate(case, "torch"), evaluate(case, "reference", torch.float64), 1e-5, 1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("causal", [True, False])
def test_phases_match_reference(case, causal):
    case = make_case(case if causal else case.replace("state", ""), 40, phase=True)
    if not causal:
        case[3].pop("initial_state", None)
    got = evaluate(case, "torch", causal=causal)
    assert_equal(got, evaluate(case, "reference", torch.float64, causal=causal), 1e-5, 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "state" not in case])
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_order_matches_reference(backend, case):
    case = make_case(case, 35, spread=60.0, heads=1)
    got = evaluate(case, backend, causal=False)
    assert_equal(got, evaluate(case, "reference", torch.float64, causal=False), 1e-5, 1e-4)


@pytest.mark.parametrize("dims", [(1, 1), (33, 17), (20, 70)])
@pytest.mark.parametrize("causal", [True, False])
def test_triton_takes_any_dims_and_views(dims, causal):
    dim, value_dim = dims
    q, k, v, options = make_case("left", 20, heads=1, dim=dim, value_dim=value_dim)
    views = *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), options
    want = evaluate((q, k, v, options), "reference", torch.float64, causal)
    assert_equal(evaluate(views, "triton", causal=causal), want, 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_half_in_half_out_and_states_in_float32(backend, dtype):
    """k in [-60, 60] with no infinity or NaN; the scan itself is in float32, so only the cast of the output rounds."""
    q, k, v, options = make_case("state right", 24, spread=60.0, batch=1, heads=1)
    case = *(x.to(dtype) for x in (q, k, v)), options
    got, want = evaluate(case, backend, dtype), evaluate(case, "reference", torch.float64)
    assert {got[name].dtype for name in ("o", "dq", "dk", "dv")} == {dtype}
    assert {got[name].dtype for name in ("S", "m", "u", "dS0", "du0")} == {torch.float32}
    one_ulp = torch.finfo(dtype).eps  # Triton's interpreter cuts bfloat16 off where the device rounds
    for name, tolerance in {"o": one_ulp, "S": 1e-5, "m": 1e-5, "u": 1e-5}.items():
        assert_equal({name: got[name]}, {name: want[name]}, tolerance, None)


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize("phase", [False, True])
def test_gradcheck(case, phase):
    """Of functions of the true state (S and u e^m): m moves with k, but is carried without gradient."""
    q, k, v, options = make_case(case, 5, batch=1, heads=1, dim=2, value_dim=1, phase=phase)
    tensors = [x.double().masked_fill(x.isnan(), 0.0).requires_grad_() for x in (q, k, v)]
    if phase:
        tensors.append(options.pop("phase").double().requires_grad_())
    state = options.pop("initial_state", None)
    if state is not None:
        S, m, u = (x.double() for x in state)
        u = u.clamp(min=0.2)  # emptiness is a point where nothing is smooth
        tensors += [S.requires_grad_(), u.requires_grad_()]

    def function(q, k, v, *rest):
        given = dict(options)
        if phase:
            given["phase"], *rest = rest
        if rest:
            given["initial_state"] = rest[0], m, rest[1]
        o, (S, level, u) = lightnet_attention(q, k, v, **given, return_final_state=True, backend="torch")
        return o, S, u * level.masked_fill(u == 0, 0.0).exp()

    assert torch.autograd.gradcheck(function, tensors)
    if state is None:
        both_ways = tensors[:3], {**options, **({"phase": tensors[3]} if phase else {})}
        assert torch.autograd.gradcheck(lambda *x: lightnet_attention(*x, causal=False, **both_ways[1]), both_ways[0])


@pytest.mark.parametrize("splits", [(30, 25, 1, 9), (1, 64), (64, 1)])
@pytest.mark.parametrize("phase", [False, True])
def test_any_split_equals_the_whole(splits, phase):
    q, k, v, options = make_case("plain", 65, spread=60.0, phase=phase)
    want, last = lightnet_attention(q, k, v, **options, return_final_state=True)
    state, outputs, begin = None, [], 0
    for length in splits:
        at = slice(None), slice(begin, begin + length)
        given = {name: x[at] for name, x in options.items()}
        o, state = lightnet_attention(q[at], k[at], v[at], **given, initial_state=state, return_final_state=True)
        outputs.append(o)
        begin += length
    assert (torch.cat(outputs, 1) - want).abs().max() <= 1e-5
    assert all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(state, last, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_equal_keys_give_plain_means(causal):
    q, _, v, _ = make_case("plain", 70)
    o = lightnet_attention(q, torch.full_like(q, 3.0), v, causal=causal)
    mean = v.cumsum(1) / torch.arange(1, 71)[:, None, None] if causal else v.mean(1, keepdim=True).expand_as(v)
    assert (o - 4**-0.5 * q.sum(-1, keepdim=True) * mean).abs().max() <= 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_one_token_reads_itself(causal):
    q, k, v, _ = make_case("plain", 1, spread=60.0)
    o = lightnet_attention(q, k, v, causal=causal, scale=0.7)
    assert (o - 0.7 * q.sum(-1, keepdim=True) * v).abs().max() <= 1e-6


def test_without_order_permutations_permute_and_the_last_causal_position_agrees():
    q, k, v, _ = make_case("plain", 23)
    q, k, v = q.double(), k.double(), v.double()
    o = lightnet_attention(q, k, v, causal=False)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert (lightnet_attention(q[:, order], k[:, order], v[:, order], causal=False) - o[:, order]).abs().max() < 1e-14
    assert (lightnet_attention(q, k, v)[:, -1] - o[:, -1]).abs().max() < 1e-14


def test_masked_positions_are_zero_and_get_no_gradient():
    case = make_case("state middle", 40)
    got = evaluate(case, "torch")
    hidden = ~case[3]["mask"]
    for name in ("o", "dq", "dk", "dv"):
        assert (got[name][hidden] == 0).all(), name


def test_a_thousand_tokens_equal_the_closed_form():
    case = make_case("plain", 1000, spread=60.0, batch=1, heads=1, dim=2, value_dim=2)
    assert_equal(evaluate(case, "torch"), evaluate(case, "reference", torch.float64), 1e-5, 1e-4)


def test_channels_added_to_by_a_constant_change_nothing():
    """A softmax knows its logits up to a constant, also one far outside of what e^k can hold."""
    q, k, v, _ = make_case("plain", 30)
    shift = torch.tensor([500.0, -500.0, 0.0, 80.0])
    for causal in (True, False):
        want = lightnet_attention(q, k, v, causal=causal)
        assert (lightnet_attention(q, k + shift, v, causal=causal) - want).abs().max() < 2e-4  # k + 500 rounds at 3e-5


def refuses(message, *tensors, **options):
    with pytest.raises(ValueError, match=message):
        lightnet_attention(*tensors, **options)


def test_errors_name_argument_value_and_fix():
    q, k, v, _ = make_case("plain", 5)
    refuses(r"k \(float32 \[5, 2, 4\]\) must be a float \[batch, length, heads, dim\]", q, k[0], v)
    refuses(r"q \(float32 \[2, 5, 2, 3\]\) must be a float \[batch, length, heads, dim\] = \[2, 5, 2, 4\]",
            q[..., :3], k, v)  # fmt: skip
    refuses(r"q .* must be a float \[batch, length, heads, 2 \* dim\] = \[2, 5, 2, 8\]", q, k, v, phase=k)
    refuses(r"v \(float32 \[2, 4, 2, 3\]\) must be .* = \[2, 5, 2, 3\]", q, k, v[:, :4])
    refuses(r"phase \(float32 \[2, 4, 2, 4\]\) must be .* = \[2, 5, 2, 4\]",
            torch.cat([q, q], -1), k, v, phase=k[:, :4])  # fmt: skip
    refuses(r"length is 0 in k", q[:, :0], k[:, :0], v[:, :0])
    refuses(
        r"mask \(int64 \[2, 5\]\) must be a bool \[batch, length\] = \[2, 5\]", q, k, v, mask=torch.ones(2, 5).long()
    )
    refuses(r"cu_seqlens \(from 0 to 4\) must go from 0 to the length 5",
            q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 4]).int())  # fmt: skip
    refuses(r"initial_state \(Tensor\) must be a triple \(S, m, u\)", q, k, v, initial_state=q)
    refuses(r"initial_state's S \(float32 \[2, 2, 4, 4\]\) must be a float \[batch, heads, dim, value_dim\]",
            q, k, v, initial_state=(torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))  # fmt: skip
    refuses("return_final_state needs causal=True", q, k, v, causal=False, return_final_state=True)
    refuses("initial_state needs causal=True", q, k, v, causal=False, initial_state=(q, k, v))
    with pytest.raises(RuntimeError, match="phases are multiplied in by the torch path only"):
        lightnet_attention(torch.cat([q, q], -1), k, v, phase=k, backend="triton")
    wide = torch.zeros(1, 2, 1, 130)
    with pytest.raises(RuntimeError, match=r"dim 130 and value_dim 3 must not exceed the 128"):
        lightnet_attention(wide, wide, v[:1, :2, :1], backend="triton")
