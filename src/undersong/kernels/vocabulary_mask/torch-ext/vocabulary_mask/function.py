"""Launches the kernels and registers them as torch operators, so that torch.compile sees one node."""

import functools
import math
import re

import torch
import triton

from .common import CAPACITY, CHUNK_WORDS, FIXED, HEADER
from .kernels import WIDTH, mask_kernel, sample_kernel

# Tokens of a chunk and warps of a program. A chunk's float sums decide the last bits of a row's entropy, so the cut is
# the same for every batch.
BLOCK = 8192
NUM_WARPS = 8
MAX_REGISTERS = 64  # of a thread: four programs share a multiprocessor
MOST_CHUNKS = 128

_INTERPRETED = not isinstance(mask_kernel, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
_COMPILED = {}  # what decides how a kernel is compiled -> the compiled kernel
_NAMESPACE = re.sub(r"\W", "_", __name__.rpartition(".")[0])  # the package may be loaded under several names at once


def typical_mask(logits, mass, min_tokens_to_keep=1, filter_value=-math.inf):
    """`logits` [batch, vocab] with the tokens outside the locally typical set set to `filter_value`.

    mass: a number in (0, 1] or one per row [batch], any float dtype. min_tokens_to_keep: likewise, whole numbers.
    """
    return _mask(logits, mass, min_tokens_to_keep, filter_value, True)


def top_p_mask(logits, mass, min_tokens_to_keep=1, filter_value=-math.inf):
    """The same for the most likely tokens that hold `mass`; tokens of equal score stay or go together."""
    return _mask(logits, mass, min_tokens_to_keep, filter_value, False)


def fused_typical_sample(logits, mass, min_tokens_to_keep=1, temperature=1.0, generator=None):
    """A token [batch] from the typical set of softmax(logits / temperature); -1 for a row without a distribution."""
    _check(logits)
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=logits.device, generator=generator)
    settings = (*_split(mass), *_split(min_tokens_to_keep), *_split(temperature))
    run = _operators.sample if torch.compiler.is_compiling() else _run_sample
    return run(logits, *settings, seed)


def problem(logits):
    """Why the kernel cannot take these logits, or None."""
    most = _largest_vocabulary(logits.device)
    return None if logits.shape[1] <= most else f"the vocabulary ({logits.shape[1]}) is above {most} on this device"


@functools.lru_cache
def _largest_vocabulary(device):
    if device.type == "cpu":
        return 2**30
    # Programs of a row wait for each other, so all of them must fit on the device at once.
    return min(MOST_CHUNKS, torch.cuda.get_device_properties(device).multi_processor_count) * BLOCK


def _mask(logits, mass, need, fill, typical):
    _check(logits)
    # Outside torch.compile the operator would only add its own time on the host.
    run = _operators.mask if torch.compiler.is_compiling() else _run_mask
    return run(logits, *_split(mass), *_split(need), fill, typical)


def _check(logits):
    if logits.device.type == "cpu" and not _INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    if not torch.compiler.is_compiling() and (reason := problem(logits)) is not None:
        raise ValueError(f"{reason}; use the torch path.")


def _split(setting):
    """A number and no tensor, or a tensor and no number."""
    return (0, setting) if isinstance(setting, torch.Tensor) else (setting, None)


def _run_mask(logits, mass, row_mass, need, row_need, fill, typical):
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(
        mask_kernel, logits, (out,), (row_mass, row_need), (float(mass), need, float(fill)),
        TYPICAL=typical, PER_ROW_MASS=row_mass is not None, PER_ROW_NEED=row_need is not None,
        COUNT=row_need is not None or need > 1,
    )  # fmt: skip
    return out


def _run_sample(logits, mass, row_mass, need, row_need, temperature, row_temperature, seed):
    out = torch.empty(logits.shape[:1], dtype=torch.int64, device=logits.device)
    _launch(
        sample_kernel, logits, (out,), (seed, row_mass, row_need, row_temperature),
        (float(mass), need, float(temperature)),
        PER_ROW_MASS=row_mass is not None, PER_ROW_NEED=row_need is not None,
        PER_ROW_TEMPERATURE=row_temperature is not None, COUNT=row_need is not None or need > 1,
    )  # fmt: skip
    return out


def _launch(kernel, logits, outputs, tensors, numbers, **flags):
    batch, n = logits.shape
    if batch == 0 or n == 0:
        return
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    # The interpreter runs one program after the other, so none may wait for a later one.
    block = max(triton.next_power_of_2(n), WIDTH.value) if _INTERPRETED else BLOCK
    chunks = triton.cdiv(n, block)
    words = HEADER.value + batch * (FIXED.value + CAPACITY.value // 2 + chunks * CHUNK_WORDS.value)
    workspace = torch.zeros(words, dtype=torch.int64, device=logits.device)
    flags |= {"GROUPS": max(triton.next_power_of_2(chunks), 16), "BLOCK": block}
    arguments = (logits, *outputs, workspace, *tensors, *numbers, n, logits.stride(0), chunks)
    with torch.cuda.device_of(logits):
        _call(kernel, (batch * chunks, 1, 1), arguments, flags)


def _call(kernel, grid, arguments, flags):
    """A launch; the second one with arguments of the same kinds skips Triton's look at them, half of its host time."""
    kinds = [
        (x.dtype, x.device, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else x is None for x in arguments
    ]
    key = (kernel, *kinds, *arguments[-3:-1], *flags.values())
    if key in _COMPILED:
        _COMPILED[key][grid](*arguments, *flags.values())
    else:
        compiled = kernel[grid](*arguments, **flags, num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS)
        if not _INTERPRETED:
            _COMPILED[key] = compiled


def _register():
    """torch.ops.<package>.{mask, sample}, once in a process for each package name."""
    operators = getattr(torch.ops, _NAMESPACE)
    if hasattr(operators, "library"):  # the same source under the same name is loaded already
        return operators
    library = torch.library.Library(_NAMESPACE, "DEF")
    settings = "Tensor logits, float mass, Tensor? row_mass, int need, Tensor? row_need"
    library.define(f"mask({settings}, float fill, bool typical) -> Tensor")
    library.define(f"sample({settings}, float temperature, Tensor? row_temperature, Tensor seed) -> Tensor")
    for name, run in (("mask", _run_mask), ("sample", _run_sample)):
        for key in ("CUDA", "CPU"):  # CPU: Triton's interpreter
            library.impl(name, run, key)
    torch.library.register_fake(f"{_NAMESPACE}::mask", lambda logits, *_: torch.empty_like(logits), lib=library)
    torch.library.register_fake(
        f"{_NAMESPACE}::sample", lambda logits, *_: logits.new_empty(logits.shape[:1], dtype=torch.int64), lib=library
    )
    operators.library = library  # registrations live as long as this object
    return operators


_operators = _register()
