"""The filters keep what their definition keeps, on every backend, whatever stands around a row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undersong.ops import available_backends, explain, fused_typical_sample, top_p_mask, typical_mask
from undersong.ops.vocabulary_mask import _mask_rows, _select_by_bins, _select_by_digits, kernel_refuses

from .filter_oracle import INF, chi2_p_value, definition, make_logits

MASKS = {"typical": typical_mask, "top_p": top_p_mask}
BACKENDS = available_backends("typical_mask")


def kept(out):
    return out > -INF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["plain", "ties", "masked"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", MASKS)
def test_keeps_what_the_definition_keeps(name, scale, case, backend):
    rows = 2 if backend == "triton" else 6  # the interpreter takes 0.1 s a row
    logits, compared = make_logits(case, scale, rows=rows), 0
    for mass, need in [(0.1, 1), (0.2, 5), (0.5, 1), (0.9, 1), (0.95, 5), (0.99, 1)][-rows:]:
        out = MASKS[name](logits, mass, min_tokens_to_keep=need, backend=backend)
        want, boundary = definition(logits, mass, need, typical=name == "typical")
        assert torch.equal(kept(out)[~boundary], want[~boundary]), f"mass {mass}, at least {need}"
        assert torch.equal(out[kept(out)], logits[kept(out)])
        compared += (~boundary).sum()
    assert compared >= rows * rows * 0.7, "nearly every row must be compared"


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("vocab", [1, 2, 1023, 4096, 4097])
def test_any_vocabulary_and_memory_layout(name, vocab):
    wide = make_logits("plain", 2.0, rows=3, vocab=2 * vocab)
    for logits in (wide[:, :vocab], wide[:, ::2], wide[:, :vocab].t().contiguous().t()):
        want, boundary = definition(logits, 0.7, typical=name == "typical")
        for backend in BACKENDS:
            out = MASKS[name](logits, 0.7, backend=backend)
            assert torch.equal(kept(out)[~boundary], want[~boundary]), backend


@pytest.mark.parametrize("name", MASKS)
def test_large_vocabulary_differs_from_float64_by_a_few_tokens_of_no_weight(name):
    logits = make_logits("plain", 3.0, rows=3, vocab=128256)
    for mass in (0.2, 0.9, 0.99):
        different = kept(MASKS[name](logits, mass)) != definition(logits, mass, typical=name == "typical")[0]
        assert (different.sum(-1) < 12).all()
        # 1e5 tokens of 1e-6 and less: float32 separates neither all distances nor all sums.
        assert (different * logits.double().softmax(-1)).sum(-1).max() < 1e-5


@given(
    rows=st.lists(
        st.lists(st.sampled_from([-INF, -3.0, 0.0, 0.5, 2.0]), min_size=7, max_size=7), min_size=1, max_size=4
    ),
    mass=st.floats(0.01, 0.99),
    name=st.sampled_from(sorted(MASKS)),
)
@settings(deadline=None)
def test_kept_set_is_the_smallest_that_holds_the_mass(rows, mass, name):
    logits = torch.tensor(rows)
    for row, keep in zip(logits.double(), kept(MASKS[name](logits, mass)), strict=True):
        if row.max() == -INF:
            continue
        p = row.softmax(-1)
        d = (torch.special.entr(p).sum() + p.log()).abs() if name == "typical" else -p.log()
        held = p[keep].sum()
        outermost = keep & (d > d[keep].max() - 1e-5)
        assert held > mass - 1e-6
        assert held - p[outermost].sum() < mass + 1e-6
        assert not (~keep).any() or d[keep].max() <= d[~keep].min() + 1e-5


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("case", ["plain", "ties", "masked"])
def test_the_two_ways_of_the_torch_backend_agree(name, case):
    for scale in (0.1, 3.0, 40.0):
        logits = make_logits(case, scale, rows=8)
        for mass, need in [(0.3, 1), (0.9, 7)]:
            one, other = (
                _mask_rows(logits, mass, need, -INF, 1.0, name == "typical", select)
                for select in (_select_by_bins, _select_by_digits)
            )
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_rows_do_not_depend_on_their_neighbours(name, backend):
    logits = make_logits("plain", 2.0, rows=7, vocab=2001)
    together = MASKS[name](logits, 0.7, min_tokens_to_keep=3, backend=backend)
    order = torch.tensor([4, 0, 2, 6, 1, 5, 3])
    assert torch.equal(MASKS[name](logits[order], 0.7, min_tokens_to_keep=3, backend=backend), together[order])
    for row in range(7):
        alone = MASKS[name](logits[row : row + 1], 0.7, min_tokens_to_keep=3, backend=backend)
        assert torch.equal(alone, together[row : row + 1])


def test_number_of_threads_and_calls_changes_nothing():
    logits = make_logits("plain", 2.0, rows=5, vocab=100003)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(typical_mask(logits, 0.7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_per_row_settings_equal_a_loop(name, backend):
    logits = make_logits("plain", 2.0, rows=4)
    mass, need = torch.tensor([0.2, 0.9, 1.0, 0.5]), torch.tensor([1, 400, 2, 3])
    got = MASKS[name](logits, mass, min_tokens_to_keep=need, backend=backend)
    want = [
        MASKS[name](logits[i : i + 1], mass[i].item(), min_tokens_to_keep=need[i].item(), backend=backend)
        for i in range(4)
    ]
    assert torch.equal(got, torch.cat(want))
    assert torch.equal(got[2], logits[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_edges(name, backend):
    mask = MASKS[name]
    logits = make_logits("masked", 2.0)
    assert mask(logits, 1.0, backend=backend) is logits
    assert torch.equal(mask(logits, 0.1, min_tokens_to_keep=5000, backend=backend), logits)
    assert torch.equal(mask(torch.zeros(2, 500), 0.01, backend=backend), torch.zeros(2, 500)), "tied tokens stay"
    filled = mask(logits, 0.3, filter_value=-1e4, backend=backend)
    assert torch.equal(filled == -INF, logits == -INF), "-inf is neither revived nor replaced"
    assert torch.equal(filled == -1e4, (mask(logits, 0.3, backend=backend) == -INF) & (logits > -INF))
    assert mask(logits[:0], 0.5, backend=backend).shape == (0, 1003)


@pytest.mark.parametrize("backend", BACKENDS)
def test_top_p_of_zero_keeps_the_best_token(backend):
    logits = make_logits("plain", 2.0)
    assert torch.equal(kept(top_p_mask(logits, 0.0, backend=backend)), logits == logits.amax(-1, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bad", [float("nan"), INF, None], ids=["nan", "inf", "all -inf"])
def test_rows_without_a_distribution_come_back_unchanged_and_spare_their_neighbours(bad, name, backend):
    logits = make_logits("plain", 2.0, rows=3)
    if bad is None:
        logits[1] = -INF
    else:
        logits[1, 7] = bad
    out = MASKS[name](logits, 0.3, min_tokens_to_keep=2, backend=backend)
    assert torch.equal(out[1].nan_to_num(5.0), logits[1].nan_to_num(5.0))
    assert torch.equal(out[[0, 2]], MASKS[name](logits[[0, 2]], 0.3, min_tokens_to_keep=2, backend=backend))
    assert fused_typical_sample(logits, 0.3, backend=backend)[1] == -1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outlier", [torch.finfo(torch.float32).min, -1e4, 300.0])
def test_scores_far_away_do_not_spoil_the_search(outlier, backend):
    logits = make_logits("plain", 2.0)
    logits[:, 11] = outlier
    for name, mask in MASKS.items():
        want, boundary = definition(logits, 0.9, typical=name == "typical")
        assert torch.equal(kept(mask(logits, 0.9, backend=backend))[~boundary], want[~boundary])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_selects_in_float32(dtype, backend):
    logits = make_logits("plain", 2.0).to(dtype)
    before = logits.clone()
    out = typical_mask(logits, 0.9, backend=backend)
    assert out.dtype == dtype
    assert torch.equal(kept(out), kept(typical_mask(logits.float(), 0.9, backend=backend)))
    assert torch.equal(logits, before), "the input is not written to"


def test_the_reference_works_in_float64():
    logits = make_logits("plain", 3.0, vocab=20011).double()
    for mass in (0.5, 0.99):
        assert torch.equal(kept(typical_mask(logits, mass, backend="reference")), definition(logits, mass)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_keeps_to_the_typical_set_of_the_tempered_distribution(backend):
    logits, temperature = make_logits("plain", 3.0, rows=12, vocab=64), 2.0
    tokens = fused_typical_sample(logits, 0.5, temperature, backend=backend)
    assert tokens.dtype == torch.int64
    allowed = kept(typical_mask(logits / temperature, 0.5))
    assert allowed.gather(1, tokens[:, None]).all()
    assert not torch.equal(allowed, kept(typical_mask(logits, 0.5))), "the temperature must matter"
    per_row = fused_typical_sample(logits, 0.5, torch.full((12,), temperature), backend=backend)
    assert allowed.gather(1, per_row[:, None]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_repeats_with_the_generators_seed(backend):
    logits = make_logits("plain", 1.0, rows=8)
    first, second = (
        fused_typical_sample(logits, 0.9, generator=torch.Generator().manual_seed(3), backend=backend)
        for _ in range(2)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["torch", "reference"])  # of the kernel on a GPU: the interpreter takes minutes
def test_samples_follow_the_filtered_distribution(backend):
    draws = 100_000
    logits = torch.linspace(0, 4, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(1))][None]
    p = typical_mask(logits / 1.3, 0.8)[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    tokens = fused_typical_sample(logits.repeat(draws, 1), 0.8, 1.3, generator=generator, backend=backend)
    assert chi2_p_value(tokens, p) > 1e-3
    assert chi2_p_value(torch.multinomial(p, 100_000, replacement=True, generator=generator), p) > 1e-3
    assert chi2_p_value(tokens, (p > 0) / (p > 0).sum()) < 1e-3, "it must tell distributions apart"


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    logits = make_logits("plain", 2.0)

    def double(logits):
        return typical_mask(logits, 0.7, min_tokens_to_keep=2, backend=backend) * 2

    want = double(logits)
    assert torch.equal(torch.compile(double, fullgraph=True, backend="aot_eager")(logits), want)


def test_auto_runs_torch_on_a_cpu_and_says_so():
    typical_mask(make_logits("plain", 1.0), 0.5)
    assert (explain()["typical_mask"].backend, explain()["typical_mask"].reason) == (
        "torch",
        "auto: the inputs are on cpu",
    )


def test_outputs_carry_no_gradient():
    assert not typical_mask(make_logits("plain", 1.0).requires_grad_(), 0.5).requires_grad


def test_a_vocabulary_that_does_not_fit_the_device_is_refused_by_the_kernel(monkeypatch):
    class Logits:
        shape, device = (1, 500_000), torch.device("cuda")

    class Small:
        multi_processor_count = 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    assert kernel_refuses(Logits) == "the vocabulary (500000) is above 163840, the kernel's limit here"
    Small.multi_processor_count = 132
    assert kernel_refuses(Logits) is None


LOGITS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: typical_mask(LOGITS, 0.0), r"mass \(0.0\) must lie in \(0, 1\]; use 1.0 to keep every token"),
        (lambda: typical_mask(LOGITS, 1.5), r"mass \(1.5\) must lie in \(0, 1\]"),
        (lambda: typical_mask(LOGITS, math.nan), r"mass \(nan\) must lie in \(0, 1\]"),
        (lambda: typical_mask(LOGITS, torch.tensor([0.5, -1.0, 0.5])), r"mass\[1\] \(-1.0\) must lie in \(0, 1\]"),
        (lambda: top_p_mask(LOGITS, -0.5), r"mass \(-0.5\) must lie in \[0, 1\]"),
        (lambda: typical_mask(LOGITS, torch.ones(2)), "mass has 2 values but logits have 3 rows; pass one value per"),
        (lambda: typical_mask(LOGITS, 0.5, min_tokens_to_keep=0), r"min_tokens_to_keep \(0\) must be a positive int"),
        (lambda: top_p_mask(LOGITS, 0.5, min_tokens_to_keep=torch.ones(4)), "min_tokens_to_keep has 4 values but log"),
        (lambda: typical_mask(LOGITS[0], 0.5), r"logits \(float32 \[5\]\) must be a float \[batch, vocab\]"),
        (lambda: typical_mask(LOGITS.long(), 0.5), r"logits \(int64 \[3, 5\]\) must be a float"),
        (lambda: fused_typical_sample(LOGITS, 0.5, 0.0), r"temperature \(0.0\) must be positive; use argmax"),
        (lambda: typical_mask(LOGITS, 0.5, backend="cuda"), r"backend \('cuda'\) must be one of 'auto'"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
