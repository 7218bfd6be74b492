"""Hit ratio, NDCG and MRR of the item that came next, with the protocol in every name.

Whether a model ranks the whole catalogue or a hundred sampled items, and whether items already seen are left out,
changes the figures more than most models do (Krichene and Rendle, KDD 2020; for BERT4Rec arXiv 2207.07483), so figures
of different protocols must not carry one name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PROTOCOLS = ("full", "pop100", "uniform100")


def rank_of(scores, target, exclude=None, ties="pessimistic"):
    """The rank of each row's target among its scores, on the device of the scores.

    r = 1 + #{i != target: s_i >= s_target},     ties="mean": those equal to s_target count half

    Args:
        scores: `[batch, N]` float. A NaN counts as higher than the target, and a target of NaN comes last.
        target: `[batch]` int64, columns of scores.
        exclude: `[batch, m]` int64, columns that do not compete, such as the items a user has seen; -1 stands for
            none. A target among them is still ranked.
        ties: "pessimistic" or "mean".

    Returns:
        `[batch]` float32, from 1 to N.

    Raises:
        ValueError: shapes or dtypes disagree, a target outside the scores, or an unknown way with ties.

    >>> rank_of(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([1]))
    tensor([3.])
    >>> rank_of(torch.tensor([[0.9, 0.5, 0.5, 0.1]]), torch.tensor([1]), exclude=torch.tensor([[0, -1]]), ties="mean")
    tensor([1.5000])
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores ({scores.dtype} {list(scores.shape)}) must be a float [batch, N]; one row a user.")
    batch, items = scores.shape
    for name, x, shape in (("target", target, (batch,)), ("exclude", exclude, (batch, -1))):
        if x is not None and (x.dtype != torch.int64 or x.dim() != len(shape) or len(x) != batch):
            want = "[batch]" if len(shape) == 1 else "[batch, m]"
            raise ValueError(
                f"{name} ({x.dtype} {list(x.shape)}) must be an int64 {want} with batch = {batch} as in scores."
            )
    if ties not in ("pessimistic", "mean"):
        raise ValueError(f"ties ({ties!r}) must be 'pessimistic' or 'mean'.")
    if target.device.type == "cpu" and batch and not (target.min() >= 0 and target.max() < items):
        wrong = target[(target < 0) | (target >= items)][0]
        raise ValueError(f"target ({wrong}) must be a column of scores, 0 to {items - 1}; subtract 1 from item ids.")
    own = scores.gather(1, target[:, None])
    competes = torch.ones(batch, items + 1, dtype=torch.bool, device=scores.device)  # one column more, for -1
    competes.scatter_(1, target[:, None], False)
    if exclude is not None:
        competes.scatter_(1, torch.where(exclude < 0, items, exclude), False)
    competes = competes[:, :-1]
    ahead = (~(scores < own) & competes).sum(1, dtype=torch.float32)
    if ties == "mean":
        ahead -= ((scores == own) & competes).sum(1, dtype=torch.float32) / 2
    return 1 + ahead


def ranking_scores(
    ranks: Sequence[float] | torch.Tensor,
    ks: Sequence[int] = (1, 5, 10),
    protocol: str = "full",
    seen_filtered: bool = True,
) -> dict[str, float]:
    """Means over users of HR@k = [r <= k], NDCG@k = [r <= k] / log2(r + 1) and MRR = 1 / r.

    There is one right item a user, so the ideal DCG is 1.

    Args:
        ranks: of each user's right item, from 1; `rank_of` gives them.
        ks: lengths of the lists.
        protocol: what the ranks are among: "full", the whole catalogue; "pop100" or "uniform100", the item and 100
            others sampled by popularity or uniformly.
        seen_filtered: whether the items a user has seen were left out.

    Returns:
        `hr@10/full/unseen` and so on, `ndcg@...` and `mrr/...`; "unseen" says that seen items were left out, "all"
        that they competed.

    Raises:
        ValueError: no ranks, a rank below 1 or NaN, no lengths or one below 1, an unknown protocol.

    >>> ranking_scores([1, 2], ks=(1,))
    {'hr@1/full/unseen': 0.5, 'ndcg@1/full/unseen': 0.5, 'mrr/full/unseen': 0.75}
    """
    ranks = torch.as_tensor(ranks, dtype=torch.float64)
    if not ranks.numel():
        raise ValueError("ranks must hold at least one rank.")
    if not (ranks >= 1).all():
        raise ValueError(f"ranks must be at least 1, but one is {ranks[~(ranks >= 1)][0].item():g}; count from 1.")
    if not len(ks) or min(ks) < 1:
        raise ValueError(f"ks ({tuple(ks)}) must be lengths of at least 1; use (1, 5, 10).")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol ({protocol!r}) must be one of {', '.join(PROTOCOLS)}.")
    suffix = f"{protocol}/{'unseen' if seen_filtered else 'all'}"
    gain = 1 / torch.log2(ranks + 1)
    scores = {f"hr@{k}/{suffix}": (ranks <= k).double().mean().item() for k in ks}
    scores |= {f"ndcg@{k}/{suffix}": torch.where(ranks <= k, gain, 0.0).mean().item() for k in ks}
    return scores | {f"mrr/{suffix}": (1 / ranks).mean().item()}
