"""Selection by hand-made utilities; the loop against stock sampling with the same seed, reranked."""

import sys

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache
from transformers.generation.streamers import BaseStreamer

from undersong.generation.mbr import MBR, mbr_select

from .tiny_llama import left_padded, tiny_llama

PROMPTS = [[11, 12, 13], [21, 22, 23, 24, 25, 26]]
SAMPLE = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}


def overlap(hypotheses, references):
    """Shared tokens per token of both: symmetric, 1 for equal lists."""
    return [2 * len({*h} & {*r}) / (len({*h}) + len({*r})) for h, r in zip(hypotheses, references, strict=True)]


def table(values):
    """The utility that looks its scores up; candidates are indices."""
    return lambda hypotheses, references: [values[h][r] for h, r in zip(hypotheses, references, strict=True)]


class Words:
    """Token ids to texts; 2 is a special token."""

    def batch_decode(self, rows, skip_special_tokens=False):
        return [" ".join(f"w{token}" for token in row if not (skip_special_tokens and token == 2)) for row in rows]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def ending():
    """A model whose samples end after a few tokens, each at another one."""
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(2, 12))
    return model


def sample(model, seed=0, prompts=PROMPTS, **options):
    torch.manual_seed(seed)
    return model.generate(**left_padded(prompts), **(SAMPLE | options))


def new_tokens(rows, length, ends=()):
    """Lists of new tokens up to and with the first end."""
    lists = [row[length:].tolist() for row in rows]
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in lists]


# ---- mbr_select


def test_the_largest_mean_utility_is_chosen():
    values = [[1.0, 0.0, 0.5], [0.0, 1.0, 0.8], [0.5, 0.8, 1.0]]
    index, matrix = mbr_select([0, 1, 2], table(values))
    assert index == 2
    assert matrix.tolist() == values


def test_rows_are_hypotheses_and_columns_references():
    # 0 is a good hypothesis for every reference; as a reference nothing fits it
    index, matrix = mbr_select([0, 1], table([[0.5, 0.9], [0.0, 0.6]]))
    assert index == 0
    assert matrix[0, 1] == 0.9
    assert matrix[1, 0] == 0.0


@pytest.mark.parametrize(("means", "first"), [([1, 3, 3], 1), ([2, 2, 2], 0), ([0, 1, 0], 1)])
def test_ties_go_to_the_first(means, first):
    assert mbr_select(range(3), table([[mean] * 3 for mean in means]))[0] == first


def test_a_candidate_sampled_often_outweighs_an_outlier():
    assert mbr_select([[9, 8], [1, 2], [1, 2], [1, 3]], overlap)[0] == 1


@pytest.mark.parametrize("batch_size", [1, 4, 9, 1000])
def test_pairs_come_in_batches(batch_size):
    sizes = []

    def counted(hypotheses, references):
        sizes.append(len(hypotheses))
        return overlap(hypotheses, references)

    candidates = [[1, 2], [2, 3], [3, 4]]
    index, matrix = mbr_select(candidates, counted, batch_size=batch_size)
    assert sum(sizes) == 9
    assert max(sizes) == min(batch_size, 9)
    assert index == 1
    torch.testing.assert_close(matrix, mbr_select(candidates, overlap)[1])


@pytest.mark.parametrize("utility", ["chrf", "bleu"])
def test_named_utilities_are_sacrebleus_sentence_scores(utility):
    from sacrebleu import sentence_bleu, sentence_chrf

    texts = ["The cat sat on the mat.", "The cat sat on a mat.", "A dog."]
    stock = {"chrf": sentence_chrf, "bleu": lambda h, r: sentence_bleu(h, r, use_effective_order=True)}[utility]
    index, matrix = mbr_select(texts, utility)
    assert matrix.tolist() == [[stock(h, [r]).score for r in texts] for h in texts]
    assert index in (0, 1)
    assert mbr_select(["no", "yes", "yes"], utility)[0] == 1


def test_missing_sacrebleu_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ImportError, match=r"utility='bleu' needs sacrebleu; pip install 'undersong\[metrics\]'"):
        mbr_select(["a"], "bleu")


# ---- the loop


