"""The best items of a catalogue for each user, without the matrix of all scores.

Serving a recommender (BERT4Rec, arXiv 1904.06690, section 3.6; gSASRec, arXiv 2308.07192) is a product of the users'
hidden states with the item table, of which k scores a row are wanted and items already seen are not. Scores are made
in pieces that stay in the cache; of each piece only the largest score of every block of items is kept, and the k best
blocks hold the k best items.
"""

from __future__ import annotations

import torch

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_shape, computing_dtype, describe

AT_ONCE = 2**21  # scores held at once: a piece of the table times all users, in the outer cache of a CPU
BLOCK = 32  # items whose largest score is kept
SPAN = 2**20  # items whose blocks are compared at once; memory does not grow beyond them
MIX, UNMIX = 2654435761, 244002641  # odd, their product is 1 mod 2^32


def topk_items(h, E, k, *, bias=None, exclude=None, allow=None, backend="auto"):
    """The k items with the highest scores for each user, best first, without gradient.

    scores[b, i] = h[b] . E[i] + bias[i],  over the items i that are allowed and not excluded for b

    Equal scores are ordered by the fixed pseudo-random number 2654435761 i mod 2^32, the larger first. Catalogues are
    often sorted by popularity, and lowest row first would make a model that knows nothing recommend what is popular.

    Args:
        h: `[batch, d]`, the users' hidden states, any float dtype.
        E: `[N, d]`, the item table, any float dtype.
        k: how many items; a positive integer.
        bias: `[N]`, added to every user's scores; -inf takes an item out.
        exclude: `[batch, m]` int64, rows of E that a user must not get; -1 stands for none, repetitions do no harm.
        allow: `[N]` bool, False for items that nobody must get.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.

    Returns:
        scores `[batch, k]` in float32 (float64 if h, E or bias are), sorted, and rows of E `[batch, k]` int64. Where
        fewer than k items are left, the last rows are -1 with score -inf. NaN scores come first, so that they show.

    Raises:
        ValueError: shapes, dtypes or devices disagree, k below 1, rows in exclude that E does not have (looked at on
            the CPU only), or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> h, E = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> topk_items(h, E, 2)
    (tensor([[3., 2.]]), tensor([[2, 1]]))
    >>> topk_items(h, E, 2, exclude=torch.tensor([[2, 0]]))
    (tensor([[2., -inf]]), tensor([[ 1, -1]]))
    """
    _validate(h, E, k, bias, exclude, allow)
    bias = None if bias is None else bias.detach()
    return run(OP, backend, h.detach(), E.detach(), k, bias, exclude, allow)


def reference(h, E, k, bias=None, exclude=None, allow=None):
    """The definition: all scores, sorted."""
    dtype = computing_dtype(h, E, bias)
    scores = h.to(dtype) @ E.to(dtype).T
    scores = scores if bias is None else scores + bias
    if allow is not None:
        scores = scores.masked_fill(~allow, -torch.inf)
    if exclude is not None:
        seen = torch.zeros(len(h), len(E) + 1, dtype=torch.bool, device=h.device)  # one column more, for -1
        seen.scatter_(1, torch.where(exclude < 0, len(E), exclude), True)
        scores = scores.masked_fill(seen[:, :-1], -torch.inf)
    items = torch.arange(len(E), device=h.device)
    order = (items * MIX % 2**32).argsort(descending=True)
    scores, places = scores[:, order].sort(dim=1, descending=True, stable=True)
    return _best(scores, order[places], k)


def torch_topk(h, E, k, bias=None, exclude=None, allow=None):
    """Pieces of the table one after the other; the CPU's path, and that of a GPU without the kernel."""
    if torch.compiler.is_compiling() or computing_dtype(h, E, bias) == torch.float64 or not h.numel() or not len(E):
        return reference(h, E, k, bias, exclude, allow)  # one graph without choices that depend on the data
    h = h.float()
    if allow is not None:
        bias = torch.where(allow, 0.0 if bias is None else bias.float(), -torch.inf)
    seen = None if exclude is None else _Seen(exclude, len(h))
    parts = [_span(h, E, k, bias, seen, begin) for begin in range(0, len(E), SPAN)]
    keys = torch.cat(parts, 1)
    keys = keys.topk(min(k, keys.shape[1]), 1).values
    return _best(*_unpack(keys), k)


