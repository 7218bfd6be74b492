"""The kernels on a real GPU: exact at real sizes, no recompilation for lengths, visible to torch.compile."""

import random

import pytest
import torch

from undersong.ops import (
    cumulative_softmax_average,
    explain,
    fused_typical_sample,
    top_p_mask,
    typical_mask,
)

from .filter_oracle import INF, chi2_p_value, definition, make_logits
from .test_cumulative_softmax_average import CASES, make_case

pytestmark = pytest.mark.gpu
NAME = "cumulative_softmax_average"


def to_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(to_gpu(item) for item in value)
    return {key: to_gpu(item) for key, item in value.items()} if isinstance(value, dict) else value


def outputs_and_gradients(s, v, options, backend, double):
    def leaf(x):
        return (x.detach().double() if double else x.detach().clone()).requires_grad_()

    s, v, options = leaf(s), leaf(v), dict(options)
    leaves = [s, v]
    if "initial_state" in options:
        m, u, w = options["initial_state"]
        u, w = leaf(u), leaf(w)
        leaves += [u, w]
        options["initial_state"] = m.double() if double else m, u, w
    o, (m, u, w) = cumulative_softmax_average(s, v, **options, return_final_state=True, backend=backend)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, u, w)]
    return [o, m, u, w, *torch.autograd.grad([o, u, w], leaves, upstream)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 65, 2300])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_kernel_equals_the_float64_reference(case, length, dtype, tolerance):
    """Relative to each tensor's scale; float32 gradients carry the rounding of z near 80 (float32: 80 * 2^-24)."""
    s, v, options = to_gpu(make_case(case, length, dim=64, dtype=dtype))
    got = outputs_and_gradients(s, v, options, "triton", double=False)
    want = outputs_and_gradients(s, v, options, "reference", double=True)
    for name, x, y in zip(("o", "m", "u", "w", "ds", "dv", "du0", "dw0"), got, want, strict=False):
        x, y = x.detach().double(), y.detach()
        error = torch.where(x == y, 0.0, (x - y).abs()).max()
        scale = y[y.isfinite()].abs().max() if y.isfinite().any() else 1.0
        assert error <= tolerance * max(float(scale), 1e-30), f"{name} differs by {error:.3g} (scale {scale:.3g})"


def test_auto_takes_the_kernel_and_runs_are_bit_identical():
    s, v, _ = to_gpu(make_case("plain", 3000, dim=64, dtype=torch.bfloat16))
    first = cumulative_softmax_average(s, v)
    assert explain()[NAME].backend == "triton"
    for _ in range(20):
        assert torch.equal(cumulative_softmax_average(s, v), first)


def test_a_hundred_lengths_compile_nothing():
    from undersong.ops import _dispatch

    def run(length):
        s = torch.randn(2, length, 3, device="cuda", requires_grad=True)
        v = torch.randn(2, length, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        cumulative_softmax_average(s, v).sum().backward()

    run(100)
    import sys

    package = _dispatch._KERNELS[NAME].__name__
    kernels = [getattr(sys.modules[f"{package}.{name}"], name) for name in ("forward", "backward")]

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    before = compiled()
    for length in random.Random(0).sample(range(1, 5000), 100):
        run(length)
    assert compiled() == before


def test_torch_compile_sees_one_operator():
    torch._dynamo.reset()
    s, v, _ = to_gpu(make_case("plain", 300, dim=64, dtype=torch.bfloat16))
    s, v = s.requires_grad_(), v.requires_grad_()

    def double(s, v):
        return cumulative_softmax_average(s, v) * 2

    got = torch.compile(double, fullgraph=True, backend="aot_eager")(s, v)
    assert torch.equal(got, double(s, v))
    for x, y in zip(
        torch.autograd.grad(got.sum(), (s, v)), torch.autograd.grad(double(s, v).sum(), (s, v)), strict=True
    ):
        assert torch.equal(x, y)


class TestVocabularyMask:
    """The filters' kernel: several programs a row, which the interpreter cannot run."""

    @pytest.mark.parametrize("name", ["typical", "top_p"])
    @pytest.mark.parametrize("case", ["plain", "ties", "masked"])
    @pytest.mark.parametrize("vocab", [1003, 50257, 128256, 262144])
    def test_keeps_what_the_definition_keeps(self, name, case, vocab):
        mask = {"typical": typical_mask, "top_p": top_p_mask}[name]
        for scale in (0.3, 3.0):
            logits = make_logits(case, scale, vocab=vocab).cuda()
            for mass, need in [(0.2, 1), (0.9, 5), (0.99, 1)]:
                kept = mask(logits, mass, min_tokens_to_keep=need, backend="triton") > -INF
                want, boundary = definition(logits, mass, need, typical=name == "typical")
                different = kept != want
                if vocab < 10_000:
                    assert not different[~boundary].any()
                # In a large vocabulary every row has tokens that float32 cannot tell apart, of next to no weight.
                if case != "ties":
                    weight = (different * logits.double().softmax(-1).nan_to_num()).sum(-1)
                    assert weight.max() < 2e-5, f"mass {mass}"

    def test_large_batches_are_bit_identical_in_20_runs_and_row_by_row(self):
        logits = make_logits("plain", 3.0, rows=512, vocab=128256).cuda()
        first = typical_mask(logits, 0.9, backend="triton")
        for _ in range(20):
            assert torch.equal(typical_mask(logits, 0.9, backend="triton"), first)
        order = torch.randperm(512, device="cuda")
        assert torch.equal(typical_mask(logits[order], 0.9, backend="triton"), first[order])
        for row in (0, 100, 511):
            assert torch.equal(typical_mask(logits[row : row + 1], 0.9, backend="triton"), first[row : row + 1])

    def test_a_cuda_graph_holds_it(self):
        logits = make_logits("plain", 3.0, vocab=50257).cuda()
        typical_mask(logits, 0.9)  # the self-check waits for the device, once
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = typical_mask(logits, 0.9)
        logits.copy_(make_logits("plain", 2.0, vocab=50257, seed=1))
        graph.replay()
        assert torch.equal(out, typical_mask(logits, 0.9))
        assert explain()["typical_mask"].backend == "triton"

    def test_compiles_without_a_graph_break(self):
        torch._dynamo.reset()
        logits = make_logits("plain", 3.0, vocab=50257).cuda()

        def double(logits):
            return typical_mask(logits, 0.9) * 2

        assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(logits), double(logits))

    def test_samples_follow_the_filtered_distribution(self):
        logits = torch.linspace(0, 4, 60, device="cuda")[torch.randperm(60, device="cuda")][None]
        p = typical_mask(logits / 1.3, 0.8)[0].softmax(-1)
        generator = torch.Generator("cuda").manual_seed(0)
        tokens = fused_typical_sample(logits.repeat(100_000, 1), 0.8, 1.3, generator=generator, backend="triton")
        assert chi2_p_value(tokens.cpu(), p.cpu()) > 1e-3

    def test_rows_without_a_distribution(self):
        logits = make_logits("plain", 3.0, vocab=50257).cuda()
        logits[1, 40000], logits[2], logits[3, 5] = float("nan"), -INF, INF
        out = typical_mask(logits, 0.9, backend="triton")
        assert torch.equal(out[1:4].nan_to_num(7.0), logits[1:4].nan_to_num(7.0))
        assert (fused_typical_sample(logits, 0.9, backend="triton")[1:4] == -1).all()
