"""The grid recurrence of pLSTM: every lowering against the definition node by node, and what grids have to promise."""

from math import comb

import pytest
import torch

from undersong.ops.plstm1d import plstm1d
from undersong.ops.plstm2d import plstm2d

pytestmark = pytest.mark.usefixtures("one_thread")
COUNTS = {"P": {"S": 2, "T": 2, "M": 1}, "D": {"S": 2, "T": 3, "M": 2}}
MODES = {"P": {"mode": "P"}, "DL": {"mode": "D", "chirality": "L"}, "DR": {"mode": "D", "chirality": "R"}}
GRIDS = [(1, 1), (1, 5), (4, 1), (3, 5), (7, 6)]
LOWERINGS = {
    "direct": {"lowering": "direct"},
    "parallel": {"lowering": "parallel"},
    **{f"chunk{size}": {"lowering": "chunk", "chunk_size": size} for size in (1, 2, 3, 8)},
}
every_mode = pytest.mark.parametrize("kind", MODES)
every_lowering = pytest.mark.parametrize("lowering", LOWERINGS)


def make_case(mode, grid, batch=2, heads=2, key_dim=3, value_dim=2, orientations=4, dtype=torch.float64, seed=0):
    """The op's tensors by name; gates of a trained model's size; transitions of both signs, zeros among them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn((batch, *grid, heads, *shape), generator=generator, dtype=torch.float64).to(dtype)

    case = {"Q": normal(key_dim), "K": normal(key_dim), "V": normal(value_dim), "D": normal()}
    for name, count in COUNTS[mode].items():
        gates = [normal(orientations) for _ in range(count)]
        case[name] = tuple(x.tanh().where(x > -1.5, 0) for x in gates) if name == "T" else tuple(gates)
    return case


def call(case, **options):
    return plstm2d(*(case[name] for name in "QKVSTMD"), **options)


def leaves_of(case, dtype):
    """The case with leaves of that dtype, and these by name."""
    named = {}
    for name, value in case.items():
        for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
            named[f"{name}{i}"] = x.to(dtype).clone().requires_grad_()
    fresh = {
        name: tuple(named[f"{name}{i}"] for i in range(len(value))) if isinstance(value, tuple) else named[f"{name}0"]
        for name, value in case.items()
    }
    return fresh, named


def with_gradients(case, dtype=torch.float64, **options):
    case, leaves = leaves_of(case, dtype)
    y = call(case, **options)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream, materialize_grads=True)
    return {"Y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_all_close(got, want, tolerance):
    for name, x in want.items():
        error = (got[name].double() - x).abs().max().item() / max(x.abs().max().item(), 1e-9)
        assert error <= tolerance, f"{name} is off by {error:.2e} of its scale"


@every_mode
@every_lowering
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "{}x{}".format(*g))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_lowerings_equal_the_definition_with_gradients(kind, lowering, grid, dtype, tolerance):
    case = make_case(MODES[kind]["mode"], grid)
    want = with_gradients(case, backend="reference", **MODES[kind])
    got = with_gradients(case, dtype, **LOWERINGS[lowering], **MODES[kind])
    assert got["Y"].dtype == dtype
    assert_all_close(got, want, tolerance)


@every_mode
@pytest.mark.parametrize("lowering", ["direct", "parallel", "chunk2"])
def test_gradcheck(kind, lowering):
    """Through 2 x 2 blocks, where there are blocks."""
    case = make_case(MODES[kind]["mode"], (3, 3), batch=1, heads=1, key_dim=2, value_dim=1, orientations=2)
    case, leaves = leaves_of(case, torch.float64)
    keys = list(leaves)

    def function(*values):
        named = dict(zip(keys, values, strict=True))
        given = {
            name: tuple(named[f"{name}{i}"] for i in range(len(value)))
            if isinstance(value, tuple)
            else named[f"{name}0"]
            for name, value in case.items()
        }
        return call(given, **LOWERINGS[lowering], **MODES[kind])

    assert torch.autograd.gradcheck(function, list(leaves.values()))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ones_count_the_paths(backend):
    """With all gates 1, what node (i, j) writes reaches (x, y) over as many paths as there are ways to walk."""
    one = torch.ones(1, 4, 5, 1, 1, dtype=torch.float64)
    y = plstm2d(one, one, one, (one, one), (one, one), (one,), 0 * one[..., 0], backend=backend)[0, :, :, 0, 0]
    for x, z in ((0, 0), (1, 1), (2, 3), (3, 4)):
        ways = sum(comb(x - i + z - j, x - i) for i in range(x + 1) for j in range(z + 1) if (i, j) != (x, z))
        assert y[x, z].item() == ways


@every_mode
@every_lowering
@pytest.mark.parametrize("along", ["x", "y"])
def test_a_grid_of_one_line_is_the_sequence_op(kind, lowering, along):
    """Gates on the edges across the line are free: nothing comes back from them."""
    mode = MODES[kind]["mode"]
    grid = (9, 1) if along == "x" else (1, 9)
    case = make_case(mode, grid, orientations=1)
    axis = 0 if along == "x" else 1
    source, transition, mark = case["S"][axis], case["T"][axis], case["M"][min(axis, len(case["M"]) - 1)]
    line = {name: case[name].flatten(1, 2).unsqueeze(-1) for name in "QKV"}
    want = plstm1d(
        *line.values(),
        source.flatten(1, 2)[..., None, None],
        transition.flatten(1, 2)[..., None],
        mark.flatten(1, 2)[..., None, None],
        case["D"].flatten(1, 2)[..., None, None, None, None],
        backend="reference",
    )
    got = call(case, **LOWERINGS[lowering], **MODES[kind])
    torch.testing.assert_close(got.flatten(1, 2), want.squeeze(-1), rtol=0, atol=1e-12)


@every_mode
@pytest.mark.parametrize(("axis", "order"), [(1, [1, 0, 3, 2]), (2, [2, 3, 0, 1])], ids=["x", "y"])
def test_a_flipped_image_with_swapped_orientations_gives_the_flipped_output(kind, axis, order):
    case = make_case(MODES[kind]["mode"], (3, 4))
    flipped = {
        name: tuple(g.flip(axis)[..., order] for g in x) if isinstance(x, tuple) else x.flip(axis)
        for name, x in case.items()
    }
    want = call(case, **MODES[kind]).flip(axis)
    torch.testing.assert_close(call(flipped, **MODES[kind]), want, rtol=0, atol=1e-12)


def test_a_transposed_image_swaps_the_chirality():
    case = make_case("D", (3, 4))
    swapped = {name: case[name].transpose(1, 2) for name in "QKVD"}
    gates = {name: [g.transpose(1, 2)[..., [0, 2, 1, 3]] for g in case[name]] for name in "STM"}
    swapped |= {"S": gates["S"][::-1], "T": [gates["T"][i] for i in (1, 0, 2)], "M": gates["M"][::-1]}
    want = call(case, mode="D", chirality="L").transpose(1, 2)
    torch.testing.assert_close(call(swapped, mode="D", chirality="R"), want, rtol=0, atol=1e-12)


@every_mode
@every_lowering
def test_four_orientations_have_one_direct_term(kind, lowering):
    case = make_case(MODES[kind]["mode"], (3, 4))
    case["S"] = tuple(0 * x for x in case["S"])
    want = case["D"][..., None] * (case["Q"] * case["K"]).sum(-1, keepdim=True) * case["V"] * 3**-0.5
    got = call(case, **LOWERINGS[lowering], **MODES[kind])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@every_mode
@every_lowering
def test_orientations_add_up(kind, lowering):
    case = make_case(MODES[kind]["mode"], (4, 3))
    want = 0
    for o in range(4):
        one = {name: tuple(torch.zeros_like(g).index_copy(4, torch.tensor([o]), g[..., [o]]) for g in x)
               if name == "S" else x for name, x in case.items()}  # fmt: skip
        want = want + call(one | ({} if o == 0 else {"D": 0 * case["D"]}), **MODES[kind])
    torch.testing.assert_close(call(case, **LOWERINGS[lowering], **MODES[kind]), want, rtol=0, atol=1e-12)


@every_mode
@pytest.mark.parametrize("options", [{"backend": "reference"}, *LOWERINGS.values()], ids=["reference", *LOWERINGS])
def test_masked_nodes_are_not_there(kind, options):
    """A mask that keeps a corner block equals the smaller grid; garbage under the mask reaches nothing."""
    case = make_case(MODES[kind]["mode"], (5, 4))
    mask = torch.zeros(2, 5, 4, dtype=torch.bool)
    mask[:, :3, 1:] = True
    corner = {
        name: tuple(g[:, :3, 1:] for g in x) if isinstance(x, tuple) else x[:, :3, 1:] for name, x in case.items()
    }
    garbage = torch.tensor(torch.nan, dtype=torch.float64)
    fresh, leaves = leaves_of(case, torch.float64)
    fresh = {
        name: tuple(g.where(mask[..., None, None], garbage) for g in x)
        if isinstance(x, tuple)
        else x.where(mask.view(2, 5, 4, *[1] * (x.dim() - 3)), garbage)
        for name, x in fresh.items()
    }
    y = call(fresh, mask=mask, **options, **MODES[kind])
    torch.testing.assert_close(y[:, :3, 1:], call(corner, **MODES[kind]), rtol=0, atol=1e-12)
    assert not y[~mask].any()
    for name, gradient in zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert not gradient[~mask].any(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("lowering", ["direct", "chunk8", "parallel"])
def test_bounded_transitions_bound_the_state(lowering):
    """P mode with |T_r| + |T_d| <= 1, D mode with |T| <= 1: no state exceeds the sum of what was written."""
    size = 32 if lowering == "parallel" else 64
    generator = torch.Generator().manual_seed(0)

    def uniform():
        return torch.rand(1, size, size, 1, 1, generator=generator, dtype=torch.float64)

    one, none = (
        torch.ones(1, size, size, 1, 1, dtype=torch.float64),
        torch.zeros(1, size, size, 1, dtype=torch.float64),
    )
    share, sign = uniform(), (uniform() - 0.5).sign()
    source = 0.1 * uniform()
    p_mode = plstm2d(one, one, one, (share * source, (1 - share) * source), (sign * share, 1 - share), (one,), none,
                     **LOWERINGS[lowering])  # fmt: skip
    assert p_mode.abs().max() <= source.sum()
    d_mode = plstm2d(one, one, one, (source, source), [2 * uniform() - 1 for _ in range(3)], (one, one), none,
                     mode="D", **LOWERINGS[lowering])  # fmt: skip
    assert d_mode.abs().max() <= 4 * source.sum()


def test_half_inputs_are_computed_in_float32_and_autocast_does_not_round():
    case = make_case("P", (4, 4), dtype=torch.float32)
    half = {name: case[name].bfloat16() if name in "QKV" else case[name] for name in case}
    want = call({name: x.float() if name in "QKV" else x for name, x in half.items()})
    got = call(half)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(half), got)


def test_large_grids_go_through_blocks():
    """Memory of the chosen way is linear in the nodes above 1024 of them: no tensor holds all pairs."""
    case = make_case("D", (40, 40), batch=1, heads=1, key_dim=1, value_dim=1, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = call(case, mode="D")
    largest = max(event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest < 4 * 1600**2
    torch.testing.assert_close(y, call(case, mode="D", lowering="parallel"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"Q": torch.ones(2, 3, 4, 2)}, {}, r"Q \(float32 \[2, 3, 4, 2\]\) must be a float \[batch, x, y, heads, k"),
        ({"K": torch.ones(2, 3, 4, 2, 2)}, {}, r"K \(float32 \[2, 3, 4, 2, 2\]\) must be .* = \[2, 3, 4, 2, 3\]"),
        ({"V": torch.ones(2, 4, 3, 2, 2)}, {}, r"V \(float32 \[2, 4, 3, 2, 2\]\) must be .* = \[2, 3, 4, 2, 2\]"),
        ({"D": torch.ones(2, 3, 4, 1)}, {}, r"D \(float32 \[2, 3, 4, 1\]\) must be .* = \[2, 3, 4, 2\]"),
        ({"T": (torch.ones(2, 3, 4, 2, 4),) * 3}, {}, r"T \(3\) must be a tuple \(T_r, T_d\) because mode is 'P'"),
        ({}, {"mode": "D"}, r"T \(2\) must be a tuple \(T_r, T_d, T_rd\) because mode is 'D'"),
        ({"M": torch.ones(2, 3, 4, 2, 4)}, {}, r"M \(float32 \[2, 3, 4, 2, 4\]\) must be a tuple \(M\)"),
        ({"M": (torch.ones(2, 3, 4, 2, 1),)}, {}, r"M \(float32 \[2, 3, 4, 2, 1\]\) must be .* = \[2, 3, 4, 2, 4\]"),
        ({"S": (torch.ones(2, 3, 4, 2, 5),) * 2}, {}, "S_r .* has 5 orientations, which must be 1 to 4"),
        ({}, {"mode": "X"}, r"mode \('X'\) must be one of 'P', 'D'"),
        ({}, {"chirality": "X"}, r"chirality \('X'\) must be one of 'L', 'R'"),
        ({}, {"lowering": "X"}, r"lowering \('X'\) must be one of 'auto', 'direct', 'parallel', 'chunk'"),
        ({}, {"lowering": "chunk", "backend": "triton"}, r"lowering \('chunk'\) is a choice of the torch backend"),
        ({}, {"chunk_size": 0}, r"chunk_size \(0\) must be an integer of at least 1"),
        ({}, {"mask": torch.ones(2, 3, 4)}, r"mask \(float32 \[2, 3, 4\]\) must be a bool \[batch, x, y\] = \["),
        ({}, {"backend": "X"}, r"backend \('X'\) must be one of"),
    ],
)  # fmt: skip
def test_errors(change, options, message):
    with pytest.raises(ValueError, match=message):
        call(make_case("P", (3, 4), dtype=torch.float32) | change, **options)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match=r"the grid of Q \(float64 \[2, 0, 4, 2, 3\]\) is empty"):
        call(make_case("P", (0, 4)))
