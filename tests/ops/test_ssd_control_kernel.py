"""The Triton kernels of controlled_ssd under Triton's interpreter, against the float64 definition."""

import importlib.util
import sys

import pytest
import torch

from undersong.ops import _dispatch, ssd
from undersong.ops.ssd_control import controlled_ssd

from .test_ssd import assert_equal
from .test_ssd_control import call, columns, make, past

CONTROLS = {
    "threshold": {"granularity": 16, "threshold": torch.tensor([1.0, 3.0])},
    "window": {"granularity": 16, "window": 32},
}
SIZES = {"heads": 2, "groups": 1}

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


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks and blocks of heads and states at sizes the interpreter can afford."""
    x = torch.zeros(1, 1, 1, 1)
    ssd(x, x[..., 0], x[0, 0, 0], x, x, backend="triton")  # loads the package
    package = _dispatch._KERNELS["state_space"].__name__
    kernel = sys.modules[f"{package}.ssd"]
    for name, size in (("CHUNK", 16), ("BLOCK_P", 16)):
        monkeypatch.setattr(kernel, name, dict.fromkeys((True, False), size))
    monkeypatch.setattr(kernel, "STEPS", dict.fromkeys((True, False), {"HEADS": 4, "num_warps": 1}))
    monkeypatch.setattr(sys.modules[f"{package}.ssd_control"], "BLOCK", 64)


def check(inputs, options, control, tolerance=1e-5, **more):
    got = call(inputs, options, control, **more, backend="triton")
    want = call({k: x.double() for k, x in inputs.items()}, options, control, **more, backend="reference")
    assert_equal(got, want, tolerance)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("case", ["plain", "middle", "packed"])
def test_a_sequence_equals_the_definition(case, control):
    check(*make(case, 70, **SIZES), CONTROLS[control])


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("case", ["plain", "left", "packed"])
def test_a_sequence_that_goes_on_equals_the_definition(case, control):
    """From different places of a chunk."""
    control = CONTROLS[control]
    check(*make(case, 40, **SIZES), control, **past(control, 60, 5 if case == "packed" else 2, **SIZES))


@pytest.mark.parametrize(("granularity", "window"), [(16, 16), (20, 40), (32, 640)])
def test_windows_of_one_of_uneven_and_of_more_chunks_than_there_are(granularity, window):
    control = {"granularity": granularity, "window": window}
    check(*make("plain", 50, batch=1, **SIZES), control, **past(control, 45, 1, **SIZES))


@pytest.mark.parametrize("control", [
    {"granularity": 4, "threshold": torch.tensor([1.0, 3.0])}, {"granularity": 3, "window": 6},
    {"granularity": 4, "window": 4},
], ids=["threshold", "window", "window of one"])  # fmt: skip
@pytest.mark.parametrize("inplace", [False, True])
def test_single_tokens_equal_one_pass(inplace, control):
    inputs, options = make("plain", 10, gate=True, **SIZES)
    more, mask = past(control, **SIZES), torch.ones(2, 10, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 5] = False
    want = call(inputs, options, control, **more, mask=mask, backend="reference")
    outputs, state, position = [], {k: x.clone() for k, x in more["state"].items()}, more["position"]
    for t in range(10):
        held = {k: x.clone() for k, x in state.items()}
        got = call(columns(inputs, slice(t, t + 1)), options, control, state=state, position=position,
                   mask=mask[:, t : t + 1], inplace=inplace, backend="triton")  # fmt: skip
        outputs.append(got.pop("y"))
        assert all((got[name] is state[name]) == inplace for name in state)
        assert inplace or all(torch.equal(state[name], x) for name, x in held.items())
        state, position = got, position + mask[:, t]
    assert_equal({"y": torch.cat(outputs, 1)} | state, want, 1e-5)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(
    "options",
    [
        {"skip": None, "softplus": False, "groups": 2},
        {"skip": "head_dim", "gate": True, "limit": (0.05, 1.0), "groups": 1},
        {"head_dim": 17, "state": 18, "groups": 1},
    ],
    ids=["bare", "everything", "sizes"],
)
def test_every_option(options, control, length):
    control = CONTROLS[control]
    sizes = {name: size for name, size in options.items() if name in ("head_dim", "state", "groups")}
    more = past(control, 15, 1, heads=2, **sizes)
    check(*make("plain", length, batch=1, heads=2, **options), control, **more)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("length", [1, 20])
def test_views_give_the_very_same(length, control):
    inputs, options = make("plain", length, gate=True, **SIZES)
    views = {
        name: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]] if name in {*"xBCz"} else x
        for name, x in inputs.items()
    }
    views["dt"] = torch.stack([inputs["dt"]] * 3, -1)[..., 1]
    control = CONTROLS[control] | past(CONTROLS[control], **SIZES)
    got, want = (call(given, options, control, backend="triton") for given in (views, inputs))
    assert all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.parametrize("control", CONTROLS)
def test_half_in_half_out_and_states_in_float32(control):
    inputs, options = make("right", 40, batch=1, gate=True, dtype=torch.bfloat16, **SIZES)
    got = call(inputs, options, CONTROLS[control], backend="triton")
    want = call({k: x.double() for k, x in inputs.items()}, options, CONTROLS[control], backend="reference")
    assert got["y"].dtype == torch.bfloat16
    assert {x.dtype for name, x in got.items() if name != "y"} == {torch.float32}
    assert_equal(got, want, 1e-2)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("control", CONTROLS)
def test_the_operators_are_registered_soundly(control, length):
    """Schema and fake tensors; gradients there are none."""
    inputs, options = make("middle", length, **SIZES)
    control = CONTROLS[control]
    chunks, threshold = control.get("window", 0) // control["granularity"], control.get("threshold")
    state = [*past(control, **SIZES)["state"].values()]
    named = [inputs.get(name) for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    arguments = [*named, True, 0.0, torch.inf, control["granularity"], threshold, chunks]
    arguments += [*state, *[None] * (5 - len(state)), torch.tensor([13, 10]), options["mask"]]
    operators = sys.modules[f"{_dispatch._KERNELS['state_space'].__name__}.registry"].OPERATORS
    operator = operators.ssd_control_step if length == 1 else operators.ssd_control
    arguments += [None] if length > 1 else []
    torch.library.opcheck(operator.default, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


def test_what_the_kernel_refuses():
    inputs, options = make("plain", 3)
    control = CONTROLS["window"] | {"backend": "triton"}
    with pytest.raises(RuntimeError, match="float64 inputs are computed in float64"):
        call({name: x.double() for name, x in inputs.items()}, options, control)
    with pytest.raises(RuntimeError, match="the kernel has no gradients, and an input requires one"):
        call(inputs | {"A": inputs["A"].clone().requires_grad_()}, options, control)
    with pytest.raises(RuntimeError, match=r"granularity \(8\) below 16 .* use backend='torch'"):
        call(inputs, options, control | {"granularity": 8, "window": 16})
    x, dt, B = torch.zeros(1, 2, 1, 300), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, 200)
    with pytest.raises(RuntimeError, match=r"a state of 300 x 200 is more than .* use backend='torch'"):
        controlled_ssd(x, dt, -torch.ones(1), B, B, window=128, backend="triton")
