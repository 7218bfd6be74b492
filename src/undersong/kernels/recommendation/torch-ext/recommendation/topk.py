"""The best items for each user: launches, and the torch operator that torch.compile sees."""

import torch
import triton

from .common import WIDEST, check, processors, wide, width
from .registry import register
from .topk_kernels import BLOCK, mark_seen, scan_blocks, score_blocks, select

MOST = 256  # items that can be asked for: half of SELECT's width, so that every round leaves half of the keys
SELECT = {"WIDTH": 512, "AT_ONCE": 32, "num_warps": 8}
# By how many users share a pass over the table. Programs a multiprocessor holds at once hide the latency of its reads.
SCAN = {
    16: {"STAGES": 4, "num_warps": 4, "per_processor": 4},
    32: {"STAGES": 4, "num_warps": 4, "per_processor": 4},
}


def topk_items(h, E, k, bias=None, exclude=None, allow=None):
    """(scores [batch, k] float32, rows [batch, k] int64): the k largest of h @ E.T + bias, best first.

    h [batch, d], E [N, d] in float32, bfloat16 or float16 and any strides, bias [N], exclude [batch, m] int64 rows
    that a user must not get (-1 for none), allow [N] bool. Where fewer than k are left: -inf and -1. Equal scores are
    ordered by 2654435761 row mod 2^32, the largest first.
    """
    check(h, E)
    if (reason := problem(k)) is not None:
        raise ValueError(f"{reason}; use the torch path.")
    if allow is not None:
        bias = torch.where(allow, 0.0 if bias is None else bias.float(), -torch.inf)
    return _operator(h, E, k, bias, exclude)


def problem(k, d=1):
    """Why the kernel cannot find k items of a table with d columns, or None."""
    if k > MOST:
        return f"k ({k}) is above {MOST}"
    return f"the table has {d} columns, more than {WIDEST}" if d > WIDEST else None


def _topk(h, E, k, bias, exclude):
    scores, rows = _empty(h, E, k, bias, exclude)
    (batch, d), n = h.shape, len(E)
    if not batch:
        return scores, rows
    if not n:
        return scores.fill_(-torch.inf), rows.fill_(-1)
    with torch.cuda.device_of(h):
        blocks = triton.cdiv(n, BLOCK.value)
        words = None
        if exclude is not None and exclude.shape[1]:
            words = torch.zeros((blocks, batch), dtype=torch.int64, device=h.device)
            marks = exclude.shape[1]
            mark_seen[(triton.cdiv(batch * marks, 256),)](
                exclude, words, n, batch, marks, exclude.stride(0), exclude.stride(1), WIDTH=256, num_warps=2
            )
        users = 16 if batch <= 16 else 32
        cut = SCAN[users]
        flags = {
            "D": d, "BLOCK_D": width(d), "WIDE": wide(h, E), "BIAS": bias is not None,
            "SEEN": words is not None, "USERS": users, "num_warps": cut["num_warps"],
        }  # fmt: skip
        strides = *h.stride(), *E.stride(), 0 if bias is None else bias.stride(0)
        keys = torch.empty((batch, blocks), dtype=torch.int64, device=h.device)
        programs = min(blocks, cut["per_processor"] * processors(h.device))
        scan_blocks[(triton.cdiv(batch, users), programs)](
            h, E, bias, words, keys, n, batch, blocks, *strides, STAGES=cut["STAGES"], **flags
        )
        wanted = min(k, blocks)
        if wanted < blocks:
            best = torch.empty((batch, wanted), dtype=torch.int64, device=h.device)
            _select(keys, wanted, best)
        else:
            best = keys
        keys = torch.empty((batch, wanted * BLOCK.value), dtype=torch.int64, device=h.device)
        score_blocks[(batch * wanted,)](h, E, bias, words, best, keys, n, batch, wanted, *strides, **flags)
        _select(keys, k, rows, scores)
    return scores, rows


def _select(keys, k, out, scores=None):
    """The k largest of each row, in as many rounds as it takes for one program to see all that are left of a row."""
    batch, n = keys.shape
    while True:
        parts = triton.cdiv(n, SELECT["WIDTH"])
        last = parts == 1
        to = out if last else torch.empty((batch, parts * k), dtype=torch.int64, device=keys.device)
        select[(batch * parts,)](
            keys, to, scores, n, parts, K=k, LAST=last and scores is not None, **SELECT
        )  # fmt: skip
        if last:
            return
        keys, n = to, parts * k


def _empty(h, E, k, bias, exclude):
    shape = h.shape[0], k
    return h.new_empty(shape, dtype=torch.float32), h.new_empty(shape, dtype=torch.int64)


_operator = register(
    "topk", "(Tensor h, Tensor E, int k, Tensor? bias, Tensor? exclude) -> (Tensor, Tensor)", _topk, _empty
)
