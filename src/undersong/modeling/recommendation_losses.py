"""Losses of recommenders, none of which builds the scores of all items for all positions.

Cross-entropy over the catalogue runs in chunks. The sampled losses draw k negatives for every position on the device:
softmax with the logQ correction (Bengio and Senecal 2008; Yi et al. 2019), binary cross-entropy (SASRec, arXiv
1808.09781) and its generalisation gBCE, which undoes the overconfidence that negative sampling brings (gSASRec, arXiv
2308.07192). Items are rows 0..N-1 of the table here.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops.linear_cross_entropy import linear_cross_entropy

_AT_ONCE = 2**24  # numbers of a chunk, 64 MB in float32
_AT_ONCE_CPU = 2**18  # 1 MB, which stays in the cache: half the time of large chunks, or less
_DENSE = 32  # up to so many items for each negative, the scores of all items of a chunk are cheaper than gathered rows


def recommendation_loss(h, rows, table, bias, config, *, counts=None, num_items_in_batch=None):
    """The loss that a configuration names, averaged over positions.

    Args:
        h: `[positions, d]`, what is multiplied with the table.
        rows: `[positions]` int64, the item to predict at each.
        table: `[N, d]`; bias: `[N]` or None.
        config: gives `loss_type`, `num_negatives`, `gbce_t`, `label_smoothing` and `negative_sampler`.
        counts: `[N]`, how often each item occurs, for `negative_sampler="popularity"`.
        num_items_in_batch: divides the sum of losses; None takes the number of positions.

    Returns:
        A scalar in at least float32; 0 when there are no positions.
    """
    if not len(h):
        return (h.sum() + table.sum() + (0 if bias is None else bias.sum())) * 0.0
    if config.loss_type == "ce":
        return linear_cross_entropy(
            h,
            table,
            rows,
            bias=bias,
            label_smoothing=config.label_smoothing,
            num_items_in_batch=num_items_in_batch,
        )
    weights = counts if config.negative_sampler == "popularity" else None
    negatives = draw_negatives((len(h), config.num_negatives), len(table), h.device, weights)
    positive = positive_scores(h, table, rows, bias)
    negative = negative_scores(h, table, negatives, bias)
    if config.loss_type == "sampled_softmax":
        log_q = None if weights is None else (weights / weights.sum()).log()
        losses = sampled_softmax(positive, negative, rows, negatives, log_q)
    else:
        losses = gbce(positive, negative, len(table), config.gbce_t if config.loss_type == "gbce" else 0.0)
    return losses.sum() / (len(h) if num_items_in_batch is None else num_items_in_batch)


def draw_negatives(shape, num_items, device, weights=None):
    """Items drawn with replacement, uniformly or by weight; one that equals the position's own item is not removed."""
    if weights is None:
        return torch.randint(num_items, shape, device=device)
    return torch.multinomial(weights, shape[0] * shape[1], replacement=True).view(shape)


def gbce(positive, negative, num_items, t):
    """Generalised binary cross-entropy of every position (gSASRec, arXiv 2308.07192), in closed form.

    With k negatives of N items, alpha = min(1, k / (N - 1)), beta = alpha t + (1 - t):
        loss = (beta softplus(-s+) + sum_j softplus(s-_j)) / (k + 1)
    It is BCE on sigmoid(s+)^beta, without the detour over logits of that power, which needs float64 and clamps.

    Args:
        positive: `[positions]` scores; negative: `[positions, k]`.
        num_items: N. t: 0 is plain BCE, 1 calibrates probabilities fully.

    Returns:
        `[positions]`.

    >>> positive, negative = torch.tensor([1.0]), torch.tensor([[0.5, -1.0]])
    >>> both = torch.cat([positive[:, None], negative], 1)
    >>> bce = F.binary_cross_entropy_with_logits(both, torch.tensor([[1.0, 0.0, 0.0]]))
    >>> torch.allclose(gbce(positive, negative, num_items=100, t=0.0)[0], bce)
    True
    """
    k = negative.shape[-1]
    alpha = k / max(num_items - 1, k)
    beta = alpha * t + (1 - t)
    return (beta * F.softplus(-positive) + F.softplus(negative).sum(-1)) / (k + 1)


