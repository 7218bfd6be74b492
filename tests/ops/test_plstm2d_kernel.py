"""The Triton kernels of the grid recurrence under Triton's interpreter, against the float64 definition.

Memory handed to the kernels is filled with NaN.
"""

import importlib.util

import pytest
import torch

from undersong.hub.kernelize import kernelize
from undersong.modeling.plstm_vision.modeling_plstm_vision import PLSTM2D
from undersong.ops import explain
from undersong.ops.plstm2d import plstm2d

from .test_plstm2d import MODES, assert_all_close, call, make_case, with_gradients

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


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize(("grid", "orientations"), [((1, 1), 4), ((1, 3), 4), ((2, 3), 1), ((3, 2), 3)])
def test_equals_the_definition_with_gradients(kind, grid, orientations):
    case = make_case(MODES[kind]["mode"], grid, batch=1, key_dim=5, value_dim=3, orientations=orientations)
    got = with_gradients(case, torch.float32, backend="triton", **MODES[kind])
    assert explain()["plstm2d"].backend == "triton"
    assert_all_close(got, with_gradients(case, backend="reference", **MODES[kind]), 2e-6)


@pytest.mark.parametrize("kind", ["P", "DL"])
def test_several_blocks_of_sources_and_readers(kind):
    """More nodes than a block has sources, in rows that do not end with it."""
    case = make_case(MODES[kind]["mode"], (5, 7), batch=1, heads=1, key_dim=17, value_dim=16, orientations=3)
    got = with_gradients(case, torch.float32, backend="triton", **MODES[kind])
    assert_all_close(got, with_gradients(case, backend="reference", **MODES[kind]), 2e-6)


def test_half_inputs_keep_gates_in_float32():
    case = make_case("P", (2, 3), batch=1, heads=1, dtype=torch.float32)
    case |= {name: case[name].bfloat16() for name in "QKV"}
    got, want = call(case, backend="triton"), call(case, backend="reference")
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=2e-2 * want.abs().max().item())


def test_a_mask_and_views_are_taken():
    case = make_case("D", (3, 2), batch=2, heads=1, dtype=torch.float32)
    case["Q"] = case["Q"].transpose(1, 2).contiguous().transpose(1, 2)
    case["V"] = torch.cat([case["V"]] * 2, -1)[..., ::2]
    mask = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0)) < 0.7
    got = call(case, mode="D", mask=mask, backend="triton")
    torch.testing.assert_close(got, call(case, mode="D", mask=mask, backend="reference"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (make_case("P", (2, 2)), "float64 inputs are computed in float64"),
        (make_case("P", (33, 32), 1, 1, 1, 1, dtype=torch.float32), r"the grid \(33 x 32\) is above .* 1024 nodes"),
        (make_case("P", (65, 1), 1, 1, 1, 1, dtype=torch.float32), r"the grid \(65 x 1\) is above .* 64 on a side"),
        (make_case("P", (1, 1), key_dim=257, dtype=torch.float32), r"key_dim \(257\) is above the kernel's 256"),
    ],
    ids=["float64", "nodes", "side", "dim"],
)
def test_what_it_does_not_take_is_named_and_computed_otherwise(case, message):
    with pytest.raises(RuntimeError, match=message):
        call(case, backend="triton")
    call(case)
    assert explain()["plstm2d"].backend == "torch"


def test_kernelize_swaps_the_layer():
    case = make_case("D", (2, 2), batch=1, heads=1, dtype=torch.float32)
    layer = torch.nn.Sequential(PLSTM2D())
    arguments = [case[name] for name in "QKVSTMD"]
    want = plstm2d(*arguments, mode="D", backend="reference")
    report = kernelize(layer, "inference", "cpu")
    assert report.accelerated == ["0"], report
    runs = explain()["plstm2d"].counts
    torch.testing.assert_close(layer[0](*arguments, "D"), want, rtol=0, atol=1e-5)
    assert explain()["plstm2d"].counts == runs  # the kernel itself ran, not the op
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(layer[0](*arguments, "D", mask), want, rtol=0, atol=1e-5)
    assert explain()["plstm2d"].counts["torch"] == runs.get("torch", 0) + 1
