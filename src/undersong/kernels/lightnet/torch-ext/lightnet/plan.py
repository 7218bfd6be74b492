"""How calls are cut into programs. Nothing that depends on batch or length becomes a compile-time constant."""

import torch
import triton
import triton.language as tl

from .forward import forward

# Tokens of a chunk and channels of a block, for bfloat16 and for everything else, chosen for an H100.
CHUNK = {True: 64, False: 32}
BLOCK = {True: 64, False: 32}
TABLE = {True: {"num_warps": 8, "num_stages": 1}, False: {"num_warps": 8, "num_stages": 1}}
# Products of float16 values go by tf32, whose mantissa is as long: queries divided by small sums leave its range.
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "tf32x3"}

INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported


class Plan:
    def __init__(self, q, k, v, mask, cu_seqlens):
        self.batch, self.length, self.heads, self.dim = k.shape
        self.value_dim = v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        dtype = computing_dtype(q, k, v)
        self.half = dtype == torch.bfloat16
        self.size, self.block = CHUNK[self.half], BLOCK[self.half]
        self.chunks = ceil(self.length, self.size)  # of the longest sequence there could be
        self.dims, self.value_dims = padded(self.dim), padded(self.value_dim)
        # Triton's interpreter (3.9 still) multiplies bit patterns of bfloat16 in tl.dot
        self.common = {
            "length": self.length, "n_chunks": self.chunks, "n_heads": self.heads, "dim": self.dim,
            "value_dim": self.value_dim, "PACKED": cu_seqlens is not None, "CHUNK": self.size,
            "DOT": tl.bfloat16 if self.half and not INTERPRETED else tl.float32, "PRECISION": PRECISION[dtype],
            "mask_b": 0, "mask_t": 0,
        }  # fmt: skip
        self.mask = None
        if mask is not None:
            self.mask = mask.view(torch.uint8)
            self.common["mask_b"], self.common["mask_t"] = mask.stride()

    @property
    def slots(self):
        """Chunks of all sequences; packed ones may leave one half-filled each."""
        if not self.common["PACKED"]:
            return self.batch * self.chunks
        return self.length // self.size + self.sequences

    def by_keys(self):
        """Options of kernels that hold a block of the keys' channels."""
        block = min(self.block, self.dims)
        return {"n_blocks": ceil(self.dim, block), "BLOCK": block, "VALUE_DIM": self.value_dims}

    def by_values(self):
        """Options of kernels that hold a block of the values' channels."""
        block = min(self.block, self.value_dims)
        return {"n_blocks": ceil(self.value_dim, block), "BLOCK": block, "DIM": self.dims}

    def launch(self, kernel, tensors, **options):
        """One program a sequence, head and block; without blocks one a tile of tokens."""
        programs = self.sequences * self.heads * options.get("n_blocks", self.chunks)
        if programs:
            with torch.cuda.device_of(tensors[0]):
                kernel[(programs,)](*tensors, **self.common, **options, **TABLE[self.half])


def computing_dtype(q, k, v):
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def ceil(a, b):
    return -(-a // b)


def padded(size):
    return max(16, 1 << (size - 1).bit_length())  # 16 is the least that a matrix product takes


def strides(x):
    """Strides, with 0 for a batch of one: whatever that stride was, it must not lead to another compiled kernel."""
    return x.stride() if x.shape[0] > 1 else (0, *x.stride()[1:])


def empty_like(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, whatever x is


def check(q, k, v):
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if q.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
