"""Launches the SSD kernels and registers them as torch operators, so that autograd and torch.compile see them."""

import functools

import torch
import triton
import triton.language as tl

from .registry import register
from .ssd_backward import backward_groups, backward_tokens
from .ssd_forward import forward
from .ssd_states import states
from .ssd_steps import steps, steps_backward

# Tokens of a chunk, and how each kernel cuts its work, for half and for float32 values, chosen for an H100.
# Nothing here depends on batch, length or heads. maxnreg 255: left alone, ptxas 12.8 gives some float32 variants 32.
CHUNK = {True: 64, False: 32}
BLOCK_P = {True: 64, False: 32}  # most of head_dim that one program holds
WIDE = 128  # a larger state takes eight warps and all registers
STEPS = {True: {"HEADS": 16, "num_warps": 4}, False: {"HEADS": 16, "num_warps": 4}}
FORWARD = {True: {"STAGES": 1, "num_warps": 4, "maxnreg": 255}, False: {"STAGES": 1, "num_warps": 4, "maxnreg": 255}}
STATES = {True: {"STAGES": 3, "num_warps": 4, "maxnreg": 168}, False: {"STAGES": 1, "num_warps": 8, "maxnreg": 255}}
TOKENS = {True: {"num_warps": 4, "maxnreg": 255}, False: {"num_warps": 8, "maxnreg": 255}}
GROUPS = {True: {"STAGES": 2, "num_warps": 8, "maxnreg": 255}, False: {"STAGES": 1, "num_warps": 8, "maxnreg": 255}}
RUNS = 16  # at most so many runs of a sequence, because each adds up those before it
RUN_CHUNKS = 4  # and none shorter than that
PROGRAMS = 8  # of `backward_groups` for each multiprocessor, where a group has the heads for it
PRECISION = "tf32x3"  # of products of float32 values

_INTERPRETED = not isinstance(forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 when this was imported
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf")), chunk_size=64,
    initial_state=None, mask=None, cu_seqlens=None,
):  # fmt: skip
    """h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_t^T, y_t = (h_t C_t + D x_t) silu(z_t), and h after the last token.

    x, z [batch, length, heads, head_dim]; dt [batch, length, heads], which becomes clamp(softplus(dt + dt_bias),
    *dt_limit); A, dt_bias [heads]; B, C [batch, length, groups, state]; D [heads] or [heads, head_dim]; the state
    [batch, heads, head_dim, state] in float32. Inputs in float32, bfloat16 or float16 and any strides; mask
    [batch, length] bool; cu_seqlens [sequences + 1] int32 with batch 1, the state then has a row for each sequence.
    chunk_size is ignored: the kernel has its own.
    """
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, dt, A, B, C, D, z, dt_bias)):
        raise TypeError("the kernel computes in float32, got float64 inputs; use the torch path for them.")
    if x.device.type == "cpu" and not _INTERPRETED:
        raise RuntimeError(
            "the kernel needs CUDA tensors, got cpu; move the inputs, or set TRITON_INTERPRET=1 before the start."
        )
    if initial_state is not None:
        initial_state = initial_state.to(torch.float32).contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int32)
    low, high = map(float, dt_limit)
    y, state, _, _ = _operator(
        x, dt, A, B, C, D, z, dt_bias, initial_state, mask, cu_seqlens, bool(dt_softplus), low, high
    )
    return y, state


