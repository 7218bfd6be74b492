"""Cross-entropy over a large table of items or words, without the matrix of all logits.

The head of a recommender (BERT4Rec, arXiv 1904.06690, section 3.5) has as many logits a token as the catalogue has
items. Here the log-sum-exp is kept running over pieces of the table, and with it the gradient of the hidden states:
that is what attention over the table would put out, so the online softmax of FlashAttention (arXiv 2205.14135) gives
it in the forward pass. The backward pass makes each piece of logits once more, for the table's gradient.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._dispatch import Op, register, run
from ._validate import check_devices, check_layout, check_shape, computing_dtype, describe


def linear_cross_entropy(
    h,
    E,
    labels,
    *,
    bias=None,
    ignore_index=-100,
    label_smoothing=0.0,
    scale=1.0,
    num_items_in_batch=None,
    backend="auto",
    chunk_size=8192,
):
    """`F.cross_entropy(scale * h @ E.T + bias, labels)` in memory of the size tokens x chunk_size.

    loss_t = logsumexp_i z_ti - (1 - s) z_t,y_t - s mean_i z_ti,     z_ti = scale h_t . E_i + bias_i,  s the smoothing

    Args:
        h: `[tokens, d]`, hidden states of the tokens that have a label, any float dtype.
        E: `[N, d]`, the table.
        labels: `[tokens]` int64, rows of E, or `ignore_index` for tokens that do not count.
        bias: `[N]`, or None.
        ignore_index: the label of tokens that do not count.
        label_smoothing: in [0, 1), the part of a label's mass that is spread over all N rows.
        scale: multiplies the products; 1 / temperature.
        num_items_in_batch: the loss is the sum over tokens divided by this number (an int or a tensor, as Trainer
            gives it); by default the number of tokens that count, and at least 1.
        backend: "auto", "reference", "torch" or "triton"; `undersong.ops.explain()` says which one ran and why.
        chunk_size: rows of E whose logits are held at once; "reference" and "triton" do without.

    Returns:
        The loss, a scalar in float32 (float64 if h, E or bias are), differentiable in h, E and bias.

    Raises:
        ValueError: shapes, dtypes or devices disagree, labels that E does not have (looked at on the CPU only), a
            smoothing outside [0, 1), or an unknown backend.
        RuntimeError: backend="triton" cannot run here; the message says why.

    >>> h, E = torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    >>> linear_cross_entropy(h, E, torch.tensor([0, 1]))
    tensor(0.0949)
    """
    _validate(h, E, labels, bias, ignore_index, label_smoothing, chunk_size)
    losses = run(OP, backend, h, E, labels, bias, ignore_index, float(label_smoothing), float(scale), chunk_size)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum().clamp(min=1)
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def reference(h, E, labels, bias=None, ignore_index=-100, label_smoothing=0.0, scale=1.0, chunk_size=None):
    """The definition, with all logits: the loss of each token `[tokens]`, 0 where it does not count."""
    dtype = computing_dtype(h, E, bias)
    logits = scale * h.to(dtype) @ E.to(dtype).T
    logits = logits if bias is None else logits + bias
    counts = labels != ignore_index
    labels = labels.masked_fill(~counts, 0)
    kept = (1 - label_smoothing) * logits.gather(1, labels[:, None]).squeeze(1)
    losses = logits.logsumexp(1) - kept
    if label_smoothing:
        losses = losses - label_smoothing * logits.mean(1)
    return torch.where(counts, losses, 0.0)


def torch_losses(h, E, labels, bias=None, ignore_index=-100, label_smoothing=0.0, scale=1.0, chunk_size=8192):
    """Pieces of the table one after the other."""
    # torch.compile would unroll the loop over the pieces; its graph breaks here instead.
    apply = torch.compiler.disable(_Losses.apply) if torch.compiler.is_dynamo_compiling() else _Losses.apply
    h = scale * h.to(computing_dtype(h, E, bias))
    return apply(h, E, bias, labels, labels != ignore_index, label_smoothing, chunk_size)


class _Losses(torch.autograd.Function):
    """With p the softmax and g the gradient of the losses, 0 for tokens that do not count,

    dh_t = g_t (sum_i p_ti E_i - (1 - s) E_y_t - s mean_i E_i)
    dE_i = sum_t g_t p_ti h_t - (1 - s) sum_{t: y_t = i} g_t h_t - s/N sum_t g_t h_t,    dbias the same with h_t = 1
    """

    @staticmethod
    def forward(ctx, h, E, bias, labels, counts, smoothing, chunk):
        labels = labels.masked_fill(~counts, 0)
        top = h.new_full((len(h),), torch.finfo(h.dtype).min)  # finite: a bias may be -inf throughout a piece
        mass, mixed = torch.zeros_like(top), torch.zeros_like(h)
        wants_dh = ctx.needs_input_grad[0]
        for rows, logits in _pieces(h, E, bias, chunk):
            higher = torch.maximum(top, logits.amax(1))
            weights = logits.sub_(higher[:, None]).exp_()
            shrink = (top - higher).exp_()
            mass = mass * shrink + weights.sum(1)
            if wants_dh:
                mixed = torch.addmm(mixed.mul_(shrink[:, None]), weights, E[rows].to(h.dtype))
            top = higher
        lse = top + mass.log()
        picked = E[labels].to(h.dtype)
        losses = lse - (1 - smoothing) * _with_bias((h * picked).sum(1), bias, labels)
        mean = None
        if smoothing:
            mean = E.mean(0, dtype=h.dtype)
            losses -= smoothing * (h @ mean + (0.0 if bias is None else bias.mean(dtype=h.dtype)))
        dh = None
        if wants_dh:
            dh = mixed.div_(mass[:, None]).sub_(picked, alpha=1 - smoothing)
            dh = dh if mean is None else dh.sub_(mean, alpha=smoothing)
        ctx.save_for_backward(h, E, bias, labels, counts, lse, dh)
        ctx.smoothing, ctx.chunk = smoothing, chunk
        return losses.masked_fill_(~counts, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, E, bias, labels, counts, lse, dh = ctx.saved_tensors
        g = g.masked_fill(~counts, 0.0)[:, None]
        dE = torch.empty_like(E) if ctx.needs_input_grad[1] else None
        dbias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        if dE is not None or dbias is not None:
            everywhere = ctx.smoothing / len(E)
            gh, weighted = g * h, everywhere * (g * h).sum(0)
            for rows, logits in _pieces(h, E, bias, ctx.chunk):
                p = logits.sub_(lse[:, None]).exp_()
                if dE is not None:
                    dE[rows] = p.T @ gh - weighted
                if dbias is not None:
                    dbias[rows] = (p.T @ g).squeeze(1) - everywhere * g.sum()
            if dE is not None:
                dE.index_add_(0, labels, gh.to(E.dtype), alpha=ctx.smoothing - 1)
            if dbias is not None:
                dbias.index_add_(0, labels, g.squeeze(1).to(bias.dtype), alpha=ctx.smoothing - 1)
        return None if dh is None else g * dh, dE, dbias, None, None, None, None


def _pieces(h, E, bias, chunk):
    """(rows of E, logits `[tokens, rows]`), the logits in the same memory every time."""
    memory = h.new_empty(len(h) * min(chunk, len(E)))
    for begin in range(0, len(E), chunk):
        rows = slice(begin, min(begin + chunk, len(E)))
        piece = E[rows].to(h.dtype)
        logits = torch.mm(h, piece.T, out=memory[: len(h) * len(piece)].view(len(h), len(piece)))
        yield rows, logits if bias is None else logits.add_(bias[rows])


def _with_bias(logits, bias, labels):
    return logits if bias is None else logits + bias[labels]


def _validate(h, E, labels, bias, ignore_index, label_smoothing, chunk_size):
    check_layout("h", h, "tokens, d")
    check_layout("E", E, "N, d")
    check_shape("E", E, "N, d", (E.shape[0], h.shape[1]), f"h is {describe(h)}")
    if not len(E):
        raise ValueError(f"E ({describe(E)}) must have at least 1 row; a loss needs something to choose from.")
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != h.shape[:1]:
        raise ValueError(f"labels ({describe(labels)}) must be an int64 [tokens] = [{len(h)}]; one for each row of h.")
    if bias is not None:
        check_shape("bias", bias, "N", (len(E),), f"E is {describe(E)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing ({label_smoothing}) must lie in [0, 1); use 0.1, or 0.0 for none.")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size!r}) must be a positive integer; use 8192.")
    check_devices("h", h, {"E": E, "labels": labels, "bias": bias})
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not len(labels):
        return  # reading the values would wait for the device
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= len(E)))]
    if len(wrong):
        raise ValueError(
            f"labels ({wrong[0].item()}) must be rows of E, 0 to {len(E) - 1}, or ignore_index ({ignore_index}); "
            "subtract 1 from item ids that count from 1."
        )


def _example(device, dtype):
    """A small input for the kernel's self-check: several tiles, not full, ignored tokens, every option."""
    generator = torch.Generator().manual_seed(0)
    h, E = torch.randn(70, 40, generator=generator), torch.randn(300, 40, generator=generator) * 0.3
    bias, labels = torch.randn(300, generator=generator), torch.randint(0, 300, (70,), generator=generator)
    labels[::7] = -100
    h, E, bias = (x.to(device, dtype).requires_grad_() for x in (h, E, bias))
    return h, E, labels.to(device), bias, -100, 0.1, 1.5, 128


def _kernel_refuses(h, E, labels, bias=None, *settings):
    if computing_dtype(h, E, bias) == torch.float64:
        return "float64 inputs are computed in float64, which the kernel does not do; use backend='torch'"
    if h.shape[1] > 256:
        return f"it takes up to 256 columns, got d = {h.shape[1]}; use backend='torch'"
    return None


OP = register(
    Op(
        name="linear_cross_entropy",
        reference=reference,
        torch=torch_losses,
        kernel="recommendation",
        kernel_refuses=_kernel_refuses,
        example=_example,
    )
)
