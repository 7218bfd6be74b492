"""plstm1d against the sum over all pairs of tokens that its recurrence stands for, in every lowering."""

import itertools
import math
import re

import pytest
import torch

from undersong.ops.plstm1d import plstm1d

NUMBERS = {"JT": 1, "JK": 1, "JV": 1, "JO": 1, "JQ": 1}
SMALL = {"JT": 3, "JK": 1, "JV": 2, "JO": 3, "JQ": 1}
ALL = {"JT": 2, "JK": 3, "JV": 2, "JO": 1, "JQ": 2}
every_size = pytest.mark.parametrize("sizes", [NUMBERS, SMALL, ALL], ids=["numbers", "small", "all"])
LOWERINGS = ("recurrent", "parallel", "chunk")


def make(sizes, batch=2, length=21, heads=2, dtype=torch.float64, seed=0):
    """Q, K, V, S, T, M, D with transitions of norm 1 or, where they are numbers, of both signs and in part zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn((batch, length, heads, *shape), generator=generator, dtype=torch.float64)

    JT, JK, JV, JO, JQ = sizes.values()
    Q, K, V, S, M, D = (normal(*shape) for shape in (
        (5, JQ), (5, JK), (3, JV), (JT, JK, JV), (JO, JQ, JT), (JO, JQ, JK, JV)
    ))  # fmt: skip
    T = normal(JT, JT)
    T = T / torch.linalg.matrix_norm(T, 2)[..., None, None] if JT > 1 else torch.tanh(T)
    T[:, 2] = 0.0
    return [x.to(dtype) for x in (Q, K, V, S, T, M, D)]


def pairs(Q, K, V, S, T, M, D, initial_state=None):
    """Y_t = scale sum_s Q_t G_ts K_s V_s with G_ts = M_t T_{t-1} ... T_{s+1} S_s written out, and the final state."""
    batch, length, heads, DK = Q.shape[:4]
    eye = torch.eye(T.shape[-1], dtype=T.dtype).expand(batch, heads, -1, -1)

    def carried(first, last):  # T_{last-1} ... T_first
        product = eye
        for r in range(first, last):
            product = T[:, r] @ product
        return product

    outputs = []
    for t in range(length + 1):
        state = torch.zeros(batch, heads, DK, V.shape[3], T.shape[-1], dtype=T.dtype)
        if initial_state is not None:
            state = state + torch.einsum("bhin,bhdvn->bhdvi", carried(0, t), initial_state)
        for s in range(t):
            write = torch.einsum("bhin,bhnkl->bhikl", carried(s + 1, t), S[:, s])
            state = state + torch.einsum("bhikl,bhdk,bhvl->bhdvi", write, K[:, s], V[:, s])
        if t == length:
            return torch.stack(outputs, 1) / math.sqrt(DK), state
        y = torch.einsum("bhdj,bhoji,bhdvi->bhvo", Q[:, t], M[:, t], state)
        y = y + torch.einsum("bhojkl,bhdj,bhdk,bhvl->bhvo", D[:, t], Q[:, t], K[:, t], V[:, t])
        outputs.append(y)


def close(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def start(sizes, rows=2, dtype=torch.float64):
    return torch.randn(rows, 2, 5, 3, sizes["JT"], generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(
        dtype
    )


@every_size
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
def test_every_lowering_is_the_sum_over_pairs(sizes, lowering, given):
    x, state = make(sizes), start(sizes) if given else None
    want = pairs(*x, initial_state=state)
    for chunk_size in (1, 3, 8, 32, 64) if lowering == "chunk" else (64,):
        options = {"lowering": lowering, "chunk_size": chunk_size, "initial_state": state}
        close(plstm1d(*x, **options, return_final_state=True), want)


@every_size
def test_the_reference_is_the_sum_over_pairs(sizes):
    x, state = make(sizes), start(sizes)
    got = plstm1d(*x, initial_state=state, return_final_state=True, backend="reference")
    close(got, pairs(*x, initial_state=state))


@every_size
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_float32_is_within_1e_5(sizes, lowering):
    x = make(sizes)
    got = plstm1d(*(t.float() for t in x), lowering=lowering, chunk_size=8, return_final_state=True)
    assert {t.dtype for t in got} == {torch.float32}
    close([t.double() for t in got], pairs(*x), tolerance=1e-5)


def test_half_precision_comes_back_in_its_dtype_and_the_state_in_float32():
    x = make(SMALL, dtype=torch.bfloat16)
    y, state = plstm1d(*x, return_final_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    want, _ = pairs(*(t.double() for t in x))
    assert (y - want).abs().max() <= 2**-8 * want.abs().max()  # the last rounding


@every_size
@pytest.mark.parametrize("lowering", ["parallel", "chunk"])
def test_gradients_across_chunks_and_through_the_final_state(sizes, lowering):
    """Gradients of everything, the zero transition included, against the definition's."""
    generator = torch.Generator().manual_seed(5)
    results = []
    for options in ({"backend": "reference"}, {"lowering": lowering, "chunk_size": 8}):
        x = [t.requires_grad_() for t in (*make(sizes), start(sizes))]
        y, state = plstm1d(*x[:-1], initial_state=x[-1], return_final_state=True, **options)
        if not results:
            upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, state)]
        results.append(torch.autograd.grad([y, state], x, upstream))
    close(*results)


@pytest.mark.parametrize("sizes", [NUMBERS, SMALL], ids=["numbers", "small"])
def test_gradcheck_over_three_chunks(sizes):
    x = [t.requires_grad_() for t in (*make(sizes, batch=1, length=5, heads=1), start(sizes, 1)[:, :1])]

    def op(*x):
        return plstm1d(*x[:-1], initial_state=x[-1], return_final_state=True, lowering="chunk", chunk_size=6)

    assert torch.autograd.gradcheck(op, x, fast_mode=True)