def sampled_softmax(positive, negative, rows, negatives, log_q=None):
    """Softmax cross-entropy of every position over its item and its negatives, with s(i) - log q(i) for scores.

    Args:
        positive: `[positions]` scores of `rows` `[positions]`; negative: those of `negatives`, `[positions, k]` both.
        log_q: `[N]`, log of the probability to draw an item; None for uniform draws, where it cancels.

    Returns:
        `[positions]`. A negative that is the position's own item does not count.
    """
    if log_q is not None:
        positive, negative = positive - log_q[rows], negative - log_q[negatives]
    negative = negative.masked_fill(negatives == rows[:, None], -torch.inf)
    return torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive


def positive_scores(h, table, rows, bias=None):
    """h[p] . table[rows[p]] + bias[rows[p]], `[positions]`, in at least float32."""
    wide = torch.promote_types(h.dtype, torch.float32)
    scores = (h.to(wide) * F.embedding(rows, table).to(wide)).sum(-1)
    return scores if bias is None else scores + bias.to(wide)[rows]


def negative_scores(h, table, negatives, bias=None):
    """h[p] . table[negatives[p, j]] + bias[negatives[p, j]], `[positions, k]`, in at least float32.

    Neither the gathered rows `[positions, k, d]` nor all scores `[positions, N]` are ever held whole.
    """
    return _NegativeScores.apply(h, table, bias, negatives)


def _chunks(h, table, negatives):
    """(whether all items are scored, slices of positions), by what is smaller for a position."""
    k = negatives.shape[1]
    dense = len(table) <= _DENSE * k
    at_once = _AT_ONCE_CPU if h.device.type == "cpu" else _AT_ONCE
    size = max(1, at_once // (len(table) if dense else k * h.shape[1]))
    return dense, [slice(begin, begin + size) for begin in range(0, len(h), size)]


class _NegativeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, table, bias, negatives):
        ctx.save_for_backward(h, table, bias, negatives)
        wide = torch.promote_types(h.dtype, torch.float32)
        table = table.to(h.dtype)
        scores = torch.empty(negatives.shape, dtype=wide, device=h.device)
        dense, chunks = _chunks(h, table, negatives)
        for chunk in chunks:
            if dense:
                scores[chunk] = (h[chunk] @ table.T).gather(1, negatives[chunk]).to(wide)
            else:
                scores[chunk] = torch.einsum("pd,pkd->pk", h[chunk], F.embedding(negatives[chunk], table)).to(wide)
        return scores if bias is None else scores + bias.to(wide)[negatives]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        h, table, bias, negatives = ctx.saved_tensors
        wide = gradient.dtype
        grad_h = torch.empty(h.shape, dtype=wide, device=h.device)
        grad_table = torch.zeros(table.shape, dtype=wide, device=table.device)
        dense, chunks = _chunks(h, table, negatives)
        for chunk in chunks:
            states, drawn, upstream = h[chunk].to(wide), negatives[chunk], gradient[chunk]
            if dense:
                scores = upstream.new_zeros(len(drawn), len(table)).scatter_add_(1, drawn, upstream)
                grad_h[chunk] = scores @ table.to(wide)
                grad_table.addmm_(scores.T, states)
            else:
                grad_h[chunk] = torch.einsum("pk,pkd->pd", upstream, F.embedding(drawn, table).to(wide))
                outer = upstream.unsqueeze(-1) * states.unsqueeze(1)  # [chunk, k, d]
                grad_table.index_add_(0, drawn.flatten(), outer.flatten(0, 1))
        grad_bias = None
        if bias is not None:
            grad_bias = gradient.new_zeros(len(table)).index_add_(0, negatives.flatten(), gradient.flatten())
            grad_bias = grad_bias.to(bias.dtype)
        return grad_h.to(h.dtype), grad_table.to(table.dtype), grad_bias, None


__all__ = [
    "draw_negatives",
    "gbce",
    "negative_scores",
    "positive_scores",
    "recommendation_loss",
    "sampled_softmax",
]
