"""controlled_ssd on a real GPU: exact at real sizes, nothing compiled for new lengths, no waiting for the device."""

import random
import sys

import pytest
import torch

from undersong.ops import _dispatch, explain

from ..gpu import no_waiting
from .test_ssd import assert_equal
from .test_ssd_control import CASES, call, columns, make, past

SIZES = {"heads": 4, "head_dim": 64, "state": 128}
CONTROLS = {
    "threshold": {"granularity": 128, "threshold": torch.tensor([20.0, 40.0, 80.0, torch.inf])},
    "window": {"granularity": 128, "window": 512},
    "uneven": {"granularity": 100, "window": 300},
}

pytestmark = pytest.mark.gpu


def moved(value, target):
    if isinstance(value, torch.Tensor):
        return value.to(target) if isinstance(target, str) or value.is_floating_point() else value
    return {name: moved(x, target) for name, x in value.items()} if isinstance(value, dict) else value


def check(inputs, options, control, tolerance, **more):
    got = call(*(moved(part, "cuda") for part in (inputs, options, control | more)), backend="triton")
    want = call(*(moved(part, torch.float64) for part in (inputs, options, control | more)), backend="torch")
    assert_equal({name: x.cpu() for name, x in got.items()}, want, tolerance)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_equals_the_definition(case, control, dtype, tolerance):
    control = CONTROLS[control]
    inputs, options = make(case, 1000, gate=True, dtype=dtype, **SIZES)
    check(inputs, options, control, tolerance)
    more = past(control, 700, 5 if case == "packed" else 2, **SIZES)
    check(inputs, options, control, tolerance, **more)


@pytest.mark.parametrize("control", ["threshold", "window"])
@pytest.mark.parametrize(("head_dim", "state"), [(16, 16), (64, 256), (80, 48), (128, 256)])
def test_other_sizes(head_dim, state, control):
    inputs, options = make("middle", 300, head_dim=head_dim, state=state, dtype=torch.bfloat16)
    check(inputs, options, CONTROLS[control], 3e-2)


@pytest.mark.parametrize("control", CONTROLS)
def test_single_tokens_equal_one_pass(control):
    more = moved(past(CONTROLS[control], 700, **SIZES), "cuda")
    control = moved(CONTROLS[control], "cuda")
    inputs, options = (moved(part, "cuda") for part in make("plain", 150, gate=True, **SIZES))
    want = call(inputs, options, control, **more, backend="triton")
    outputs, state, position = [], {k: x.clone() for k, x in more["state"].items()}, more["position"]
    for t in range(150):
        token = columns(inputs, slice(t, t + 1))
        got = call(token, options, control, state=state, position=position + t, inplace=True, backend="triton")
        outputs.append(got.pop("y"))
        state = got
    assert_equal({"y": torch.cat(outputs, 1)} | state, {k: x.double() for k, x in want.items()}, 1e-4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("control", CONTROLS)
def test_a_step_does_not_wait_for_the_device(control, backend):
    more = moved(past(CONTROLS[control], 20, **SIZES), "cuda")
    control = moved(CONTROLS[control], "cuda")
    inputs, options = (moved(part, "cuda") for part in make("plain", 1, **SIZES))
    call(inputs, options, control, **more, backend=backend)
    with no_waiting():
        call(inputs, options, control, **more, backend=backend)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_sequence_does_not_wait_for_the_device(control):
    more = moved(past(CONTROLS[control], 20, **SIZES), "cuda")
    control = moved(CONTROLS[control], "cuda")
    inputs, options = (moved(part, "cuda") for part in make("middle", 500, **SIZES))
    call(inputs, options, control, **more, backend="triton")
    with no_waiting():
        call(inputs, options, control, **more, backend="triton")


def test_auto_takes_the_kernels():
    inputs, options = (moved(part, "cuda") for part in make("plain", 300, **SIZES))
    for name in ("threshold", "window"):
        with torch.no_grad():
            call(inputs, options, moved(CONTROLS[name], "cuda"))
        assert explain()[f"ssd_{name}"].backend == "triton"


@pytest.mark.parametrize("control", ["threshold", "window"])
def test_lengths_compile_nothing(control):
    control = moved(CONTROLS[control], "cuda")

    def once(batch, length):
        inputs, options = (moved(part, "cuda") for part in make("plain", length, batch=batch, **SIZES))
        got = call(inputs, options, control, backend="triton")
        got.pop("y")
        position = torch.full((batch,), length, device="cuda")
        call(inputs, options, control, state=got, position=position, backend="triton")
        token = columns(inputs, slice(0, 1))
        call(token, options, control, state=got, position=position, backend="triton")

    once(2, 200)
    once(1, 200)
    package = _dispatch._KERNELS["state_space"].__name__
    module = sys.modules[f"{package}.ssd_control"]
    kernels = [
        getattr(module, name) for name in ("granules", "limit_states", "window_states", "step", "forward", "steps")
    ]

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    before, rng = compiled(), random.Random(0)
    for length in rng.sample(range(2, 3000), 30):
        once(rng.randint(1, 3), length)
    assert compiled() == before