def _span(h, E, k, bias, seen, begin):
    """Keys `[batch, <= k]` of the best of `SPAN` items."""
    end, batch = min(begin + SPAN, len(E)), len(h)
    piece = max(AT_ONCE // batch // BLOCK, 1) * BLOCK
    memory = h.new_empty(min(piece, end - begin + -(end - begin) % BLOCK), batch)
    highest = h.new_empty(-((begin - end) // BLOCK), batch)
    for first in range(begin, end, piece):
        last = min(first + piece, end)
        whole = memory[: last - first + (first - last) % BLOCK]
        scores = torch.mm(E[first:last].float(), h.T, out=whole[: last - first])
        whole[last - first :] = -torch.inf  # behind the last item
        if bias is not None:
            scores += bias[first:last, None]
        if seen is not None:
            scores.view(-1).index_fill_(0, seen.between(first, last), -torch.inf)
        blocks = whole.view(-1, BLOCK, batch)
        torch.amax(blocks, 1, out=highest[(first - begin) // BLOCK :][: len(blocks)])
    wanted = min(k, len(highest))
    best, blocks = highest.T.contiguous().topk(min(k + 1, len(highest)), 1)
    keys = _score_blocks(h, E, blocks[:, :wanted], bias, seen, begin, end)
    keys = keys.topk(min(k, keys.shape[1]), 1).values
    if wanted < len(highest):  # a block left out ties with one taken: which of them counts, only their items tell
        tied = best[:, wanted - 1 : wanted].eq(best[:, wanted:]) & best[:, wanted:].gt(-torch.inf)
        for row in tied.flatten().nonzero().flatten().tolist():
            blocks = (highest[:, row] >= best[row, -1]).nonzero().T
            one = None if seen is None else seen.of(row)
            parts = [
                _score_blocks(h[row : row + 1], E, some, bias, one, begin, end).topk(min(k, BLOCK * some.shape[1]), 1)
                for some in blocks.split(SPAN // BLOCK // 8, 1)
            ]
            best_keys = torch.cat([part.values for part in parts], 1)
            keys[row] = best_keys.topk(keys.shape[1], 1).values[0]
    return keys


def _score_blocks(h, E, blocks, bias, seen, begin, end):
    """Keys of all items of some blocks `[batch, blocks]` of a span, a few users at a time."""
    batch, keys = len(h), []
    for users in torch.arange(batch, device=h.device).split(max(AT_ONCE // (blocks.shape[1] * BLOCK * h.shape[1]), 1)):
        items = begin + blocks[users, :, None] * BLOCK + torch.arange(BLOCK, device=h.device)
        items = items.flatten(1)
        known = items.clamp(max=end - 1)
        scores = torch.bmm(E[known].float(), h[users, :, None]).squeeze(2)
        if bias is not None:
            scores += bias[known]
        gone = items >= end
        if seen is not None:
            gone |= seen.holds(known, users[:, None])
        keys.append(_pack(scores.masked_fill_(gone, -torch.inf), items))
    return torch.cat(keys)


class _Seen:
    """What is excluded for whom, as sorted numbers item * batch + user: their places in scores `[items, batch]`."""

    def __init__(self, exclude, batch):
        users = torch.arange(batch, device=exclude.device)[:, None]
        self.batch = batch
        self.numbers = torch.where(exclude < 0, -1, exclude * batch + users).flatten().sort().values

    def between(self, first, last):
        """Places in the scores of the items from first to last."""
        ends = torch.tensor([first, last], device=self.numbers.device) * self.batch
        begin, end = torch.searchsorted(self.numbers, ends).tolist()
        return self.numbers[begin:end] - first * self.batch

    def holds(self, items, users):
        number = items * self.batch + users
        at = torch.searchsorted(self.numbers, number).clamp_(max=max(len(self.numbers) - 1, 0))
        return self.numbers[at] == number if len(self.numbers) else torch.zeros_like(number, dtype=torch.bool)

    def of(self, user):
        mine = self.numbers[(self.numbers >= 0) & (self.numbers % self.batch == user)]
        return _Seen(mine[None] // self.batch, 1)


def _pack(scores, items):
    """Scores and items as int64 that compare as they should be ordered: the score's bits, then the mixed item."""
    bits = torch.where(scores == 0.0, 0.0, scores).view(torch.int32)  # -0.0 equals 0.0
    bits = torch.where(scores.isnan(), 2**31 - 1, bits ^ (bits >> 31 & 0x7FFFFFFF))
    return (bits.long() << 32) + items * MIX % 2**32


def _unpack(keys):
    bits = (keys >> 32).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32), (keys & 0xFFFFFFFF) * UNMIX % 2**32


def _best(scores, items, k):
    """The first k of sorted rows; -1 for an item whose score is -inf, and where there is none."""
    scores, items = scores[:, :k], items[:, :k]
    items = items.masked_fill(scores == -torch.inf, -1)
    missing = (0, k - scores.shape[1])
    return (
        torch.nn.functional.pad(scores, missing, value=-torch.inf),
        torch.nn.functional.pad(items, missing, value=-1),
    )


def _validate(h, E, k, bias, exclude, allow):
    check_layout("h", h, "batch, d")
    check_layout("E", E, "N, d")
    check_shape("E", E, "N, d", (E.shape[0], h.shape[1]), f"h is {describe(h)}")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k ({k!r}) must be a positive integer; use 10.")
    if bias is not None:
        check_shape("bias", bias, "N", (len(E),), f"E is {describe(E)}")
    if allow is not None and (
        not isinstance(allow, torch.Tensor) or allow.dtype != torch.bool or allow.shape != E.shape[:1]
    ):
        raise ValueError(f"allow ({describe(allow)}) must be a bool [N] = [{len(E)}]; mark the rows of E with it.")
    if exclude is not None:
        _check_exclude(exclude, len(h), len(E))
    check_devices("h", h, {"E": E, "bias": bias, "exclude": exclude, "allow": allow})


def _check_exclude(exclude, batch, n):
    if (
        not isinstance(exclude, torch.Tensor)
        or exclude.dtype != torch.int64
        or exclude.dim() != 2
        or len(exclude) != batch
    ):
        raise ValueError(
            f"exclude ({describe(exclude)}) must be an int64 [batch, m] with batch = {batch}; "
            "fill short rows with -1, which stands for no item."
        )
    if exclude.device.type != "cpu" or torch.compiler.is_compiling() or not exclude.numel():
        return  # reading the values would wait for the device; the kernel compares them, it does not index by them
    low, high = (x.item() for x in exclude.aminmax())
    if low < -1 or high >= n:
        raise ValueError(
            f"exclude (from {low} to {high}) must hold rows of E, 0 to {n - 1}, or -1 for none; "
            "subtract 1 from item ids that count from 1."
        )


def _kernel_refuses(h, E, k, bias=None, exclude=None, allow=None):
    if computing_dtype(h, E, bias) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if h.shape[1] > 256 or k > 256:
        return f"it takes up to 256 columns and items, got d = {h.shape[1]} and k = {k}; use backend='torch'"
    return None


def _example(device, dtype):
    """A small input for the kernel's self-check: several blocks, the last one not full, every option, scores apart."""
    generator = torch.Generator().manual_seed(0)
    h, E = torch.randn(3, 24, generator=generator), torch.randn(700, 24, generator=generator)
    bias, allow = torch.randn(700, generator=generator), torch.rand(700, generator=generator) > 0.1
    exclude = torch.randint(-1, 700, (3, 50), generator=generator)
    return h.to(device, dtype), E.to(device, dtype), 7, bias.to(device), exclude.to(device), allow.to(device)


OP = register(
    Op(
        name="topk_items",
        reference=reference,
        torch=torch_topk,
        kernel="recommendation",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
