"""One token of Mamba's and of Mamba-2's recurrence: launch, operators, and the scan in its place for gradients."""

import torch

from .conv import cdiv, check_tensors, written
from .registry import records_gradients, register
from .scan import selective_scan
from .ssd import ssd
from .update_kernels import update as kernel

TILE = 1024  # states that one program holds
INFINITY = float("inf")


def selective_state_update(
    state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, INFINITY), mask=None,
    inplace=False,
):  # fmt: skip
    """h = exp(dt A) h + dt x B^T, y = (h C + D x) silu(z), with dt = clamp(softplus(dt + dt_bias), *dt_limit).

    Mamba: state [batch, channels, n], x, dt, z [batch, channels], A [channels, n], B, C [batch, n] or [batch, groups,
    n], D, dt_bias [channels]. Mamba-2: state [batch, heads, head_dim, n], x, z [batch, heads, head_dim], dt [batch,
    heads], A, D, dt_bias [heads], B, C [batch, groups, n]. mask [batch] bool. Returns (y, the state after the token).

    Where a gradient is needed it is the scan over one token, which has one."""
    check_tensors(state, x, dt, A, B, C, D, z, dt_bias)
    B, C = (t[:, None] if t.dim() == 2 else t for t in (B, C))
    if records_gradients(state, x, dt, A, B, C, D, z, dt_bias):
        y, new = _scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask)
        return y, state.copy_(new) if inplace else new
    low, high = map(float, dt_limit)
    arguments = state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, mask
    if not inplace:
        return _operator(*arguments)
    return _inplace_operator(*arguments), written(state)


def _scan(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, mask):
    z = None if z is None else z[:, None]
    mask = None if mask is None else mask[:, None]
    if state.dim() == 4:
        y, new = ssd(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, z, dt_bias, dt_softplus, dt_limit, 64,
                     state, mask, None)  # fmt: skip
        return y.squeeze(1), new
    # Mamba's scan has no limits of dt: they are applied here
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    if mask is not None:
        dt = dt.masked_fill(~mask, 0.0)
    dt = (torch.nn.functional.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    y, new = selective_scan(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, z, None, False, state, mask, None)
    return y.squeeze(1), new


def _update(state, *inputs):
    new = torch.empty(state.shape, dtype=torch.float32, device=state.device)
    return _launch(new, state, *inputs), new


def _update_(state, *inputs):
    return _launch(state, state, *inputs)


def _launch(new, state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, low, high, mask):
    batch, blocks, n_states = state.shape[0], state.shape[1], state.shape[-1]
    head_dim = state.shape[2] if state.dim() == 4 else 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_n = 1 << (n_states - 1).bit_length()
    block_r = max(TILE // block_n, 1)
    if programs := batch * cdiv(blocks * head_dim, block_r):
        with torch.cuda.device_of(x):
            kernel[(programs,)](
                state, x, dt, A, B, C, D, z, dt_bias, None if mask is None else mask.view(torch.uint8), y, new,
                low, high, blocks * head_dim, head_dim, n_states, blocks // B.shape[1],
                *_rows(state, 4), *_rows(new, 4), *_rows(x, 3), *_rows(z, 3), *_strides(dt, 2),
                A.stride(0), A.stride(1) if A.dim() == 2 else 0, *_strides(B, 3), *_strides(C, 3),
                *_strides(D, 1), *_strides(dt_bias, 1), *_strides(mask, 1),
                RATES=A.dim() == 2, ONE_GROUP=B.shape[1] == 1, SOFTPLUS=dt_softplus,
                LIMITED=high < INFINITY or low > 0 or not dt_softplus, HAS_D=D is not None, HAS_Z=z is not None,
                HAS_BIAS=dt_bias is not None, MASKED=mask is not None, BLOCK_R=block_r, BLOCK_N=block_n,
            )  # fmt: skip
    return y


def _strides(x, dims):
    """Strides; for a batch of one 0, so that whatever that stride was does not lead to another compiled kernel."""
    if x is None:
        return (0,) * dims
    return (0, *x.stride()[1:]) if dims > 1 and x.shape[0] == 1 else x.stride()


def _rows(x, dims):
    """Strides over (batch, head, dim of the head, ...), where Mamba's channels are heads without a dim."""
    strides = _strides(x, dims)
    return strides if len(strides) == dims else (*strides[:2], 0, *strides[2:])


def _fake(state, x, *rest):
    return x.new_empty(x.shape), state.new_empty(state.shape, dtype=torch.float32)


_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus,"
    " float low, float high, Tensor? mask"
)
_operator = register("update", f"(Tensor state, {_INPUTS}) -> (Tensor, Tensor)", _update, _fake)
_inplace_operator = register(
    "update_", f"(Tensor(a!) state, {_INPUTS}) -> Tensor", _update_, lambda *args: _fake(*args)[0]
)
