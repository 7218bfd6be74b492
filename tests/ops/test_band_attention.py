"""Band attention with one global token: the fast form is the dense masked softmax, and the errors say what to do."""

import pytest
import torch

from undersong.ops.band_attention import band_attention, reference

NAMES = ("q", "k", "v", "k_global", "v_global")


def inputs(batch, length, heads=2, dim=8, sequences=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, heads, dim)
    args = {name: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for name in NAMES}
    args["q_global"] = torch.randn((sequences or batch, heads, dim), generator=generator, dtype=dtype).requires_grad_()
    return args


def same(got, want, leaves, atol):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
    upstream = torch.linspace(-1, 1, want.numel(), dtype=want.dtype).view(want.shape)
    for a, b in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=("fp64", "fp32"))
@pytest.mark.parametrize(
    ("batch", "length", "window"), [(2, 150, 8), (3, 5, 64), (2, 64, 64), (1, 129, 64), (1, 1, 2)]
)
def test_padded_rows_equal_the_definition(dtype, atol, batch, length, window):
    args = inputs(batch, length, dtype=dtype)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, max(1, length // 2) :] = False
    if batch == 3:
        mask[1] = False
    for m in (None, mask):
        got, want = (band_attention(**args, window=window, mask=m, backend=b) for b in ("torch", "reference"))
        same(got, want, list(args.values()), atol)


def test_packed_sequences_equal_separate_ones():
    offsets = [0, 1, 1, 70, 200]
    args = inputs(1, 200, sequences=4, dtype=torch.float32)
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    got = band_attention(**args, window=16, cu_seqlens=cu_seqlens)
    parts = []
    for n, (begin, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if begin < end:
            own = {name: x[n : n + 1] if name == "q_global" else x[:, begin:end] for name, x in args.items()}
            parts.append(band_attention(**own, window=16, backend="reference"))
    same(got, torch.cat(parts, 1), list(args.values()), 1e-5)


def test_without_a_global_query_the_first_position_sees_its_band():
    args = inputs(1, 9, heads=1)
    q, k, v = args["q"], args["k"], args["v"]
    got = band_attention(q, k, v, window=4, scale=1.0)[0, :, 0]
    for i in range(9):
        seen = sorted({0, *range(max(0, i - 2), min(9, i + 3))})
        weights = (k[0, seen, 0] @ q[0, i, 0]).softmax(0)
        torch.testing.assert_close(got[i], weights @ v[0, seen, 0])


def test_the_global_token_has_projections_of_its_own():
    args = inputs(1, 40, heads=1)
    got = band_attention(**args, window=4, scale=1.0)[0, :, 0]
    weights = (args["k_global"][0, :, 0] @ args["q_global"][0, 0]).softmax(0)
    torch.testing.assert_close(got[0], weights @ args["v_global"][0, :, 0])
    band = band_attention(args["q"], args["k"], args["v"], window=4, scale=1.0)[0, :, 0]
    torch.testing.assert_close(got[1:], band[1:])  # and the others meet its local key and value


def test_masked_positions_may_hold_anything_finite_and_get_no_gradient():
    args = inputs(2, 12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 7:] = False
    output = band_attention(**args, window=4, mask=mask)
    gradients = torch.autograd.grad(output.sum(), [args[name] for name in NAMES])
    assert (output[0, 7:] == 0).all()
    for gradient in gradients:
        assert (gradient[0, 7:] == 0).all()
    loud = {name: x.detach().clone() for name, x in args.items()}
    for name in NAMES:
        loud[name][0, 7:] = 1e6
    torch.testing.assert_close(band_attention(**loud, window=4, mask=mask), output.detach())


def test_nothing_beyond_the_band_reaches_a_position():
    args = {name: x.detach() for name, x in inputs(1, 50).items()}
    before = band_attention(**args, window=6)
    args["k"][0, 30] += 1.0
    args["v"][0, 30] += 1.0
    moved = (band_attention(**args, window=6) - before).abs().amax((0, 2, 3)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(27, 34))


def test_gradcheck():
    args = inputs(1, 7, heads=1, dim=3)
    leaves = [args[name] for name in ("q", "k", "v", "q_global", "k_global", "v_global")]
    assert torch.autograd.gradcheck(lambda *x: reference(*x, window=2, scale=0.5), leaves)
    assert torch.autograd.gradcheck(lambda *x: band_attention(*x, window=2, scale=0.5, backend="torch"), leaves)


def test_two_runs_give_the_same_bits():
    def run():
        args = inputs(2, 100, dtype=torch.float32)
        output = band_attention(**args, window=16)
        return [output, *torch.autograd.grad(output.square().sum(), list(args.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_keeps_the_mean(backend):
    torch.manual_seed(0)
    q = k = torch.zeros(1, 2000, 1, 1)
    v = torch.ones(1, 2000, 1, 1)
    output = band_attention(q, k, v, window=8, dropout_p=0.5, backend=backend)
    assert output.std() > 0.1
    assert abs(output.mean() - 1.0) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 7}, r"window \(7\) must be an even number of at least 2"),
        ({"window": 0}, r"window \(0\) must be an even number"),
        ({"dropout_p": 1.0}, r"dropout_p \(1.0\) must lie in \[0, 1\)"),
        ({"k": torch.zeros(2, 5, 2, 4)}, r"k \(float32 \[2, 5, 2, 4\]\) must be .* = \[2, 5, 2, 8\]"),
        ({"q_global": None}, r"q_global \(None\) must be given with k_global, v_global"),
        ({"q_global": torch.zeros(3, 2, 8)}, r"q_global .* \[batch, heads, dim\] = \[2, 2, 8\]"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask .* \[2, 5\]"),
        ({"v": torch.zeros(2, 5, 2, 8, dtype=torch.long)}, r"v \(int64 \[2, 5, 2, 8\]\) must be a float"),
        ({"backend": "cuda"}, r"backend \('cuda'\) must be one of"),
    ],
)
def test_errors_name_argument_value_and_fix(change, message):
    args = inputs(2, 5, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        band_attention(**{**args, "window": 4, **change})