@every_size
def test_any_split_equals_one_pass(sizes):
    x = make(sizes)
    want = plstm1d(*x, return_final_state=True)
    state, outputs = None, []
    for begin, end in itertools.pairwise((0, 1, 2, 9, 21)):
        part = (t[:, begin:end] for t in x)
        y, state = plstm1d(*part, initial_state=state, return_final_state=True, chunk_size=8)
        outputs.append(y)
    close((torch.cat(outputs, 1), state), want)


@every_size
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_masked_tokens_are_as_if_left_out_whatever_they_hold(sizes, lowering):
    x = make(sizes)
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.6
    state = start(sizes)
    hidden = [t.masked_fill(~mask.view(2, 21, *(1,) * (t.dim() - 2)), torch.nan).requires_grad_() for t in x]
    options = {"lowering": lowering, "chunk_size": 8, "return_final_state": True}
    y, last = plstm1d(*hidden, mask=mask, initial_state=state, **options)
    for row in range(2):
        kept = mask[row]
        want = plstm1d(*(t[row : row + 1, kept] for t in x), initial_state=state[row : row + 1], **options)
        close((y[row : row + 1, kept], last[row : row + 1]), want)
        assert not y[row, ~kept].any()
    for gradient in torch.autograd.grad(y.sum() + last.sum(), hidden):
        assert not gradient[~mask].any()
        assert gradient.isfinite().all()


@every_size
@pytest.mark.parametrize("lowering", ["auto", *LOWERINGS])
def test_packed_sequences_are_as_if_apart(sizes, lowering):
    """Of several lengths, two of them empty, each from a state of its own."""
    offsets = [0, 4, 4, 5, 13, 21, 21]
    x, state = make(sizes, batch=1), start(sizes, 6)
    options = {"lowering": lowering, "chunk_size": 8, "return_final_state": True}
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    y, last = plstm1d(*x, cu_seqlens=cu_seqlens, initial_state=state, **options)
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        if begin == end:
            assert torch.equal(last[n], state[n])
            continue
        part = (t[:, begin:end] for t in x)
        want = plstm1d(*part, initial_state=state[n : n + 1], **options)
        close((y[:, begin:end], last[n : n + 1]), want)
    from_zero = plstm1d(*x, cu_seqlens=cu_seqlens, **options)
    close(from_zero, plstm1d(*x, cu_seqlens=cu_seqlens, initial_state=torch.zeros_like(state), **options))


def test_numbers_are_gated_linear_attention_of_shifted_inputs():
    """h_t = g_t h_{t-1} + k_t v_t with k, v and g one token later reads, at t, what pLSTM writes up to t - 1."""
    Q, K, V, S, T, M, D = make(NUMBERS)
    T = T.abs()
    shifted = [torch.cat([torch.zeros_like(t[:, :1]), t[:, :-1]], 1) for t in (K * S[..., 0], V, T)]
    h, outputs = torch.zeros(2, 2, 5, 3, dtype=T.dtype), []
    for q, m, k, v, g in zip(*(t.unbind(1) for t in (Q, M, *shifted)), strict=True):
        h = g * h + k * v.mT
        outputs.append((m[..., 0] * q).mT @ h / math.sqrt(5))
    close([plstm1d(Q, K, V, S, T, M, torch.zeros_like(D))], [torch.stack(outputs, 1).mT])


def test_a_state_under_orthogonal_transitions_keeps_its_norm():
    x = make(SMALL, length=200)
    x[4] = torch.linalg.qr(make(SMALL, length=200)[4] + torch.eye(3))[0]
    x[3] = torch.zeros_like(x[3])
    state = start(SMALL)
    _, last = plstm1d(*x, initial_state=state, return_final_state=True)
    torch.testing.assert_close(last.norm(dim=-1), state.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lowering": "scan"}, "lowering ('scan') must be one of 'auto', 'recurrent', 'parallel', 'chunk'; use"),
        ({"lowering": "chunk", "backend": "reference"}, "lowering ('chunk') is a choice of the torch backend, but"),
        ({"chunk_size": 0}, "chunk_size (0) must be an integer of at least 1; use 64."),
        ({"Q": torch.zeros(2, 4, 2)}, "Q (float32 [2, 4, 2]) must be a float [batch, length, heads, DK, JQ]; reshape"),
        ({"K": torch.zeros(2, 4, 2, 6, 1)}, "K (float32 [2, 4, 2, 6, 1]) must be a float [batch, length, heads, DK, "
         "JK] = [2, 4, 2, 5, 1] because Q is float32 [2, 4, 2, 5, 1] and DK=5, JQ=1"),
        ({"T": torch.zeros(2, 4, 2, 2, 2)}, "T (float32 [2, 4, 2, 2, 2]) must be a float [batch, length, heads, JT, "
         "JT] = [2, 4, 2, 3, 3]"),
        ({"M": torch.zeros(2, 4, 1, 3, 1, 3)}, "[batch, length, heads, JO, JQ, JT] = [2, 4, 2, 3, 1, 3]"),
        ({"initial_state": torch.zeros(2, 2, 5, 3)}, "initial_state (float32 [2, 2, 5, 3]) must be a float "
         "[batch, heads, DK, DV, JT] = [2, 2, 5, 3, 3]"),
        ({"mask": torch.ones(2, 4)}, "mask (float32 [2, 4]) must be a bool [batch, length] = [2, 4]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens (int64 [2]) must be a 1-D int32 tensor"),
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_the_fix(change, message):
    arguments = dict(zip("QKVSTMD", make(SMALL, length=4, dtype=torch.float32), strict=True))
    with pytest.raises(ValueError, match=re.escape(message)):
        plstm1d(**(arguments | change))
