"""The catalogue is read once; what stays of a block of items is one number, and the best blocks are scored again.

Scores are made comparable with ties resolved: the upper half of a key holds the score's bits, so that integers
compare as the scores do, the lower half the item's number, mixed by a multiplication that loses nothing. The k
largest keys of blocks hold the k largest keys of items.
"""

import triton
import triton.language as tl

from .common import product, rows_of, vector_of

BLOCK = tl.constexpr(64)  # items of a block: bits of a word
MIX, UNMIX = tl.constexpr(2654435761), tl.constexpr(244002641)  # their product is 1 mod 2^32
LOW = tl.constexpr(0xFFFFFFFF)
NOTHING = tl.constexpr(-2139095041)  # the upper half of -inf
NO_KEY = tl.constexpr(-0x7FFFFFFF00000000)
_SIZES = ["n_items", "n_users", "n_blocks", "n_marks", "n_keys", "n_parts", "stride_mark"]


@triton.jit(do_not_specialize=_SIZES)
def mark_seen(seen_ptr, words_ptr, n_items, n_users, n_marks, stride_user, stride_mark, WIDTH: tl.constexpr):
    """Sets a bit of words [blocks, users] for each item number in seen [users, marks]."""
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    user, mark = at // n_marks, at % n_marks
    here = user < n_users
    item = tl.load(seen_ptr + user * stride_user + mark * stride_mark, mask=here, other=-1)
    here = here & (item >= 0) & (item < n_items)
    item = tl.where(here, item, 0)
    bit = tl.full([WIDTH], 1, tl.int64) << (item % BLOCK)
    tl.atomic_or(words_ptr + item // BLOCK * n_users + user, bit, mask=here)


@triton.jit
def keys_of(
    e_ptr, bias_ptr, words_ptr, h, block, user, n_items, n_users, stride_n, stride_d, stride_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK, users] of a block's items; h [BLOCK_D, users]."""
    place = tl.arange(0, BLOCK)
    item = block * BLOCK + place
    scores = product(rows_of(e_ptr, item, n_items, stride_n, stride_d, D, BLOCK_D, WIDE), h)
    if BIAS:
        scores += vector_of(bias_ptr, item, n_items, stride_bias)[:, None]
    live = (item < n_items)[:, None]
    if SEEN:
        word = tl.load(words_ptr + block * n_users.to(tl.int64) + user, mask=user < n_users, other=0)
        live = live & (((word[None, :] >> place.to(tl.int64)[:, None]) & 1) == 0)
    scores = tl.where(live, scores, float("-inf"))
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0.0 equals 0.0
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # NaN shows
    mixed = (item.to(tl.int64) * MIX) & LOW
    return (bits.to(tl.int64) << 32) | mixed[:, None]


@triton.jit
def users_of(h_ptr, user, n_users, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    return tl.trans(rows_of(h_ptr, user, n_users, stride_n, stride_d, D, BLOCK_D, WIDE))


@triton.jit(do_not_specialize=_SIZES)
def scan_blocks(
    h_ptr, e_ptr, bias_ptr, words_ptr, best_ptr, n_items, n_users, n_blocks,
    stride_h_n, stride_h_d, stride_e_n, stride_e_d, stride_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
    USERS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """best [users, blocks]: the largest key of each block. Programs side by side read the same items."""
    user = tl.program_id(0) * USERS + tl.arange(0, USERS)
    h = users_of(h_ptr, user, n_users, stride_h_n, stride_h_d, D, BLOCK_D, WIDE)
    best_ptr += user.to(tl.int64) * n_blocks
    for block in tl.range(tl.program_id(1), n_blocks, tl.num_programs(1), num_stages=STAGES):
        keys = keys_of(
            e_ptr, bias_ptr, words_ptr, h, block, user, n_items, n_users, stride_e_n, stride_e_d, stride_bias,
            D, BLOCK_D, WIDE, BIAS, SEEN,
        )  # fmt: skip
        tl.store(best_ptr + block, tl.max(keys, 0), mask=user < n_users)


@triton.jit(do_not_specialize=_SIZES)
def score_blocks(
    h_ptr, e_ptr, bias_ptr, words_ptr, best_ptr, keys_ptr, n_items, n_users, n_blocks,
    stride_h_n, stride_h_d, stride_e_n, stride_e_d, stride_bias,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr, BIAS: tl.constexpr, SEEN: tl.constexpr,
    USERS: tl.constexpr,
):  # fmt: skip
    """keys [users, n_blocks, BLOCK] of the blocks that best [users, n_blocks] names, bit for bit those of the scan."""
    one = tl.program_id(0) // n_blocks
    user = one // USERS * USERS + tl.arange(0, USERS)
    at = tl.program_id(0).to(tl.int64)
    item = ((tl.load(best_ptr + at) & LOW) * UNMIX) & LOW
    block = (item // BLOCK).to(tl.int32)
    h = users_of(h_ptr, user, n_users, stride_h_n, stride_h_d, D, BLOCK_D, WIDE)
    keys = keys_of(
        e_ptr, bias_ptr, words_ptr, h, block, user, n_items, n_users, stride_e_n, stride_e_d, stride_bias,
        D, BLOCK_D, WIDE, BIAS, SEEN,
    )  # fmt: skip
    mine = tl.sum(tl.where((user == one)[None, :], keys, 0), 1)
    tl.store(keys_ptr + at * BLOCK + tl.arange(0, BLOCK), mine)


@triton.jit
def keys_at(keys_ptr, at, n_keys):
    """Keys, and behind the last one numbers that are smaller than any and all different."""
    return tl.load(keys_ptr + at, mask=at < n_keys, other=0) + tl.where(at < n_keys, 0, NO_KEY - at.to(tl.int64))


@triton.jit(do_not_specialize=_SIZES)
def select(
    keys_ptr, out_ptr, scores_ptr, n_keys, n_parts, K: tl.constexpr, LAST: tl.constexpr,
    WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The K largest of each part, WIDTH long, of keys [users, n_keys], sorted: keys, or in the end scores and items.

    No two keys are equal, so a key's place is the number of larger ones.
    """
    user, part = tl.program_id(0).to(tl.int64) // n_parts, tl.program_id(0) % n_parts
    keys_ptr += user * n_keys
    keys = keys_at(keys_ptr, part * WIDTH + tl.arange(0, WIDTH), n_keys)
    larger = tl.zeros([WIDTH, AT_ONCE], tl.int32)
    for begin in range(0, WIDTH, AT_ONCE):
        others = keys_at(keys_ptr, part * WIDTH + begin + tl.arange(0, AT_ONCE), n_keys)
        larger += (others[None, :] > keys[:, None]).to(tl.int32)
    place = tl.sum(larger, 1)
    to = tl.program_id(0).to(tl.int64) * K + place
    if LAST:
        bits = (keys >> 32).to(tl.int32)
        some = bits > NOTHING
        scores = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(scores_ptr + to, tl.where(some, scores, float("-inf")), mask=place < K)
        tl.store(out_ptr + to, tl.where(some, ((keys & LOW) * UNMIX) & LOW, -1), mask=place < K)
    else:
        tl.store(out_ptr + to, keys, mask=place < K)
