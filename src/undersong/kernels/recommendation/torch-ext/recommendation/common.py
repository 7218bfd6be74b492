"""Loads and products that the kernels share."""

import torch
import triton
import triton.language as tl


@triton.jit
def rows_of(ptr, rows, count, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a matrix [count, D] as a tile [rows, BLOCK_D], zeros outside; WIDE: in float32."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + rows.to(tl.int64)[:, None] * stride_n + d[None, :] * stride_d
    tile = tl.load(at, mask=(rows < count)[:, None] & (d < D)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def product(a, b):
    """a @ b, summed in float32; float32 factors keep their precision."""
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def vector_of(ptr, at, count, stride):
    return tl.load(ptr + at.to(tl.int64) * stride, mask=at < count, other=0.0).to(tl.float32)


INTERPRETED = not isinstance(product, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
WIDEST = 256  # columns of a table


def width(d):
    return max(triton.next_power_of_2(d), 16)


def wide(h, E):
    """Whether factors become float32; Triton's interpreter (3.9 still) multiplies the bit patterns of bfloat16."""
    return h.dtype != E.dtype or INTERPRETED


def check(h, E):
    if h.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    if torch.float64 in (h.dtype, E.dtype):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if h.shape[1] > WIDEST:
        raise ValueError(f"the kernel takes up to {WIDEST} columns, got {h.shape[1]}; use the torch path.")


def processors(device):
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
