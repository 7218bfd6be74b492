"""The Triton kernels of ssd under Triton's interpreter, against the float64 definition."""

import importlib.util
import sys

import pytest
import torch

from undersong.ops import _dispatch, ssd

from .test_ssd import CASES, assert_equal, evaluate, make_case

INF = float("inf")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        torch.cuda.is_available() or importlib.util.find_spec("triton") is None, reason="runs Triton's interpreter"
    ),
]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN, so an output nobody wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def kernel():
    x = torch.zeros(1, 1, 1, 1)
    ssd(x, x[..., 0], x[0, 0, 0], x, x, backend="triton")  # loads the package
    return sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.ssd"]


@pytest.fixture(autouse=True)
def small_chunks(kernel, monkeypatch):
    """Several chunks and blocks of heads and head_dim at sizes the interpreter can afford."""
    for name, size in (("CHUNK", 16), ("BLOCK_P", 16)):
        monkeypatch.setattr(kernel, name, dict.fromkeys((True, False), size))
    monkeypatch.setattr(kernel, "STEPS", dict.fromkeys((True, False), {"HEADS": 4, "num_warps": 1}))


@pytest.fixture
def many_processors(kernel, monkeypatch):
    """So many that each sequence is cut in runs."""
    monkeypatch.setattr(kernel, "_processors", lambda device: 4)
    monkeypatch.setattr(kernel, "RUN_CHUNKS", 1)


def check(case, tolerance=1e-5):
    assert_equal(evaluate(case, "triton"), evaluate(case, "reference", double=True), tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 35])
def test_matches_reference(length, case):
    check(make_case(case, length, heads=2, groups=1))


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
@pytest.mark.parametrize(
    "options",
    [
        {"skip": None, "softplus": False, "groups": 4},
        {"skip": "head_dim", "gate": True, "limit": (0.05, 1.0), "groups": 1},
        {"gate": True, "limit": (0.05, INF)},
        {"head_dim": 1, "state": 1, "heads": 6},
    ],
    ids=["bare", "everything", "gate", "one by one"],
)
def test_every_option(options, case):
    check(make_case(case, 18, **options))


@pytest.mark.parametrize("case", ["plain", "state middle", "packed state"])
def test_sequences_cut_in_runs(many_processors, case):
    check(make_case(case, 70, heads=1, groups=1))


def test_steps_of_any_sign():
    check(make_case("state", 20, softplus=False, limit=(-INF, INF)))


def test_any_head_dim_and_state():
    check(make_case("state", 20, heads=2, head_dim=21, state=33, skip="head_dim"))


@pytest.mark.parametrize("layout", ["one projection", "channels before length"])
def test_views_give_the_very_same(layout):
    inputs, options = make_case("state middle", 20, head_dim=4, state=4, gate=True)

    def view(x):
        if layout == "one projection":
            return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        return x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view(x.shape)

    views = {name: view(x) if name in {"x", "dt", "B", "C", "z"} else x for name, x in inputs.items()}
    assert all(not views[name].is_contiguous() for name in "xBCz")
    y, state = ssd(
        **{k: x for k, x in views.items() if k != "state"},
        **options,
        initial_state=inputs["state"],
        return_final_state=True,
        backend="triton",
    )
    want = evaluate((inputs, options), "triton")
    assert torch.equal(y, want["y"])
    assert torch.equal(state, want["state"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_in_half_out_and_states_in_float32(dtype):
    case = make_case("state right", 35, gate=True, dtype=dtype)
    got, want = evaluate(case, "triton"), evaluate(case, "reference", double=True)
    assert {got[name].dtype for name in ("y", "dx", "dB", "dC", "dz")} == {dtype}
    assert {got[name].dtype for name in ("state", "ddt", "dA", "dD", "dstate")} == {torch.float32}
    assert_equal(got, want, 2e-2)


def test_mixed_dtypes():
    inputs, options = make_case("plain", 20, dtype=torch.bfloat16)
    inputs["C"], inputs["dt"] = inputs["C"].float(), inputs["dt"].half()
    check((inputs, options), 2e-2)


def test_a_vanishing_decay_does_not_blur_its_neighbours():
    inputs, options = make_case("state", 30, heads=2, softplus=False)
    inputs["dt"][:, 20] = 1e6
    inputs["x"][:, 20] = 0.0
    check((inputs, options), 3e-5)  # sums of logs near -150 in float32; unbounded ones, near -1e6, would be off by 0.1


@pytest.mark.parametrize("offsets", [[0, 3, 3, 20, 50], [0, 0, 50], [-7, 60, 20, 90], [0, 10, 5, 12]])
def test_no_offset_leads_out_of_the_row(kernel, offsets):
    length, cu_seqlens = 50, torch.tensor(offsets).int()
    chunks = kernel._chunks(torch.zeros(1, length), cu_seqlens, 16)
    begin, end, sequence, edges = kernel._chunk_table(cu_seqlens, length, 16, chunks).long().unbind(1)
    assert ((begin >= 0) & (end <= length) & (end - begin <= 16)).all()
    assert ((sequence >= 0) & (sequence < len(offsets) - 1)).all()
    if offsets[-1] == length:  # lawful: every token in one chunk, every sequence with one begin and one end
        covered = torch.cat([torch.arange(b, max(b, e)) for b, e in zip(begin.tolist(), end.tolist(), strict=True)])
        assert torch.equal(covered, torch.arange(length))
        for edge in (1, 2):
            assert sequence[(edges & edge) > 0].tolist() == list(range(len(offsets) - 1))


@pytest.mark.parametrize("case", ["plain", "packed state"])
def test_the_operator_is_registered_soundly(kernel, case):
    """Schema, fake tensors, autograd and dynamic tracing, which `can_torch_compile` of its layer promises."""
    inputs, options = make_case(case, 4, batch=1, heads=2)
    named = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")]
    named = [x if x is None else x.nan_to_num().requires_grad_() for x in named]
    arguments = (*named, options.get("mask"), options.get("cu_seqlens"), True, 0.0, INF)
    torch.library.opcheck(kernel._operator.operator.default, arguments)


def test_float64_is_refused():
    case = make_case("plain", 3)
    inputs = {name: x.double() for name, x in case[0].items()}
    with pytest.raises(RuntimeError, match="float64 inputs are computed in float64"):
        ssd(**inputs, **case[1], backend="triton")


def test_a_state_beyond_the_registers_is_refused():
    x, dt, A = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1), -torch.ones(1)
    B = torch.zeros(1, 2, 1, 257)
    with pytest.raises(RuntimeError, match=r"a state of 257 is more than the 256 .* use backend='torch'"):
        ssd(x, dt, A, B, B, backend="triton")
