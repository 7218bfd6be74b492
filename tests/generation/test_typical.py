"""The sort-free warper keeps what the stock warper keeps, row by row, whatever stands around the row."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TypicalLogitsWarper
from transformers import TopPLogitsWarper as StockTopPLogitsWarper

from undersong.generation import LocallyTypicalLogitsWarper, TopPLogitsWarper, use_fast_typical
from undersong.hub._flatten import flatten

from .tiny_llama import left_padded, tiny_llama

INF = float("inf")
MASSES = [0.1, 0.2, 0.5, 0.9, 0.95, 0.99]


def make_scores(case, scale, rows=6, vocab=1003, seed=0):
    scores = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    if case == "ties":
        scores = (scores * 4).round() / 4
    if case == "masked":
        scores[:, ::3] = -INF
        scores[0, 1:] = -INF  # one finite token
    return scores


def distances(scores, mass, min_tokens=1):
    """The definition in float64, with a sort: distances d, the threshold to keep, and which rows are at a boundary.

    At a boundary float32 may decide otherwise: the running sum passes within 1e-6 of the mass, or distances differ
    from the threshold by less than float32 resolves.
    """
    log_p = scores.double().log_softmax(-1)
    d = (log_p + torch.special.entr(log_p.exp()).sum(-1, keepdim=True)).abs()
    order = d.argsort(-1)
    held = log_p.exp().gather(1, order).cumsum(-1)
    last = (held < mass).sum(-1, keepdim=True).clamp(min=min_tokens - 1, max=scores.shape[1] - 1)
    threshold = d.gather(1, order.gather(1, last))
    close = ((d - threshold).abs() < 4e-6) & (d != threshold)
    return d, threshold, ((held - mass).abs() < 1e-6).any(-1) | close.any(-1)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("case", ["plain", "ties", "masked"])
@pytest.mark.parametrize("min_tokens", [1, 5])
@pytest.mark.parametrize("mass", MASSES)
def test_keeps_what_stock_keeps(mass, min_tokens, case, scale):
    scores = make_scores(case, scale)
    got = LocallyTypicalLogitsWarper(mass, min_tokens_to_keep=min_tokens)(None, scores)
    want = TypicalLogitsWarper(mass, min_tokens_to_keep=min_tokens)(None, scores)
    boundary = distances(scores, mass, min_tokens)[2]
    different = (got != want).any(-1) & ~boundary
    if case == "ties" and min_tokens > 1:  # stock un-masks `min_tokens` of the tied tokens, in no defined order
        assert not ((want > -INF) & (got == -INF))[~boundary].any()
    else:
        assert not different.any(), f"rows {different.nonzero().flatten().tolist()} differ"
    assert boundary.sum() <= 2, "nearly every row must be compared"


@pytest.mark.parametrize("mass", MASSES)
def test_large_vocabulary_agrees_with_the_definition(mass):
    scores = make_scores("plain", 3.0, rows=3, vocab=128256)  # two chunks of rows
    kept = LocallyTypicalLogitsWarper(mass)(None, scores) > -INF
    d, threshold, _ = distances(scores, mass)
    different = kept != (d <= threshold)
    # 1e5 tokens of 1e-6 and less: float32 separates neither all distances nor all sums, but only a few tokens differ.
    assert (different.sum(-1) < 10).all()
    assert ((different * scores.double().softmax(-1)).sum(-1) < 1e-5).all()


@given(
    scores=st.lists(
        st.lists(st.sampled_from([-INF, -3.0, 0.0, 0.5, 2.0]), min_size=7, max_size=7), min_size=1, max_size=4
    ),
    mass=st.floats(0.01, 0.99),
)
def test_kept_set_is_the_smallest_that_holds_the_mass(scores, mass):
    scores = torch.tensor(scores)
    kept = LocallyTypicalLogitsWarper(mass)(None, scores) > -INF
    for row, keep in zip(scores.double(), kept, strict=True):
        if row.max() == -INF:
            continue
        p = row.softmax(-1)
        d = (torch.special.entr(p).sum() + p.log()).abs()
        held = p[keep].sum()
        outermost = keep & (d > d[keep].max() - 1e-5)
        assert held > mass - 1e-6
        assert held - p[outermost].sum() < mass + 1e-6
        assert d[keep].max() <= d[~keep].min() + 1e-5 if (~keep).any() else True


@pytest.mark.parametrize("case", ["plain", "ties", "masked"])
def test_rows_do_not_depend_on_their_neighbours(case):
    scores = make_scores(case, 2.0, rows=9, vocab=33001)  # more than torch needs to use several threads
    warper = LocallyTypicalLogitsWarper(0.7, min_tokens_to_keep=3)
    together = warper(None, scores)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 5, 7, 3])
    assert torch.equal(warper(None, scores[order]), together[order])
    for row in range(9):
        assert torch.equal(warper(None, scores[row : row + 1]), together[row : row + 1])


def test_number_of_threads_changes_nothing():
    scores, warper = make_scores("plain", 2.0, rows=2, vocab=100003), LocallyTypicalLogitsWarper(0.7)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(warper(None, scores))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_per_row_settings_equal_a_loop():
    scores = make_scores("plain", 2.0)
    mass, minimum = [0.2, 0.9, 1.0], torch.tensor([1, 400, 2])
    got = LocallyTypicalLogitsWarper(mass, min_tokens_to_keep=minimum)(None, scores)  # 6 rows: two per value
    want = [
        LocallyTypicalLogitsWarper(mass[row // 2], min_tokens_to_keep=int(minimum[row // 2]))(
            None, scores[row : row + 1]
        )
        for row in range(6)
    ]
    assert torch.equal(got, torch.cat(want))
    assert torch.equal(got[4:], scores[4:])


def test_mass_one_keeps_everything():
    scores = make_scores("masked", 8.0)
    assert LocallyTypicalLogitsWarper(1.0)(None, scores) is scores
    assert torch.equal(LocallyTypicalLogitsWarper([1.0] * 6)(None, scores), scores)


def test_more_tokens_to_keep_than_there_are():
    scores = make_scores("masked", 2.0)
    assert torch.equal(LocallyTypicalLogitsWarper(0.1, min_tokens_to_keep=2000)(None, scores), scores)


def test_uniform_rows_are_kept_whole():
    scores = torch.zeros(2, 500)
    assert torch.equal(LocallyTypicalLogitsWarper(0.01)(None, scores), scores)


def test_peaked_row_may_lose_its_best_token():
    # H = 1.33 nats: 0.2 carries 1.61 (d = 0.28), 0.4 carries 0.92 (d = 0.42)
    kept = LocallyTypicalLogitsWarper(0.2)(None, torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()) > -INF
    assert kept.tolist() == [[False, True, True, True]]
    # H = 0.95: 0.6 carries 0.51 (d = 0.44), 0.2 carries 1.61 (d = 0.66)
    kept = LocallyTypicalLogitsWarper(0.2)(None, torch.tensor([[0.6, 0.2, 0.2]]).log()) > -INF
    assert kept.tolist() == [[True, False, False]]


def test_masked_tokens_stay_masked_and_others_get_the_filter_value():
    scores = torch.tensor([[0.0, -INF, -0.1, -7.0]])
    out = LocallyTypicalLogitsWarper(0.5, filter_value=-1e4, min_tokens_to_keep=2)(None, scores)
    assert out.tolist() == [[0.0, -INF, pytest.approx(-0.1), -1e4]]


@pytest.mark.parametrize("bad", [float("nan"), INF, None], ids=["nan", "inf", "all -inf"])
def test_invalid_rows_come_back_unchanged_and_spare_their_neighbours(bad, monkeypatch):
    scores = make_scores("plain", 2.0, rows=3)
    if bad is None:
        scores[1] = -INF
    else:
        scores[1, 7] = bad
    warper = LocallyTypicalLogitsWarper(0.3, min_tokens_to_keep=2)
    out = warper(None, scores)
    assert torch.equal(out[1].nan_to_num(5.0), scores[1].nan_to_num(5.0))
    assert torch.equal(out[[0, 2]], warper(None, scores[[0, 2]]))
    monkeypatch.setenv("UNDERSONG_DEBUG", "1")
    with pytest.raises(ValueError, match=r"scores\[1\] must hold a finite score"):
        warper(None, scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_select_in_float32(dtype):
    scores = make_scores("plain", 2.0).to(dtype)
    before = scores.clone()
    out = LocallyTypicalLogitsWarper(0.9)(None, scores)
    want = LocallyTypicalLogitsWarper(0.9)(None, scores.float())
    assert out.dtype == dtype
    assert torch.equal(out > -INF, want > -INF)
    assert torch.equal(scores, before), "the input is not written to"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mass": 0.0}, r"mass \(0.0\) must lie in \(0, 1\]"),
        ({"mass": 1.5}, r"mass \(1.5\) must lie in \(0, 1\]"),
        ({"mass": float("nan")}, r"mass \(nan\) must lie in \(0, 1\]"),
        ({"mass": [0.5, -1.0]}, r"mass\[1\] \(-1.0\) must lie in \(0, 1\]"),
        ({"mass": torch.zeros(2, 2)}, r"mass \(shape \[2, 2\]\) must be a number or one number per row"),
        ({"min_tokens_to_keep": 0}, r"min_tokens_to_keep \(0\) must be a positive integer"),
        ({"min_tokens_to_keep": 1.5}, r"min_tokens_to_keep \(1.5\) must be a positive integer"),
        ({"min_tokens_to_keep": [2, 0]}, r"min_tokens_to_keep\[1\] \(0\) must be a positive integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocallyTypicalLogitsWarper(**arguments)


def test_per_row_values_must_fit_the_batch():
    with pytest.raises(ValueError, match="mass has 4 values but scores have 6 rows; pass one value per prompt"):
        LocallyTypicalLogitsWarper([0.5] * 4)(None, make_scores("plain", 1.0))


def test_continuous_batching_only_without_per_row_values():
    assert LocallyTypicalLogitsWarper(0.5).supports_continuous_batching
    assert not LocallyTypicalLogitsWarper([0.5]).supports_continuous_batching


PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [20, 21, 22]]


def generate(model, processor, seed=0, prompts=PROMPTS, **options):
    torch.manual_seed(seed)
    return model.generate(**left_padded(prompts), max_new_tokens=12, logits_processor=[processor], **options)


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": 0, "num_return_sequences": 2}]
)
def test_generate_writes_what_stock_writes(sampling):
    model = tiny_llama()
    ours = generate(model, LocallyTypicalLogitsWarper(0.6), **sampling)
    stock = generate(model, TypicalLogitsWarper(0.6), **sampling)
    assert torch.equal(ours, stock)


def test_generate_repeats_row_settings_for_returned_sequences():
    model = tiny_llama()
    out = generate(
        model, LocallyTypicalLogitsWarper([0.05, 0.9, 1.0]), do_sample=True, num_return_sequences=3,
        return_dict_in_generate=True, output_scores=True, top_k=0,
    )  # fmt: skip
    kept = torch.stack([(s > -INF).sum(-1) for s in out.scores]).float().mean(0).view(3, 3)
    assert (kept[0] < 12).all()
    assert (kept[1] > 20).all()
    assert (kept[2] == 64).all()


def test_before_the_warpers_it_sees_the_models_distribution():
    model = tiny_llama()
    options = {"do_sample": True, "top_k": 5, "temperature": 0.5, "output_scores": True, "output_logits": True}
    out = generate(model, LocallyTypicalLogitsWarper(0.4), return_dict_in_generate=True, **options)
    for logits, scores in zip(out.logits, out.scores, strict=True):
        typical = TypicalLogitsWarper(0.4)(None, logits) > -INF
        assert ((scores > -INF) <= typical).all()


def test_works_in_a_processor_list():
    scores = make_scores("plain", 1.0)
    assert torch.equal(
        LogitsProcessorList([LocallyTypicalLogitsWarper(0.5)])(torch.zeros(6, 1, dtype=torch.long), scores),
        LocallyTypicalLogitsWarper(0.5)(None, scores),
    )


def test_fast_warpers_take_the_place_and_settings_of_stock_ones():
    class Special(TypicalLogitsWarper):
        pass

    stock = [
        TemperatureLogitsWarper(2.0), TopKLogitsWarper(50), StockTopPLogitsWarper(0.8, min_tokens_to_keep=2),
        TypicalLogitsWarper(0.3, filter_value=-1e4, min_tokens_to_keep=3), Special(0.5),
    ]  # fmt: skip
    fast = use_fast_typical(LogitsProcessorList(stock))
    assert isinstance(fast, LogitsProcessorList)
    assert [type(p) for p in fast] == [
        TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, LocallyTypicalLogitsWarper, Special,
    ]  # fmt: skip
    assert fast[:2] == stock[:2]
    assert (fast[3].mass, fast[3].filter_value, fast[3].min_tokens_to_keep, fast[3].reference) == (
        0.3, -1e4, 3, "processed",
    )  # fmt: skip
    scores, ids = make_scores("plain", 2.0), torch.zeros(6, 1, dtype=torch.long)
    # stock turns -inf into the filter value
    got, want = (LogitsProcessorList(processors[:4])(ids, scores) > -1e4 for processors in (fast, stock))
    assert torch.equal(got, want)


def test_the_models_reference_ignores_warpers_placed_after_it():
    scores, ids = make_scores("plain", 2.0), torch.zeros(6, 1, dtype=torch.long)
    ours = LocallyTypicalLogitsWarper(0.5, reference="model")
    kept = LogitsProcessorList([ours, TemperatureLogitsWarper(3.0), TopKLogitsWarper(900)])(ids, scores) > -INF
    assert torch.equal(kept, ours(ids, scores) > -INF)


def test_an_unknown_reference_is_named():
    with pytest.raises(ValueError, match=r"reference \('raw'\) must be 'model' or 'processed'"):
        LocallyTypicalLogitsWarper(0.5, reference="raw")


def test_backends_agree():
    scores = make_scores("plain", 2.0)
    want = LocallyTypicalLogitsWarper(0.5, backend="reference")(None, scores)
    assert torch.equal(LocallyTypicalLogitsWarper(0.5, backend="torch")(None, scores), want)


def test_it_travels_as_flat_files_without_the_kernels(tmp_path):
    for name, text in flatten(LocallyTypicalLogitsWarper).files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "__init__.py").write_text("")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path.parent)!r}); sys.modules["undersong"] = None
import importlib, torch
warper = importlib.import_module("{tmp_path.name}.generation_typical").LocallyTypicalLogitsWarper(0.3)
print(warper(None, torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()).exp().tolist())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[[0.5, 0.25, 0.0, 0.0]]", run.stderr
