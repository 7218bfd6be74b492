"""What typical and top-p filtering share: one search for the tokens nearest to a centre.

With p the softmax of a row x and H its entropy in nats, locally typical sampling (Meister et al., arXiv 2202.00666,
section 4) orders tokens by |H + log p_v|, nucleus sampling (Holtzman et al., arXiv 1904.09751) by -log p_v. Since
H + log p_v = x_v - sum_u p_u x_u, both order by the distance |x_v - centre|: from the mean score sum_u p_u x_u, or
from the largest score. Either keeps the nearest tokens up to the smallest distance that holds `mass` probability.

`torch` below sorts only the few tokens around the threshold. The decision adds whole numbers, 2^-40 of probability, so
it depends neither on the batch around a row, nor on the number of threads, nor on the order of additions.
"""

from __future__ import annotations

import torch

UNIT = 2.0**40  # probability 1
CPU_CHUNK = 2**18  # elements: a few rows at a time stay in the cache
WIDEST = 64.0  # nats that the bins span at most; e^-64 is no probability
KERNEL_CHUNK = 8192  # tokens of a program
DIGITS = ((22, 11), (11, 11), (0, 11))  # (shift, bits) of the key in the radix select


def reference(logits, mass, need, fill, temperature=1.0, *, typical):
    """The definition, by a sort, in float64 for float64 logits:

    d_v = |H + log p_v| or -log p_v, ascending d_(0) <= d_(1) <= ...;   c_i = sum_{j <= i} p_(j)
    keep {v : d_v <= d_(j)},   j = #{i : c_i < mass}, at least need - 1, at most vocab - 1
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    log_p = (x / _column(temperature)).log_softmax(-1)
    p = log_p.exp()
    d = (torch.special.entr(p).sum(-1, keepdim=True) + log_p).abs() if typical else -log_p
    order = d.argsort(-1)
    short = p.gather(1, order).cumsum(-1) < _column(mass)
    last = short.sum(-1, keepdim=True)
    if torch.is_tensor(need) or need > 1:
        last = torch.maximum(last, torch.as_tensor(_column(need), device=last.device).long() - 1)
    threshold = d.gather(1, order.gather(1, last.clamp(max=x.shape[1] - 1)))
    removed = (d > threshold) & ~p.isnan() & (logits > -torch.inf)
    removed &= torch.as_tensor(_column(mass), device=logits.device) < 1.0
    return logits.masked_fill(removed, fill)


def torch_mask(logits, mass, need, fill, temperature=1.0, *, typical):
    """Fast on a CPU; elsewhere, and under torch.compile, without a wait for the device."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return _mask_rows(logits, mass, need, fill, temperature, typical, _select_by_digits)
    rows = max(1, CPU_CHUNK // max(logits.shape[1], 1))
    chunks = [logits[:0]]  # also for no rows at all
    for i in range(0, logits.shape[0], rows):
        m, n, t = (x[i : i + rows] if torch.is_tensor(x) else x for x in (mass, need, temperature))
        chunks.append(_mask_rows(logits[i : i + rows], m, n, fill, t, typical, _select_by_bins))
    return torch.cat(chunks) if len(chunks) != 2 else chunks[1]


def _mask_rows(logits, mass, need, fill, temperature, typical, select):
    x = logits.float()
    if torch.is_tensor(temperature) or temperature != 1.0:
        x = x / _column(temperature)
    p = x.softmax(-1)
    invalid = p[:, :1].isnan()  # one NaN or inf, or nothing but -inf, makes the whole row NaN
    if some_invalid := select is not _select_by_bins or bool(invalid.any()):
        p, x = p.masked_fill(invalid, 0.0), x.masked_fill(invalid, 0.0)
    centre = x.amax(-1, keepdim=True)
    scratch = x - centre
    if typical:
        # sum_v p_v (x_v - max) in units of 2^-44: whole numbers below 2^53 add up exactly in any order
        terms = scratch.clamp_(min=-1e30).mul_(p).mul_(2.0**44).round_()
        centre = (centre + terms.sum(-1, keepdim=True, dtype=torch.float64) / 2.0**44).float()
    # What the kept tokens must reach: probability, and their number. float64 holds whole numbers exactly.
    weights = [p.mul_(UNIT).round_().double()]
    targets = [(_column(mass).double() if torch.is_tensor(mass) else mass) * UNIT]
    if torch.is_tensor(need) or need > 1:
        weights.append(torch.ones_like(weights[0]))
        targets.append(_column(need))
    removed = select(x, centre, weights, targets, scratch)
    if some_invalid:
        removed &= ~invalid
    if torch.is_tensor(mass):
        removed &= _column(mass) < 1.0
    elif mass >= 1.0:
        return logits
    if fill != -torch.inf:
        removed &= logits > -torch.inf
    return torch.where(removed, fill, logits)


def _select_by_bins(x, centre, weights, targets, scratch):
    """Tokens beyond the threshold: a histogram over the distance, then a sort of the bin in which it lies."""
    bins = max(64, min(4096, x.shape[1] // 32))
    d = torch.sub(x, centre, out=scratch).abs_()
    scale = bins / d.amax(-1, keepdim=True).clamp_(1e-3, WIDEST)
    bin_ = d.mul_(scale).clamp_(max=bins - 1).int().long()
    held = [w.new_zeros(x.shape[0], bins).scatter_add_(1, bin_, w).cumsum_(1) for w in weights]
    short = _short(held, targets)
    chosen = short.sum(1, keepdim=True)  # `bins` where everything is needed
    below = [(h * short).amax(1, keepdim=True) for h in held]

    row, column = (bin_ == chosen).nonzero(as_tuple=True)
    if row.numel() == 0:
        return bin_ > chosen
    # float64 tells distances apart that float32 would round to ties
    near = (x[row, column].double() - centre[row, 0].double()).abs()
    counts = torch.bincount(row, minlength=x.shape[0])
    place = torch.arange(row.numel()) - (counts.cumsum(0) - counts)[row]
    shape = x.shape[0], int(counts.max())
    by_row, order = near.new_full(shape, torch.inf).index_put_((row, place), near).sort(1)
    held = [
        near.new_zeros(shape).index_put_((row, place), w[row, column]).gather(1, order).cumsum_(1).add_(b)
        for w, b in zip(weights, below, strict=True)
    ]
    last = _short(held, targets).sum(1, keepdim=True)
    threshold = by_row.gather(1, last.clamp_(max=shape[1] - 1))
    return (bin_ > chosen).index_put_((row, column), near > threshold[row, 0])


def _select_by_digits(x, centre, weights, targets, scratch):
    """The same by a radix select: each round fixes one digit of the threshold, from the top, by a histogram over that
    digit among the tokens that agree with the digits before. The key is the bits of the distance, offset so that the
    first digit has 128 bins an octave from 2^-4 to 2^12 nats, to 2^-29 of the distance."""
    d = (x.double() - centre.double()).abs_().clamp_(max=4095.9).add_(0.0625)
    key = (d.view(torch.int64) - 0x3FB0000000000000) >> 23
    prefix = torch.zeros_like(centre, dtype=torch.int64)
    below = [torch.zeros_like(centre, dtype=torch.float64) for _ in weights]
    for shift, bits in DIGITS:
        digit = key >> shift
        other, digit = (digit >> bits) != prefix, digit & (2**bits - 1)
        held = [
            w.new_zeros(x.shape[0], 2**bits).scatter_add_(1, digit, w.masked_fill(other, 0.0)).cumsum(1) + b
            for w, b in zip(weights, below, strict=True)
        ]
        short = _short(held, targets)
        below = [torch.maximum(b, (h * short).amax(1, keepdim=True)) for h, b in zip(held, below, strict=True)]
        prefix = (prefix << bits) | short.sum(1, keepdim=True).clamp_(max=2**bits - 1)
    return key > prefix


def _short(held, targets):
    short = held[0] < targets[0]
    for more, target in zip(held[1:], targets[1:], strict=True):
        short = short | (more < target)
    return short


def torch_sample(logits, mass, need, temperature, generator, *, mask=torch_mask):
    """A token of each row, by one uniform number on its running sum of probability; -1 without a distribution."""
    kept = mask(logits, mass, need, -torch.inf, temperature, typical=True)
    p = (kept.float() / _column(temperature)).softmax(-1)
    held = p.cumsum(-1, dtype=torch.float64)
    total = held[:, -1:]
    u = torch.rand(total.shape, generator=generator, dtype=torch.float64, device=p.device)
    tokens = torch.searchsorted(held, u * total, right=True)  # the first token whose sum is above: never one of p = 0
    return tokens.clamp(max=p.shape[1] - 1).masked_fill(total.isnan(), -1).squeeze(1)


def _column(value):
    """Per-row values as a column; a number as it is."""
    return value.unsqueeze(1) if torch.is_tensor(value) else value


def checked_setting(value, name, valid, must):
    """`value` as a Python number or as a 1-D tensor, with every entry checked (entries on a GPU are trusted: reading
    them would wait for the device)."""
    per_row = torch.is_tensor(value) or isinstance(value, list | tuple)
    if not per_row:
        _check_entry(value, name, valid, must)
        return value
    tensor = torch.as_tensor(value)
    if tensor.ndim > 1 or tensor.numel() == 0:
        shape = list(tensor.shape)
        raise ValueError(f"{name} (shape {shape}) must be a number or one number per row; pass a 1-D tensor.")
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        for row, entry in enumerate(tensor.flatten().tolist()):
            _check_entry(entry, f"{name}[{row}]" if tensor.ndim else name, valid, must)
    return tensor if tensor.ndim else tensor.item()


def _check_entry(entry, name, valid, must):
    if not valid(entry):
        raise ValueError(f"{name} ({entry}) must {must}.")


def checked_mass(value, name="mass", least="(0"):
    """A share of probability in (0, 1] or [0, 1]."""
    valid = _mass if least == "(0" else _mass_or_none
    return checked_setting(value, name, valid, f"lie in {least}, 1]; use 1.0 to keep every token")


def checked_minimum(value, name="min_tokens_to_keep"):
    return checked_setting(value, name, _whole, "be a positive integer; use 1 for no minimum")


def _mass(x):
    return 0.0 < x <= 1.0


def _mass_or_none(x):
    return 0.0 <= x <= 1.0


def _whole(x):
    return x >= 1 and float(x).is_integer()


def check_logits(logits, **settings):
    """Shapes and devices, before any computation."""
    if logits.ndim != 2 or not logits.is_floating_point():
        kind = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        raise ValueError(f"logits ({kind}) must be a float [batch, vocab]; reshape or cast them.")
    for name, value in settings.items():
        if torch.is_tensor(value) and value.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} has {value.numel()} values but logits have {logits.shape[0]} rows; pass one value per row."
            )


def per_row(value, name, logits):
    """A number as it is; values per prompt as `[batch]`, each repeated for the sequences of its prompt."""
    if not torch.is_tensor(value):
        return value
    repeats, rest = divmod(logits.shape[0], value.shape[0])
    if rest or not repeats:
        raise ValueError(
            f"{name} has {value.shape[0]} values but scores have {logits.shape[0]} rows; pass one value per prompt."
        )
    return value.to(logits.device).repeat_interleave(repeats) if repeats > 1 else value.to(logits.device)


def kernel_refuses(logits, *_):
    """Why the kernel cannot take these logits, or None; under the interpreter it takes all."""
    if logits.device.type != "cuda":
        return None
    return _kernel_limit(logits.shape[1], torch.cuda.get_device_properties(logits.device).multi_processor_count)


def _kernel_limit(vocabulary, processors):
    # The programs of a row wait for each other, so all of them must be on the device at once.
    most = KERNEL_CHUNK * min(processors, 128)
    return None if vocabulary <= most else f"the vocabulary ({vocabulary}) is above {most}, the kernel's limit here"


def example(device, dtype):
    """Rows for the kernel's self-check: several chunks, ties, masked tokens; no sum near the masses asked for."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 9001, generator=generator)
    logits[1] = (logits[1] * 4).round() / 4
    logits[2, ::3] = -torch.inf
    logits[3, 5] = torch.nan
    return logits.to(device, dtype)


def one_choice(device, dtype):
    """Rows of which one token alone is kept, and one row without a distribution."""
    logits = torch.zeros(4, 9001)
    logits[torch.arange(3), torch.tensor([5, 4500, 9000])] = 60.0
    logits[3] = -torch.inf
    return logits.to(device, dtype)
