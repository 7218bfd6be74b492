"""Kernels of the causal depthwise convolution: forward, backward, and one step.

A token's rank is its place among the valid tokens of its sequence; ranks -1, -2, ... are the entries of the initial
window, newest first. A program walks a run of ranks for one block of channels, the last rows in its registers,

    pre_r = bias + sum_j weight_{width-1-j} x_{r-j},  y_r = act(pre_r),  g_r = dy_r act'(pre_r),
    dx_r = sum_j weight_{width-1-j} g_{r+j},  dweight_{width-1-j} = sum_r g_r x_{r-j},  dbias = sum_r g_r

so that every row is read once, and dx of a negative rank is the initial window's gradient. Padding and packing only
change where the row of a rank lies. `UNIT` (16 or 1) is what strides that grow with the length are counted in: wide
loads stay possible without a specialisation on such a stride.
"""

import triton
import triton.language as tl


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    s = tl.sigmoid(x)
    return s * (1 + x * (1 - s))


@triton.jit
def locate(part, sequence_ptr, run_ptr, first_ptr, count_ptr, length, n_runs, n_sequences, SPAN: tl.constexpr,
           MASKED: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """Of the part-th run: its sequence, first rank, how many valid tokens and how many positions the sequence has, the
    position of rank 0, and the batch row."""
    if PACKED:
        sequence = tl.load(sequence_ptr + part)
        exists = sequence < n_sequences
        sequence = tl.minimum(sequence, n_sequences - 1)
        count = tl.where(exists, tl.load(count_ptr + sequence), 0)
        # a run that does not exist begins behind everything
        start = tl.where(exists, tl.load(run_ptr + part) * SPAN, length)
        places = sequence, start, count, count, tl.load(first_ptr + sequence), 0
    else:
        sequence = part // n_runs
        count = length
        if MASKED:
            count = tl.load(count_ptr + sequence)
        places = sequence, (part % n_runs) * SPAN, count, length, 0, sequence
    return places


@triton.jit
def position(place_ptr, batch, first, rank, total, length, MASKED: tl.constexpr):
    """Where the row of a rank lies; -1 if nowhere, whatever the offsets say."""
    at = first + rank
    if MASKED:  # behind the valid tokens, the padding has its ranks
        inside = (rank >= 0) & (rank < total)
        at = tl.load(place_ptr + tl.cast(batch, tl.int64) * length + rank, mask=inside, other=-1)
    return tl.where((rank >= 0) & (rank < total) & (at >= 0) & (at < length), at, -1)


@triton.jit
def read(base, at, good, stride_t, channels, c, n_channels):
    return tl.load(
        base + tl.cast(at, tl.int64) * stride_t + channels,
        mask=c < tl.where(good & (at >= 0), n_channels, 0),
        other=0.0,
    )


@triton.jit
def window_at(sequence, entry, c, n_channels, WIDTH: tl.constexpr):
    return (tl.cast(sequence, tl.int64) * n_channels + c) * WIDTH + entry


@triton.jit
def read_before(
    base, state_ptr, place_ptr, batch, sequence, first, start, count, total, length, stride_t, channels, c, n_channels,
    WIDTH: tl.constexpr, HAS_STATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The width - 1 rows in front of rank `start`, in float32; those of negative ranks out of the initial window."""
    before = ()
    for k in tl.static_range(WIDTH - 1):
        rank = start - (WIDTH - 1) + k
        at = position(place_ptr, batch, first, rank, total, length, MASKED)
        row = read(base, at, rank < count, stride_t, channels, c, n_channels).to(tl.float32)
        if HAS_STATE:
            entry = window_at(sequence, WIDTH + rank, c, n_channels, WIDTH)
            row += tl.load(state_ptr + entry, mask=c < tl.where(rank < 0, n_channels, 0), other=0.0).to(tl.float32)
        before = before + (row,)
    return before


@triton.jit
def read_taps(weight_ptr, stride_c, stride_k, c, n_channels, WIDTH: tl.constexpr):
    """The weights, that of the newest input first."""
    taps = ()
    for j in tl.static_range(WIDTH):
        tap = tl.load(weight_ptr + c * stride_c + (WIDTH - 1 - j) * stride_k, mask=c < n_channels, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit(do_not_specialize=["length", "n_runs", "n_sequences", "stride_x_b", "stride_x_c"])
def forward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, place_ptr, sequence_ptr, run_ptr, first_ptr, count_ptr, y_ptr, window_ptr,
    length, n_runs, n_sequences, n_channels, stride_x_b, stride_x_t, stride_x_c, stride_w_c, stride_w_k,
    X_UNIT: tl.constexpr, X_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence, start, count, total, first, batch = locate(
        part, sequence_ptr, run_ptr, first_ptr, count_ptr, length, n_runs, n_sequences, ROWS, MASKED, PACKED
    )
    base = x_ptr + tl.cast(batch, tl.int64) * stride_x_b * X_UNIT
    y_base = y_ptr + tl.cast(batch, tl.int64) * length * n_channels + c
    channels = c if X_ROWS else c.to(tl.int64) * stride_x_c

    rows = read_before(base, state_ptr, place_ptr, batch, sequence, first, start, count, total, length, stride_x_t,
                       channels, c, n_channels, WIDTH, HAS_STATE, MASKED)  # fmt: skip
    places = ()
    for i in tl.static_range(ROWS):
        at = position(place_ptr, batch, first, start + i, total, length, MASKED)
        rows = rows + (read(base, at, start + i < count, stride_x_t, channels, c, n_channels),)
        places = places + (at,)
    taps = read_taps(weight_ptr, stride_w_c, stride_w_k, c, n_channels, WIDTH)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < n_channels, other=0.0).to(tl.float32)
    for i in tl.static_range(ROWS):
        y = bias
        for j in tl.static_range(WIDTH):
            y += taps[j] * rows[WIDTH - 1 + i - j].to(tl.float32)
        if SILU:
            y = silu(y)
        y = tl.where(start + i < count, y, 0.0)
        tl.store(y_base + tl.cast(places[i], tl.int64) * n_channels, y.to(y_ptr.dtype.element_ty),
                 mask=c < tl.where(places[i] >= 0, n_channels, 0))  # fmt: skip

    # The last ranks are the final window; negative ones, where a sequence is short, belong to its first run.
    if (start + ROWS > count - WIDTH) & (start <= total):
        for i in tl.static_range(ROWS + WIDTH - 1):
            rank = start + i - (WIDTH - 1)
            entry = WIDTH - count + rank
            mine = (entry >= 0) & (rank < count) & ((i >= WIDTH - 1) | (start == 0))
            tl.store(window_ptr + window_at(sequence, entry, c, n_channels, WIDTH), rows[i].to(tl.float32),
                     mask=c < tl.where(mine, n_channels, 0))  # fmt: skip
        if (count == 0) & (start == 0):  # nothing came in, so the oldest entry stays too
            oldest = tl.zeros([BLOCK_C], tl.float32)
            if HAS_STATE:
                oldest = tl.load(state_ptr + window_at(sequence, 0, c, n_channels, WIDTH), mask=c < n_channels).to(
                    tl.float32
                )
            tl.store(window_ptr + window_at(sequence, 0, c, n_channels, WIDTH), oldest, mask=c < n_channels)


@triton.jit(
    do_not_specialize=["length", "n_runs", "n_sequences", "stride_x_b", "stride_x_c", "stride_g_b", "stride_g_c"]
)
def backward(
    x_ptr, weight_ptr, bias_ptr, state_ptr, place_ptr, sequence_ptr, run_ptr, first_ptr, count_ptr,
    dy_ptr, dwindow_ptr, dx_ptr, dstate_ptr, sums_ptr,
    length, n_runs, n_sequences, n_channels, stride_x_b, stride_x_t, stride_x_c, stride_w_c, stride_w_k,
    stride_g_b, stride_g_t, stride_g_c,
    X_UNIT: tl.constexpr, X_ROWS: tl.constexpr, G_UNIT: tl.constexpr, G_ROWS: tl.constexpr,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, SILU: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # dx needs the width - 1 next rows of g, so a run of ROWS * TILES rows yields that many fewer
    SPAN: tl.constexpr = ROWS * TILES - WIDTH + 1
    blocks = tl.cdiv(n_channels, BLOCK_C)
    part = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence, start, count, total, first, batch = locate(
        part, sequence_ptr, run_ptr, first_ptr, count_ptr, length, n_runs, n_sequences, SPAN, MASKED, PACKED
    )
    base = x_ptr + tl.cast(batch, tl.int64) * stride_x_b * X_UNIT
    g_base = dy_ptr + tl.cast(batch, tl.int64) * stride_g_b * G_UNIT
    dx_base = dx_ptr + tl.cast(batch, tl.int64) * length * n_channels + c
    channels = c if X_ROWS else c.to(tl.int64) * stride_x_c
    g_channels = c if G_ROWS else c.to(tl.int64) * stride_g_c
    end = tl.minimum(total, start + SPAN)

    taps = read_taps(weight_ptr, stride_w_c, stride_w_k, c, n_channels, WIDTH)
    bias = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < n_channels, other=0.0).to(tl.float32)
    old_x = read_before(base, state_ptr, place_ptr, batch, sequence, first, start, count, total, length, stride_x_t,
                        channels, c, n_channels, WIDTH, HAS_STATE, MASKED)  # fmt: skip
    old_g = ()
    sums = ()  # of g times each tap, and of g: the run's share of the weight's and the bias's gradient
    for _ in tl.static_range(WIDTH - 1):
        old_g = old_g + (tl.zeros([BLOCK_C], tl.float32),)
    for _ in tl.static_range(WIDTH + 1):
        sums = sums + (tl.zeros([BLOCK_C], tl.float32),)

    # a sequence without any token has an initial window all the same
    for tile in range(tl.cdiv(tl.maximum(end - start, 0) + WIDTH - 1, ROWS)):
        near = start + tile * ROWS
        xs = ()
        dys = ()
        for i in tl.static_range(ROWS):
            at = position(place_ptr, batch, first, near + i, total, length, MASKED)
            xs = xs + (read(base, at, near + i < count, stride_x_t, channels, c, n_channels),)
            dys = dys + (read(g_base, at, near + i < count, stride_g_t, g_channels, c, n_channels),)
        for i in tl.static_range(ROWS):
            rank = near + i
            x = old_x + (xs[i].to(tl.float32),)
            g = dys[i].to(tl.float32)
            if SILU:
                pre = bias
                for j in tl.static_range(WIDTH):
                    pre += taps[j] * x[WIDTH - 1 - j]
                g = g * silu_slope(pre)
            own = tl.where(rank < end, g, 0.0)
            new_sums = ()
            for j in tl.static_range(WIDTH):
                new_sums = new_sums + (sums[j] + own * x[WIDTH - 1 - j],)
            sums = new_sums + (sums[WIDTH] + own,)

            gs = old_g + (g,)
            done = rank - WIDTH + 1
            dx = taps[0] * gs[0]
            for j in tl.static_range(1, WIDTH):
                dx += taps[j] * gs[j]
            if HAS_WINDOW:
                entry = WIDTH - count + done
                passed = (entry >= 0) & (done < count)
                dx += tl.load(dwindow_ptr + window_at(sequence, entry, c, n_channels, WIDTH),
                              mask=c < tl.where(passed, n_channels, 0), other=0.0)  # fmt: skip
            at = position(place_ptr, batch, first, done, total, length, MASKED)
            tl.store(dx_base + tl.cast(at, tl.int64) * n_channels, dx.to(dx_ptr.dtype.element_ty),
                     mask=c < tl.where((at >= 0) & (done >= start) & (done < end), n_channels, 0))  # fmt: skip
            if HAS_STATE:
                tl.store(dstate_ptr + window_at(sequence, WIDTH + done, c, n_channels, WIDTH), dx,
                         mask=c < tl.where((start == 0) & (done < 0), n_channels, 0))  # fmt: skip
            old_x = x[1:]
            old_g = gs[1:]

    if HAS_STATE:
        oldest = tl.zeros([BLOCK_C], tl.float32)
        if HAS_WINDOW:  # it passed through where nothing came in
            oldest = tl.load(dwindow_ptr + window_at(sequence, 0, c, n_channels, WIDTH),
                             mask=c < tl.where(count == 0, n_channels, 0), other=0.0)  # fmt: skip
        tl.store(dstate_ptr + window_at(sequence, 0, c, n_channels, WIDTH), oldest,
                 mask=c < tl.where(start == 0, n_channels, 0))  # fmt: skip
    out = sums_ptr + tl.cast(part, tl.int64) * (WIDTH + 1) * n_channels + c
    for j in tl.static_range(WIDTH):
        tl.store(out + (WIDTH - 1 - j) * n_channels, sums[j], mask=c < n_channels)
    tl.store(out + WIDTH * n_channels, sums[WIDTH], mask=c < n_channels)


@triton.jit(do_not_specialize=["batch"])
def step(
    x_ptr, state_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, new_ptr,
    batch, n_channels, stride_x_b, stride_x_c, stride_s_b, stride_s_c, stride_s_k, stride_n_b, stride_n_c, stride_n_k,
    stride_w_c, stride_w_k, stride_m_b,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, MASKED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    in_dim = c < n_channels
    live = in_dim
    if MASKED:
        live = in_dim & (tl.load(mask_ptr + row * stride_m_b + 0 * c) != 0)
    old_base = state_ptr + row * stride_s_b + c * stride_s_c
    new_base = new_ptr + row * stride_n_b + c * stride_n_c
    x = tl.load(x_ptr + row * stride_x_b + c * stride_x_c, mask=live, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + c, mask=in_dim, other=0.0).to(tl.float32)
    entries = ()
    for k in tl.static_range(WIDTH):
        entry = x
        if k < WIDTH - 1:
            entry = tl.load(old_base + (k + 1) * stride_s_k, mask=in_dim, other=0.0).to(tl.float32)
        entries = entries + (entry,)
        weight = tl.load(weight_ptr + c * stride_w_c + k * stride_w_k, mask=in_dim, other=0.0)
        total += weight.to(tl.float32) * entry
    if MASKED:  # the window stays as it is
        kept = ()
        for k in tl.static_range(WIDTH):
            old = tl.load(old_base + k * stride_s_k, mask=in_dim, other=0.0).to(tl.float32)
            kept = kept + (tl.where(live, entries[k], old),)
        entries = kept
    if SILU:
        total = silu(total)
    tl.debug_barrier()  # new may be the old window's memory, which other threads have to have read
    for k in tl.static_range(WIDTH):
        tl.store(new_base + k * stride_n_k, entries[k].to(new_ptr.dtype.element_ty), mask=in_dim)
    tl.store(y_ptr + row * n_channels + c, tl.where(live, total, 0.0).to(y_ptr.dtype.element_ty), mask=in_dim)
