"""How `plstm1d` is computed in chunks with torch: matrices inside a chunk, states in between.

With G_ts = M_t T_{t-1} ... T_{s+1} S_s for s < t and G_tt = D_t, a chunk behind the state C is

    Y_t = sum_s G_ts (Q_t . K_s) V_s + M_t T_{t-1} ... T_first (Q_t C)
    C <- T_last ... T_first C + sum_s T_last ... T_{s+1} S_s K_s V_s

G is built by doubling. Of two neighbouring spans, with the one that is later in the row called odd, span and products
merge by  T' = T_odd T_even,  S' = [T_odd S_even, S_odd],  M' = [M_even, M_odd T_even],
G' = [[G_even, 0], [M_odd S_even, G_odd]]: only products, so that T may be negative, zero, or a matrix.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def neutral(x, valid):
    """Q, K, V, S, T, M, D of tokens that neither write nor read nor change the state where they are not `valid`.

    All are 0 there, T the identity; whatever stood there, even NaN, has no influence. valid: `[batch, length]`.
    """
    Q, K, V, S, T, M, D = (t.where(valid.view(*valid.shape, *(1,) * (t.dim() - 2)), 0) for t in x)
    identity = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    return Q, K, V, S, T + identity * ~valid[..., None, None, None], M, D


def chunk_length(length, chunk_size, Q, S, M):
    """Tokens of a chunk, a power of two: G has about `chunk_size` rows, and no more tokens than there are."""
    outputs, inputs = M.shape[3] * Q.shape[4], S.shape[4] * S.shape[5]
    size = max(chunk_size // max(outputs, inputs), 1)
    return min(1 << (size.bit_length() - 1), 1 << (length - 1).bit_length())


def chunked(Q, K, V, S, T, M, D, C, size):
    """Y and the final state. All inputs are in the computing dtype and behind `neutral`; Q is scaled.

    C: `[batch, heads, DK, DV, JT]`, the state to start from, or None.
    """
    batch, length, heads, DK, JQ = Q.shape
    JK, (DV, JV), (JO, _, JT) = K.shape[4], V.shape[3:], M.shape[3:]
    Q, K, V, S, T, M, D = _split((Q, K, V, S, T, M, D), size)  # [batch, heads, chunks, tokens, ...]

    G, S, T, M = _spans(S.flatten(5), T, M.flatten(4, 5), D.flatten(6).flatten(4, 5))
    QK = Q.mT.flatten(3, 4) @ K.mT.flatten(3, 4).mT  # [..., tokens JQ, tokens JK]
    G = G.unflatten(4, (size, JK, JV)).unflatten(3, (size, JO, JQ))
    weights = G * QK.unflatten(4, (size, JK, 1)).unflatten(3, (size, 1, JQ))
    weights = weights.squeeze((5, 7)) if JQ == JK == 1 else weights.sum((5, 7))
    y = weights.flatten(5).flatten(3, 4) @ V.mT.flatten(3, 4)  # [..., tokens JO, DV]

    S = S.unflatten(4, (size, JK, JV))  # from each token to the end of its chunk
    written = torch.einsum("bhnitkl,bhntvl->bhntkvi", S, V).flatten(5).flatten(3, 4)
    written = (K.mT.flatten(3, 4).mT @ written).unflatten(4, (DV, JT))  # [..., DK, DV, JT]
    states = []
    for n, write in enumerate(written.unbind(2)):
        states.append(written.new_zeros(write.shape) if C is None else C)
        C = write if C is None else write + _product(C, T[:, :, n, None].mT)
    entering = torch.stack(states, 2).flatten(4)
    read = (Q.mT.flatten(3, 4) @ entering).unflatten(4, (DV, JT)).unflatten(3, (size, JQ))  # [..., tokens, JQ, DV, JT]
    M = M.unflatten(3, (size, JO, JQ))
    y = y.unflatten(3, (size, JO)).mT + torch.einsum("bhntoji,bhntjvi->bhntvo", M, read)
    return y.flatten(2, 3)[:, :, :length].transpose(1, 2), C


def _split(x, size):
    """[batch, length, heads, ...] as [batch, heads, chunks, size, ...]; what is missing from the last is neutral."""
    missing = -x[0].shape[1] % size
    if missing:
        valid = torch.arange(x[0].shape[1] + missing, device=x[0].device) < x[0].shape[1]
        x = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) for t in x]
        x = neutral(x, valid.expand(x[0].shape[0], -1))
    return [t.unflatten(1, (-1, size)).movedim(3, 1) for t in x]


def _product(a, b):
    return a * b if b.shape[-2:] == (1, 1) or a.shape[-1] == 1 else a @ b


def _spans(S, T, M, G):
    """Merges all tokens of a chunk: G, S and T to the end of the chunk, M from its begin.

    S `[..., tokens, JT, JK JV]`, T `[..., tokens, JT, JT]`, M `[..., tokens, JO JQ, JT]`, G `[..., tokens, JO JQ,
    JK JV]`, each at last without the axis of tokens, which the other axes take up.
    """
    while T.shape[3] > 1:
        (S_even, S_odd), (T_even, T_odd), (M_even, M_odd), (G_even, G_odd) = (
            t.unflatten(3, (-1, 2)).unbind(4) for t in (S, T, M, G)
        )
        above = torch.cat([G_even, torch.zeros_like(G_even)], -1)
        G = torch.cat([above, torch.cat([_product(M_odd, S_even), G_odd], -1)], -2)
        S = torch.cat([_product(T_odd, S_even), S_odd], -1)
        M = torch.cat([M_even, _product(M_odd, T_even)], -2)
        T = _product(T_odd, T_even)
    return (t.squeeze(3) for t in (G, S, T, M))
