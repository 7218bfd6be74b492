"""The torch path against the float64 equations and an independent form of Set2Set; then the op's own laws."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops.set2set import set2set

pytestmark = pytest.mark.usefixtures("one_thread")
module = importlib.import_module("undersong.ops.set2set")
CASES = ["plain", "left", "right", "middle", "empty", "packed"]
NAMES = ("memory", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_case(case, batch=3, n=7, hidden=5, dtype=torch.float64, seed=0):
    """(tensors by name, options). Packed sets are 0 to n elements long; NaN stands under masks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape, options = (batch, n, hidden), {}
    if case == "packed":
        offsets = torch.tensor([0, 3, 3, 3 + n, 4 + n, 4 + n]).int()
        shape, options = (1, int(offsets[-1]), hidden), {"cu_seqlens": offsets}
    shapes = (shape, (4 * hidden, 2 * hidden), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    tensors = dict(zip(NAMES, (normal(*s) for s in shapes), strict=True))
    spans = {"left": slice(0, n // 2), "right": slice(n // 2, None), "middle": slice(1, n - 1), "empty": slice(None)}
    if case in spans:
        mask = torch.ones(batch, n, dtype=torch.bool)
        mask[0, spans[case]] = False
        options["mask"] = mask
        tensors["memory"][~mask] = torch.nan
    return {name: x.to(dtype) for name, x in tensors.items()}, options


def evaluate(tensors, options, steps=3, backend="torch", dtype=None):
    """q*, attention and every gradient under random upstream gradients of both, by name."""
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in tensors.items()}
    outputs = set2set(*leaves.values(), steps=steps, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in outputs]
    carry = [(x, g) for x, g in zip(outputs, upstream, strict=True) if x.requires_grad]
    if not carry:
        return dict(zip(("q_star", "attention"), outputs, strict=True))
    found = torch.autograd.grad([x for x, _ in carry], list(leaves.values()), [g for _, g in carry])
    gradients = {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    return dict(zip(("q_star", "attention"), outputs, strict=True)) | gradients


def assert_equal(got, want, tolerance):
    """By name, within `tolerance` of the largest entry of what is wanted."""
    for name, x in got.items():
        y = want[name].double()
        assert x.shape == y.shape, name
        if x.numel():
            difference, scale = (x.double() - y).abs().max().item(), max(y.abs().max().item(), 1e-3)
            assert difference <= tolerance * scale, f"{name} is off by {difference / scale:.1e}, allowed {tolerance}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_equals_the_equations(steps, case):
    tensors, options = make_case(case)
    want = evaluate(tensors, options, steps, "reference")
    assert_equal(evaluate(tensors, options, steps), want, 1e-12)
    assert_equal(evaluate(tensors, options, steps, dtype=torch.float32), want, 1e-5)


@pytest.mark.parametrize(("n", "hidden"), [(1, 1), (1, 6), (9, 1), (33, 16)])
def test_any_number_of_elements_and_units(n, hidden):
    for case in ("plain", "packed"):
        tensors, options = make_case(case, n=n, hidden=hidden)
        assert_equal(evaluate(tensors, options), evaluate(tensors, options, backend="reference"), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_set2set_over_a_batch_vector(backend):
    """The form that graph libraries use: elements with the index of their set, `torch.nn.LSTM`, scatter operations."""
    tensors, options = make_case("packed")
    x, lengths = tensors["memory"][0], options["cu_seqlens"].diff().long()
    sets, hidden = len(lengths), x.shape[1]
    lstm = torch.nn.LSTM(2 * hidden, hidden).double()
    lstm.load_state_dict({f"{name}_l0": tensors[name] for name in NAMES[1:]})
    batch = torch.arange(sets).repeat_interleave(lengths)
    state, q_star = None, x.new_zeros(sets, 2 * hidden)
    for _ in range(4):
        q, state = lstm(q_star[None], state)
        e = (x * q[0][batch]).sum(-1)
        top = x.new_full((sets,), -torch.inf).scatter_reduce(0, batch, e, "amax")
        a = (e - top[batch]).exp()
        a = a / x.new_zeros(sets).index_add(0, batch, a)[batch]
        q_star = torch.cat([q[0], x.new_zeros(sets, hidden).index_add(0, batch, a[:, None] * x)], -1)
    got, attention = set2set(*tensors.values(), steps=4, **options, backend=backend)
    torch.testing.assert_close(got, q_star, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention[0, -1], a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["plain", "left", "empty", "packed"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_gradcheck(steps, case):
    tensors, options = make_case(case, batch=2, n=3, hidden=2)
    leaves = [x.nan_to_num().requires_grad_() for x in tensors.values()]
    if not steps:
        assert not any(x.any() for x in set2set(*leaves, steps=0, **options))
        return
    assert torch.autograd.gradcheck(lambda *x: set2set(*x, steps=steps, **options), leaves)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_padded_equals_packed_equals_each_set_alone_in_any_order(lengths, seed):
    tensors, _ = make_case("plain", batch=1, n=sum(lengths))
    memory, *weights = tensors.values()
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    packed, _ = set2set(memory, *weights, steps=3, cu_seqlens=offsets)
    sets = memory[0].split(lengths)
    rows = torch.nn.utils.rnn.pad_sequence(list(sets), batch_first=True, padding_value=torch.nan)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    padded, _ = set2set(rows, *weights, steps=3, mask=mask)
    torch.testing.assert_close(padded, packed, rtol=1e-12, atol=1e-12)
    generator = torch.Generator().manual_seed(seed)
    for elements, vector in zip(sets, packed, strict=True):
        shuffled = elements[torch.randperm(len(elements), generator=generator)]
        alone, _ = set2set(shuffled[None], *weights, steps=3)
        torch.testing.assert_close(alone[0], vector, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_steps_give_zeros_and_an_empty_set_reads_zero(backend):
    tensors, options = make_case("empty")
    q_star, attention = set2set(*tensors.values(), steps=0, **options, backend=backend)
    assert q_star.shape == (3, 10)
    assert not q_star.any()
    assert attention.shape == (3, 0, 7)
    q_star, attention = set2set(*tensors.values(), steps=2, **options, backend=backend)
    assert q_star[0, :5].ne(0).all()  # the query
    assert q_star[0, 5:].eq(0).all()  # the readout
    assert attention[0].eq(0).all()
    torch.testing.assert_close(attention[1:].sum(-1), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("batch", "n"), [(0, 4), (3, 0)])
def test_no_sets_and_sets_of_nothing(backend, batch, n):
    tensors, _ = make_case("plain", batch=batch, n=n)
    got = evaluate(tensors, {}, backend=backend)
    assert got["q_star"].shape == (batch, 10)
    assert got["attention"].shape == (batch, 3, n)
    assert got["q_star"][:, 5:].eq(0).all()


def test_large_scores_do_not_overflow():
    tensors, options = make_case("left", dtype=torch.float32)
    tensors["memory"] *= 1e4
    q_star, attention = set2set(*tensors.values(), steps=3, **options)
    assert q_star.isfinite().all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 3))


def test_views_are_read_as_they_are():
    tensors, options = make_case("left")
    want = evaluate(tensors, options)
    tensors = {name: torch.stack([x, x], -1)[..., 0] for name, x in tensors.items()}
    assert_equal(evaluate(tensors, options), want, 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_in_half_out_and_attention_in_float32(dtype):
    tensors, options = make_case("right", dtype=dtype)
    got, want = evaluate(tensors, options), evaluate(tensors, options, dtype=torch.float64, backend="reference")
    assert got["q_star"].dtype == dtype
    assert got["attention"].dtype == torch.float32
    assert_equal({"attention": got["attention"]}, want, 1e-5)
    assert_equal({"q_star": got["q_star"]}, want, torch.finfo(dtype).eps)


def test_autocast_does_not_round():
    tensors, options = make_case("right", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = evaluate(tensors, options)
    assert all(torch.equal(x, y) for x, y in zip(got.values(), evaluate(tensors, options).values(), strict=True))


def test_torch_compile_sees_one_graph():
    tensors, options = make_case("left", dtype=torch.float32)
    leaves = [x.nan_to_num().requires_grad_() for x in tensors.values()]

    def double(*x):
        return 2 * set2set(*x, steps=2, **options)[0]

    torch._dynamo.reset()
    got, want = torch.compile(double, fullgraph=True, backend="aot_eager")(*leaves), double(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for x, y in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


GOOD = make_case("plain", batch=2, n=6, hidden=3, dtype=torch.float32)[0]
OFFSETS = torch.tensor([0, 2, 6]).int()
WRONG = {
    "memory is flat": (
        {"memory": torch.zeros(6, 3)},
        r"memory \(float32 \[6, 3\]\) must be a float \[batch, n, hidden\]",
    ),
    "weight_ih is narrow": (
        {"weight_ih": torch.zeros(12, 3)},
        r"weight_ih \(float32 \[12, 3\]\) must be a float \[4 hidden, 2 hidden\] = \[12, 6\] because memory is",
    ),
    "weight_hh is wide": (
        {"weight_hh": torch.zeros(12, 6)},
        r"weight_hh \(float32 \[12, 6\]\) must be a float \[4 hidden, hidden\] = \[12, 3\] because memory is",
    ),
    "bias is short": ({"bias_hh": torch.zeros(3)}, r"bias_hh \(float32 \[3\]\) must be a float \[4 hidden\] = \[12\]"),
    "steps": ({"steps": -1}, r"steps \(-1\) must be an int, 0 or more; use 5"),
    "steps is float": ({"steps": 2.0}, r"steps \(2.0\) must be an int"),
    "mask is float": ({"mask": torch.ones(2, 6)}, r"mask \(float32 \[2, 6\]\) must be a bool \[batch, n\] = \[2, 6\]"),
    "mask and packed": (
        {"memory": torch.zeros(1, 6, 3), "mask": torch.ones(1, 6).bool(), "cu_seqlens": OFFSETS},
        r"mask \(bool \[1, 6\]\) must be None because cu_seqlens is given",
    ),
    "offsets and batch": ({"cu_seqlens": OFFSETS}, r"cu_seqlens \(3 offsets\) must come with batch 1 but batch is 2"),
    "device": (
        {"bias_ih": torch.zeros(12, device="meta")},
        r"bias_ih \(meta\) must be on the device of memory \(cpu\)",
    ),
    "backend": ({"backend": "triton"}, r"backend=\"triton\" cannot run set2set: this op has no kernel"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    change, message = WRONG[name]
    with pytest.raises(RuntimeError if name == "backend" else ValueError, match=message):
        set2set(**{**GOOD, "steps": 2, **change})