@pytest.mark.parametrize("returned", [1, 3, 6])
@pytest.mark.parametrize("kind", ["all of one length", "ending"])
def test_returns_the_best_of_the_samples_that_stock_generate_draws(model, ending, kind, returned):
    model, ends = (ending, range(2, 12)) if kind == "ending" else (model, ())
    length = max(map(len, PROMPTS))
    got = sample(model, num_return_sequences=returned, custom_generate=MBR(6, overlap))
    candidates = sample(model, num_return_sequences=6)
    expected = []
    for start in (0, 6):
        own = new_tokens(candidates[start : start + 6], length, ends)
        utilities = mbr_select(own, overlap)[1].mean(1)
        order = sorted(range(6), key=lambda i, utilities=utilities: -utilities[i].item())[:returned]
        expected += [own[i] for i in order]
    assert new_tokens(got, length, ends) == expected
    assert got.shape == (2 * returned, length + max(map(len, expected)))
    assert torch.equal(got[:, :length], left_padded(PROMPTS)["input_ids"].repeat_interleave(returned, 0))


def test_what_follows_an_end_is_padding(ending):
    got = sample(ending, custom_generate=MBR(6, lambda h, _: [-abs(len(x) - 3) for x in h]), seed=1)
    (short, long) = sorted(new_tokens(got, 6, range(2, 12)), key=len)
    assert got.shape[1] == 6 + len(long)
    rows = [row[6:].tolist() for row in got]
    assert short + [0] * (len(long) - len(short)) in rows


def test_an_end_that_is_also_the_padding_counts_once(ending):
    seen = []

    def watch(hypotheses, references):
        seen.extend(tuple(x) for x in hypotheses)
        return [len(x) for x in hypotheses]

    stock = new_tokens(sample(ending, num_return_sequences=6), 6, range(2, 12))
    end = next(row[-1] for row in stock if len(row) < 12)
    got = sample(ending, custom_generate=MBR(6, watch), pad_token_id=end)
    assert set(seen) == {tuple(row) for row in stock}
    assert got.shape[1] == 6 + max(map(len, stock))


def test_prompts_are_independent(model):
    """Each prompt is judged on its own candidates: a utility that sees another prompt's would be noticed."""
    seen = []

    def watch(hypotheses, references):
        seen.append({tuple(x) for x in [*hypotheses, *references]})
        return overlap(hypotheses, references)

    sample(model, custom_generate=MBR(4, watch))
    candidates = [tuple(x) for x in new_tokens(sample(model, num_return_sequences=4), 6)]
    assert seen == [set(candidates[:4]), set(candidates[4:])]


def test_seeds_reproduce_and_matter(model):
    runs = [sample(model, seed=seed, custom_generate=MBR(4, overlap)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_one_sample_is_stock_sampling(model):
    assert torch.equal(sample(model, custom_generate=MBR(1, overlap)), sample(model))


def test_warpers_and_own_processors_act_on_every_candidate(model):
    def only_even(input_ids, scores):
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores

    options = {"top_k": 3, "temperature": 0.7, "logits_processor": [only_even]}
    got = sample(model, custom_generate=MBR(4, overlap, tokenizer=None), **options)
    assert (got[:, 6:] % 2 == 0).all()
    stock = sample(model, num_return_sequences=4, **options)
    assert all(any(torch.equal(row, other) for other in stock[4 * i : 4 * i + 4]) for i, row in enumerate(got))


def test_texts_reach_the_utility_without_special_tokens(ending):
    seen = []

    def watch(hypotheses, references):
        seen.extend(hypotheses)
        return [0.0] * len(hypotheses)

    ending.generation_config.eos_token_id = 2
    bias = {"sequence_bias": [[[2], 3.0]]}
    sample(ending, custom_generate=MBR(8, watch, tokenizer=Words()), seed=3, **bias)
    stock = new_tokens(sample(ending, num_return_sequences=8, seed=3, **bias), 6, {2})
    ending.generation_config.eos_token_id = list(range(2, 12))
    texts = Words().batch_decode(stock, skip_special_tokens=True)
    assert any(len(row) < 12 for row in stock)
    assert set(seen) == set(texts)
    assert not any("w2 " in text + " " for text in texts)


def test_chrf_runs_on_texts(model):
    got = sample(model, custom_generate=MBR(4, "chrf", tokenizer=Words()))
    stock = Words().batch_decode(new_tokens(sample(model, num_return_sequences=4), 6))
    best = [stock[start + mbr_select(stock[start : start + 4], "chrf")[0]] for start in (0, 4)]
    assert Words().batch_decode(new_tokens(got, 6)) == best


@pytest.mark.parametrize("returned", [1, 2])
def test_dict_output_belongs_to_the_chosen(ending, returned):
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"output_hidden_states": True, "num_return_sequences": returned, "seed": 5}
    mbr = MBR(4, lambda h, _: [-len(x) for x in h])  # the shortest: steps after it must go
    out = sample(ending, custom_generate=mbr, **options)
    rows, width = out.sequences.shape
    steps = width - 6
    assert rows == 2 * returned
    assert torch.equal(out.sequences, sample(ending, custom_generate=mbr, num_return_sequences=returned, seed=5))
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == steps < 12
    assert out.hidden_states[0][0].shape[:2] == (rows, 6)
    assert out.past_key_values.get_seq_length() == width - 1
    inputs = left_padded(PROMPTS)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(returned, 0), torch.ones(rows, steps)], 1)
    whole = ending(out.sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0).long())
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.logits[:, 5:-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.past_key_values.layers[0].keys.shape[0], rows)


