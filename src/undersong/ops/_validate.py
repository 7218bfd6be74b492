"""What the sequence ops check before they compute: shapes, dtypes, devices, masks, offsets and states.

Every check raises a ValueError that names the argument, what it is, what it must be, and the fix.
"""

from __future__ import annotations

import torch


def describe(x) -> str:
    """A tensor as "float32 [2, 5]", anything else as its type's name."""
    return (
        f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
    )


def check_layout(name, x, layout):
    """`x` is a float tensor with as many dimensions as `layout`, "batch, length, channels" say, has names."""
    if not isinstance(x, torch.Tensor) or x.dim() != layout.count(",") + 1 or not x.is_floating_point():
        raise ValueError(f"{name} ({describe(x)}) must be a float [{layout}]; reshape or cast it.")


def check_shape(name, x, layout, want, because):
    """`x` is a float tensor of shape `want`, which follows from what `because` says."""
    if not isinstance(x, torch.Tensor) or x.shape != torch.Size(want) or not x.is_floating_point():
        raise ValueError(
            f"{name} ({describe(x)}) must be a float [{layout}] = {list(want)} because {because}; reshape or cast it."
        )


def check_some_length(name, x):
    if x.shape[1] == 0:
        raise ValueError(f"length is 0 in {name} ({describe(x)}) but must be at least 1; leave the call out.")


def check_groups(name, x, groups, what, count):
    """`count` channels or heads fall into `groups` blocks of equal size."""
    if groups == 0 or count % groups:
        raise ValueError(
            f"{name} ({describe(x)}) has {groups} groups, which must divide the {what} ({count}); "
            "use one group or a divisor."
        )


def check_limit(name, limit):
    """`limit` is a pair of numbers, lowest and highest."""
    if not isinstance(limit, tuple | list) or len(limit) != 2 or not limit[0] <= limit[1]:
        raise ValueError(f"{name} ({limit!r}) must be a pair (lowest, highest); use (0.0, float('inf')) for no limit.")


def check_mask(mask, want, layout="batch, length"):
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.shape != torch.Size(want):
        raise ValueError(
            f"mask ({describe(mask)}) must be a bool [{layout}] = {list(want)}; use attention_mask.bool()."
        )


def check_rows(first_name, first, mask, cu_seqlens):
    """Check mask and offsets of `first` [batch, length, ...]; returns (how many states there are, of what)."""
    check_some_length(first_name, first)
    if cu_seqlens is None:
        if mask is not None:
            check_mask(mask, first.shape[:2])
        return first.shape[0], "batch"
    if mask is not None:
        raise ValueError(
            f"mask ({describe(mask)}) must be None because cu_seqlens is given; leave padding out of packed rows."
        )
    check_offsets(cu_seqlens, first)
    return cu_seqlens.numel() - 1, "sequences"


def check_offsets(cu_seqlens, first):
    if (
        not isinstance(cu_seqlens, torch.Tensor)
        or cu_seqlens.dtype != torch.int32
        or cu_seqlens.dim() != 1
        or cu_seqlens.numel() < 2
    ):
        raise ValueError(
            f"cu_seqlens ({describe(cu_seqlens)}) must be a 1-D int32 tensor of sequences + 1 offsets; "
            "use torch.tensor(offsets, dtype=torch.int32)."
        )
    if first.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens ({cu_seqlens.numel()} offsets) must come with batch 1 but batch is {first.shape[0]}; "
            "pack the rows into one, or drop cu_seqlens."
        )
    if cu_seqlens.device not in (first.device, torch.device("cpu")):
        raise ValueError(f"cu_seqlens ({cu_seqlens.device}) must be on {first.device} or the CPU; move it there.")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return  # reading the values would wait for the device; a kernel keeps inside the row whatever they are
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != first.shape[1]:
        raise ValueError(
            f"cu_seqlens (from {offsets[0]} to {offsets[-1]}) must go from 0 to the length {first.shape[1]}; "
            "give every token a sequence."
        )
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if end < begin:
            raise ValueError(
                f"cu_seqlens (offset {n + 1} is {end}, after {begin}) must not decrease; "
                "use the cumulative sum of lengths."
            )


def check_state(name, state, layout, want):
    """`state` is a float tensor of shape `want`; `layout` begins with what `check_rows` returned."""
    if not isinstance(state, torch.Tensor) or state.shape != torch.Size(want) or not state.is_floating_point():
        raise ValueError(
            f"{name} ({describe(state)}) must be a float [{layout}] = {list(want)}; "
            "pass what return_final_state=True returned."
        )


def check_devices(first_name, first, given):
    """Every tensor in `given` {name: tensor or None} is on the device of `first`."""
    for name, x in given.items():
        if x is not None and x.device != first.device:
            raise ValueError(f"{name} ({x.device}) must be on the device of {first_name} ({first.device}); move it.")


def computing_dtype(*tensors) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