class _Plan:
    """How a call is cut into programs. Nothing that depends on batch or length becomes a compile-time constant."""

    def __init__(self, x, dt, A, B, C, z, bias, mask, cu_seqlens, softplus, low, high):
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state = B.shape[2:]
        self.dtype = _computing_dtype(x, B, C)
        self.half = self.dtype != torch.float32
        if _INTERPRETED:  # Triton's interpreter (3.9 still) multiplies bit patterns of bfloat16 in tl.dot
            self.dtype = torch.float32
        self.size = CHUNK[self.half]
        self.chunks = _chunks(x, cu_seqlens, self.size)  # of a row
        self.rows = self.batch * self.chunks
        self.block = min(BLOCK_P[self.half], _padded(self.head_dim))
        self.blocks = _ceil(self.head_dim, self.block)
        programs = max(self.batch * self.heads * self.blocks, 1)
        runs = min(2 * _processors(x.device) // programs, RUNS, self.chunks // RUN_CHUNKS)
        self.run_chunks = _ceil(self.chunks, max(runs, 1))
        self.runs = _ceil(self.chunks, self.run_chunks)  # of a row
        self.units = self.batch * self.runs * self.heads * self.blocks
        self.mask = None if mask is None else mask.view(torch.uint8)
        self.dt, self.A, self.bias = dt, A, bias
        self.common = {
            "length": self.length, "n_chunks": self.chunks, "n_heads": self.heads,
            "PACKED": cu_seqlens is not None, "CHUNK": self.size, "mask_b": 0, "mask_t": 0,
        }  # fmt: skip
        if mask is not None:
            self.common["mask_b"], self.common["mask_t"] = mask.stride()
        dt_b, dt_t, dt_h = dt.stride()
        self.step_options = {"dt_b": dt_b, "dt_t": dt_t, "dt_h": dt_h, "low": low, "high": high, "SOFTPLUS": softplus}
        self.tiles = {
            "x_strides": _strides(x), "B_strides": _strides(B), "C_strides": _strides(C), "z_strides": _strides(z),
            "group_heads": self.heads // self.groups, "head_dim": self.head_dim, "n_state": self.state,
            "n_blocks": self.blocks, "DOT": _DOT[self.dtype], "PRECISION": PRECISION,
            "BLOCK_P": self.block, "BLOCK_N": _padded(self.state),
        }  # fmt: skip

    def launch(self, kernel, programs, tensors, table, **options):
        if programs:
            table = table[self.half]
            if self.state > WIDE and kernel not in (steps, steps_backward):
                table = {**table, "num_warps": 8, "maxnreg": 255}
            with torch.cuda.device_of(tensors[0]):
                kernel[(programs,)](*tensors, **self.common, **options, **table)

    def launch_steps(self, kernel, tensors, table, **options):
        programs = self.rows * _ceil(self.heads, STEPS[self.half]["HEADS"])
        tensors = self.dt, self.A, self.bias, self.mask, table, *tensors
        self.launch(kernel, programs, tensors, STEPS, **self.step_options, **options)

    def launch_states(self, directions, summing, tensors, dy):
        self.launch(
            states, directions * self.units, tensors, STATES, n_forward=self.batch * self.runs, summing=summing,
            n_runs=self.runs, run_chunks=self.run_chunks, dy_strides=_strides(dy), **self.tiles,
        )  # fmt: skip

    def run_sums(self, x):
        """What runs leave to those behind them: sums and log decays; never read where a sequence is one run."""
        shape = (self.batch * self.runs, self.heads, self.head_dim, self.state) if self.runs > 1 else (1, 1)
        return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape[:2], dtype=torch.float32)


def _forward(x, dt, A, B, C, D, z, bias, h0, mask, cu_seqlens, softplus, low, high):
    plan = _Plan(x, dt, A, B, C, z, bias, mask, cu_seqlens, softplus, low, high)
    y, h1, steps_, table = _empty_outputs(x, dt, A, B, C, D, z, bias, h0, mask, cu_seqlens, softplus, low, high)
    where = None
    if cu_seqlens is not None:
        where = table = _chunk_table(cu_seqlens, plan.length, plan.size, plan.chunks)
    plan.launch_steps(steps, (steps_,), where)
    sums, decays = plan.run_sums(x)
    if plan.runs > 1:
        unused = x.new_empty(1, dtype=plan.dtype)
        tensors = x, x, B, C, z, h0, None, unused, unused, h0, sums, sums, decays, decays, steps_, plan.mask, where
        plan.launch_states(1, 1, tensors, x)
    plan.launch(
        forward, plan.units, (x, steps_, B, C, D, z, h0, plan.mask, where, sums, decays, y, h1), FORWARD,
        n_runs=plan.runs, run_chunks=plan.run_chunks, D_strides=_skip_strides(D), **plan.tiles,
    )  # fmt: skip
    return y, h1, steps_, table


def _backward(x, dt, A, B, C, D, z, bias, h0, mask, cu_seqlens, softplus, low, high, steps_, table, dy, g1):
    plan = _Plan(x, dt, A, B, C, z, bias, mask, cu_seqlens, softplus, low, high)
    where = None if cu_seqlens is None else table
    h, g = x.new_empty((2, plan.rows, plan.heads, plan.head_dim, plan.state), dtype=plan.dtype)
    dh0 = None if h0 is None else torch.empty_like(h0)
    (h_sums, h_decays), (g_sums, g_decays) = plan.run_sums(x), plan.run_sums(x)
    tensors = (
        x, dy, B, C, z, h0, g1, h, g, dh0, h_sums, g_sums, h_decays, g_decays, steps_, plan.mask, where
    )  # fmt: skip
    if plan.runs > 1:
        plan.launch_states(2, 1, tensors, dy)
    plan.launch_states(2, 0, tensors, dy)

    dx, dz = _empty(x), None if z is None else _empty(z)
    wide = D is not None and D.dim() == 2
    dD = x.new_empty((plan.rows, *D.shape), dtype=torch.float32) if wide else None
    dsteps = x.new_empty((plan.rows, plan.heads, plan.blocks, 4 * plan.size + 2), dtype=torch.float32)
    plan.launch(
        backward_tokens, plan.rows * plan.heads * plan.blocks,
        (x, steps_, B, C, D, z, plan.mask, where, h, g, dy, dx, dsteps, dz, dD), TOKENS,
        D_strides=_skip_strides(D), dy_strides=_strides(dy), **plan.tiles,
    )  # fmt: skip

    # Each program adds up the heads of one part of a group.
    group_heads = plan.heads // plan.groups
    parts = min(_ceil(PROGRAMS * _processors(x.device), max(plan.rows * plan.groups, 1)), group_heads)
    part_heads = _ceil(group_heads, parts)
    parts = _ceil(group_heads, part_heads)
    dBC = x.new_empty((2, *B.shape[:3], parts, plan.state), dtype=torch.float32)
    plan.launch(
        backward_groups, plan.rows * plan.groups * parts,
        (x, steps_, B, C, z, plan.mask, where, h, g, dy, dBC[0], dBC[1]), GROUPS,
        part_heads=part_heads, n_parts=parts, dy_strides=_strides(dy), **plan.tiles,
    )  # fmt: skip
    dB, dC = dBC.squeeze(4) if parts == 1 else dBC.sum(4)

    ddt = _empty(dt)
    sums = x.new_empty((plan.rows, 3, plan.heads), dtype=torch.float32)
    plan.launch_steps(steps_backward, (dsteps, ddt, sums), where, n_blocks=plan.blocks)
    dA, dbias, skip = sums.sum(0)
    none = x.new_empty(0)
    return (
        dx, ddt, dA.to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
        none if D is None else (dD.sum(0) if wide else skip).to(D.dtype),
        none if z is None else dz, none if bias is None else dbias.to(bias.dtype), none if h0 is None else dh0,
    )  # fmt: skip