def test_a_filled_cache_is_continued_and_left_with_the_chosen(model):
    inputs = left_padded([PROMPTS[1]])
    cache = DynamicCache()
    with torch.no_grad():
        model(inputs["input_ids"][:, :-2], past_key_values=cache)
    got = sample(model, prompts=[PROMPTS[1]], custom_generate=MBR(4, overlap), past_key_values=cache)
    assert torch.equal(got, sample(model, prompts=[PROMPTS[1]], custom_generate=MBR(4, overlap)))
    assert cache.get_seq_length() == got.shape[1] - 1
    assert cache.layers[0].keys.shape[0] == 1


def test_encoder_decoder_models_rerank_too():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, forced_eos_token_id=None)).eval()
    model.generation_config.eos_token_id = None
    got = sample(model, custom_generate=MBR(4, overlap))
    stock = sample(model, num_return_sequences=4)
    for i in (0, 1):
        own = new_tokens(stock[4 * i : 4 * i + 4], 1)
        assert got[i, 1:].tolist() == own[mbr_select(own, overlap)[0]]


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.pieces.append(value)

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "two prompts"])
def test_streamer_gets_prompt_chosen_text_and_end(ending, prompts):
    streamer = Recorder()
    got = sample(ending, prompts=prompts, custom_generate=MBR(4, overlap, streamer=streamer))
    prompt, *steps = streamer.pieces
    assert torch.equal(prompt, left_padded(prompts)["input_ids"])
    assert torch.equal(torch.stack(steps, 1), got[:, prompt.shape[1] :])
    assert streamer.ended == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MBR(0, overlap), r"num_samples \(0\) must be a positive integer"),
        (lambda: MBR(2.5, overlap), r"num_samples \(2.5\) must be a positive integer"),
        (lambda: MBR(4, overlap, batch_size=0), r"batch_size \(0\) must be at least 1"),
        (lambda: MBR(4, "chrf"), r"tokenizer \(None\) must be given because utility='chrf' compares texts"),
        (lambda: MBR(4, "rouge", tokenizer=Words()), r"utility \('rouge'\) must be 'chrf', 'bleu' or a callable"),
        (lambda: mbr_select([]), "candidates must hold at least one candidate"),
        (lambda: mbr_select(["a"], overlap, batch_size=0), r"batch_size \(0\) must be at least 1"),
        (lambda: mbr_select(["a", "b"], lambda h, r: [1.0]), "utility returned 1 scores for 4 pairs"),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": False, "top_k": None}, r"do_sample \(False\) must be True because MBR chooses among samples"),
        ({"num_beams": 2}, r"num_beams \(2\) must be 1 because MBR chooses among samples, not beams"),
        ({"num_return_sequences": 3}, r"num_samples \(4\) must be a multiple of num_return_sequences \(3\).*=6"),
    ],
)
def test_modes_without_samples_are_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        sample(model, custom_generate=MBR(4, overlap), **options)
