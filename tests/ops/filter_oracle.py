"""Typical and top-p filtering by their definition in float64, for the tests of the ops and of the warpers."""

import torch

INF = float("inf")


def make_logits(case, scale, rows=6, vocab=1003, seed=0):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if case == "ties":
        logits = (logits * 4).round() / 4
    if case == "masked":
        logits[:, ::3] = -INF
        logits[0, 1:] = -INF  # one finite token
    return logits


def definition(logits, mass, need=1, typical=True):
    """`(kept, boundary)`: the kept tokens, and which rows float32 may decide otherwise: the running sum passes within
    1e-6 of the mass, or a distance differs from the threshold by less than float32 resolves."""
    log_p = logits.double().log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1, keepdim=True)
    d = (log_p + entropy).abs() if typical else -log_p
    order = d.argsort(-1)
    held = log_p.exp().gather(1, order).cumsum(-1)
    last = (held < mass).sum(-1, keepdim=True).clamp(min=need - 1, max=logits.shape[1] - 1)
    threshold = d.gather(1, order.gather(1, last))
    close = ((d - threshold).abs() < 4e-6) & ((d - threshold).abs() > 1e-12)
    boundary = ((held - mass).abs() < 1e-6).any(-1) | close.any(-1)
    tied = (d - threshold).abs() <= 1e-12
    return ((d < threshold) | tied) & (logits > -INF), boundary


def chi2_p_value(draws, p):
    """Of `draws` token ids under the probabilities `p`; tokens expected fewer than 5 times are one class."""
    counts, expected = torch.bincount(draws, minlength=len(p)).double(), p.double() * len(draws)
    assert counts[p == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()