def _chunk_table(cu_seqlens, length, size, chunks):
    """[chunks, 4] int32: first and last + 1 token, sequence, 1 where it begins + 2 where it ends. Every sequence has a
    chunk, an empty one too; there are as many as there could be, the last ones empty. No offset leads out of the row.
    """
    cu = cu_seqlens.clamp(0, length).long()
    begins, ends = cu[:-1], torch.maximum(cu[1:], cu[:-1])
    counts = ((ends - begins + size - 1) // size).clamp(min=1)
    behind = counts.cumsum(0)
    chunk = torch.arange(chunks, device=cu.device)
    sequence = torch.searchsorted(behind, chunk, right=True)
    real = sequence < begins.numel()
    sequence = sequence.clamp(max=begins.numel() - 1)
    place = chunk - (behind - counts)[sequence]
    begin = begins[sequence] + place * size
    end = torch.minimum(begin + size, ends[sequence])
    edges = (place == 0).long() + 2 * (place == counts[sequence] - 1)
    return torch.stack([begin, end, sequence, edges], 1).where(real[:, None], 0).int()


def _chunks(x, cu_seqlens, size):
    """Chunks of a row: packed sequences may leave one half-filled each."""
    return _ceil(x.shape[1], size) if cu_seqlens is None else x.shape[1] // size + cu_seqlens.shape[0] - 1


def _computing_dtype(x, B, C):
    return torch.promote_types(torch.promote_types(x.dtype, B.dtype), C.dtype)


def _padded(size):
    return max(16, 1 << (size - 1).bit_length())  # 16 is the least that a matrix product takes


def _ceil(a, b):
    return -(-a // b)


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _strides(x):
    """Strides, with 0 for a batch of one: whatever that stride was, it must not lead to another compiled kernel."""
    if x is None:
        return (0, 0, 0, 0)
    return x.stride() if x.shape[0] > 1 else (0, *x.stride()[1:])


def _skip_strides(D):
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)


def _empty(x):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # contiguous, whatever x is


def _empty_outputs(x, dt, A, B, C, D, z, bias, h0, mask, cu_seqlens, softplus, low, high):
    batch, _, heads, head_dim = x.shape
    size = CHUNK[_computing_dtype(x, B, C) != torch.float32]
    chunks = _chunks(x, cu_seqlens, size)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        _empty(x),
        x.new_empty((sequences, heads, head_dim, B.shape[3]), dtype=torch.float32),
        x.new_empty((batch * chunks, heads, 2, size), dtype=torch.float32),
        x.new_empty((0 if cu_seqlens is None else chunks, 4), dtype=torch.int32),
    )


def _fake_backward(x, dt, A, B, C, D, z, bias, h0, mask, cu_seqlens, softplus, low, high, steps_, table, dy, g1):
    none = x.new_empty(0)
    return tuple(none if tensor is None else _empty(tensor) for tensor in (x, dt, A, B, C, D, z, bias, h0))


def _save(ctx, inputs, output):
    *tensors, softplus, low, high = inputs
    _, _, steps_, table = output
    ctx.save_for_backward(*tensors, steps_, table)
    ctx.options = softplus, low, high
    ctx.mark_non_differentiable(steps_, table)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, g1, *_):
    *tensors, steps_, table = ctx.saved_tensors
    x = tensors[0]
    if dy is None:
        dy = x.new_zeros(()).expand_as(x)
    if g1 is not None:
        g1 = g1.to(torch.float32).contiguous()
    gradients = _backward_operator(*tensors, *ctx.options, steps_, table, dy, g1)
    given = (None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients))  # noqa: B905 - python 3.9
    return (*given, None, None, None, None, None)


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state,"
    " Tensor? mask, Tensor? cu_seqlens, bool dt_softplus, float low, float high"
)
_backward_operator = register(
    "ssd_backward",
    f"({_INPUTS}, Tensor steps, Tensor table, Tensor dy, Tensor? dstate) -> ({', '.join(['Tensor'] * 9)})",
    _backward,
    _fake_backward,
)
_operator = register(
    "ssd_forward",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_outputs,
    _differentiate,
    _save,
)
