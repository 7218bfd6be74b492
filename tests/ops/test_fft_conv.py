"""The FFT against the sum it computes, in float64; padding and packing against sequences alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import fft_conv
from undersong.ops.fft_conv import fast_size

pytestmark = pytest.mark.usefixtures("one_thread")


def make_case(case, length, taps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    batch, options = 1 if case == "packed" else 2, {}
    u = torch.randn(batch, length, 3, generator=generator).to(dtype)
    k = torch.randn(3, taps, generator=generator)
    if case == "packed":  # an empty sequence in the middle
        options["cu_seqlens"] = torch.tensor([0, length // 3, length // 3, length - length // 4, length]).int()
    elif case != "plain":
        mask = torch.ones(2, length, dtype=torch.bool)
        spans = {"left": slice(0, length // 2), "right": slice(length // 2, None), "all masked": slice(None)}
        mask[0, spans.get(case, slice(length // 3, 2 * length // 3 + 1))] = False
        options["mask"], u = mask, u.masked_fill(~mask[..., None], torch.nan)
    return u, k, options


def evaluate(case, backend, double=False):
    u, k, options = case
    leaves = [x.detach().to(torch.float64 if double else x.dtype, copy=True).requires_grad_() for x in (u, k)]
    y = fft_conv(*leaves, **options, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.parametrize("case", ["plain", "left", "right", "middle", "all masked", "packed"])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 5), (2, 2), (31, 31), (33, 7), (33, 100), (64, 64), (97, 1)])
def test_matches_reference(length, taps, case):
    case = make_case(case, length, taps)
    results = evaluate(case, "torch"), evaluate(case, "reference", double=True)
    for name, got, want in zip(("y", "du", "dk"), *results, strict=True):
        assert got.isfinite().all(), name
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5 * max(1.0, want.abs().max().item()), msg=name)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 30, 31, 32])
def test_is_exact_in_float64_and_equals_a_convolution_layer(length):
    u, k, _ = make_case("plain", length, length)
    u, k = u.double(), k.double()
    want = torch.nn.functional.conv1d(
        torch.nn.functional.pad(u.transpose(1, 2), (length - 1, 0)), k.flip(1)[:, None], groups=3
    ).transpose(1, 2)
    torch.testing.assert_close(fft_conv(u, k), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(fft_conv(u, k, backend="reference"), want, rtol=0, atol=1e-12)


def test_gradcheck():
    u, k, options = make_case("middle", 7, 7)
    leaves = u.nan_to_num().double().requires_grad_(), k.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda u, k: fft_conv(u, k, **options), leaves)


def test_no_output_sees_the_future():
    u, k, _ = make_case("plain", 100, 100)
    changed = u.clone()
    changed[:, 60:] += 100
    got = (fft_conv(changed, k) - fft_conv(u, k))[:, :60].abs().max()
    assert got < 1e-3, "beyond what float32 rounds off of inputs of size 100"
    assert (fft_conv(changed.double(), k) - fft_conv(u.double(), k))[:, :60].abs().max() < 1e-11


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any))
def test_packed_equals_separate(lengths):
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    u, k, _ = make_case("plain", sum(lengths), 40)
    u = u[:1].double()
    y = fft_conv(u, k, cu_seqlens=offsets)
    for part, want in zip(y.split(lengths, 1), u.split(lengths, 1), strict=True):
        if part.numel():
            torch.testing.assert_close(part, fft_conv(want, k), rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=2, max_size=24))
def test_padding_anywhere_equals_the_compacted_row(bits):
    mask = torch.tensor([bits])
    u, k, _ = make_case("plain", len(bits), 30)
    u = u[:1].double()
    y = fft_conv(u, k, mask=mask)
    assert y[~mask].eq(0).all()
    if mask.any():
        torch.testing.assert_close(y[mask], fft_conv(u[mask][None], k)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_in_half_out_computed_in_float32(dtype):
    u, k, _ = make_case("plain", 65, 65, dtype)
    y = fft_conv(u, k)
    assert y.dtype == dtype
    torch.testing.assert_close(y, fft_conv(u.float(), k).to(dtype), rtol=0, atol=0)


@given(st.integers(1, 10**6))
def test_transform_sizes_are_long_enough_even_and_at_most_a_quarter_longer(least):
    size = fast_size(least)
    assert size >= least
    assert size % 2 == 0
    assert size <= max(1.25 * least, least + 2)


U, K = torch.zeros(2, 6, 3), torch.zeros(3, 4)
WRONG = {
    "u is flat": ((U[0], K), {}, r"u \(float32 \[6, 3\]\) must be a float \[batch, length, channels\]"),
    "k has other channels": ((U, K[:2]), {}, r"k \(float32 \[2, 4\]\) .* = \[3, at least 1\] because u is float32"),
    "k has no taps": ((U, K[:, :0]), {}, r"k \(float32 \[3, 0\]\) must be a float \[channels, taps\]"),
    "k is complex": ((U, K.cfloat()), {}, r"k \(complex64 \[3, 4\]\) must be a float \[channels, taps\]"),
    "no steps": ((U[:, :0], K), {}, r"length is 0 in u"),
    "mask": ((U, K), {"mask": U[..., 0]}, r"mask \(float32 \[2, 6\]\) must be a bool .* = \[2, 6\]"),
    "offsets": ((U, K), {"cu_seqlens": torch.tensor([0, 6]).int()}, r"\(2 offsets\) must come with batch 1"),
    "device": ((U, K.to("meta")), {}, r"k \(meta\) must be on the device of u \(cpu\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument_the_value_and_the_fix(name):
    inputs, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        fft_conv(*inputs, **options)
