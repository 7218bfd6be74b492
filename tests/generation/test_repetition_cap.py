"""The n-th copy of a repeated token gets penalty^n of the first one's probability; everything else keeps its ratio."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undersong.generation import SelfReinforcementCapLogitsProcessor
from undersong.metrics import rep_n

from .tiny_llama import left_padded, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 12


def random_scores(count, rows=1, seed=0, scale=2.0):
    return torch.randn(count, rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def feed(cap, prompt, text, scores):
    """Plays generate(): probabilities `[steps, rows, vocab]` when `text` is written after `prompt` (lists of rows)."""
    ids, out = torch.tensor(prompt), []
    text = torch.tensor(text)
    for step in range(text.shape[1]):
        out.append(cap(ids, scores[step]).softmax(-1))
        ids = torch.cat([ids, text[:, step : step + 1]], 1)
    return torch.stack(out)


@pytest.mark.parametrize("penalty", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("period", [1, 2, 3, 5])
@pytest.mark.parametrize("min_match", [1, 2, 3])
def test_copies_decay_geometrically(min_match, period, penalty):
    scores = random_scores(1).expand(60, 1, VOCAB)  # a model that never changes its mind
    text = [4 + i % period for i in range(60)]
    probabilities = feed(SelfReinforcementCapLogitsProcessor(penalty, min_match), [[0]], [text], scores)
    model = scores[0, 0].softmax(-1)
    for step, token in enumerate(text):
        copies = max(0, step - min_match) // period if step >= min_match else 0  # earlier capped or uncapped copies
        expected = model[token].item() * penalty**copies
        assert probabilities[step, 0, token].item() == pytest.approx(expected, rel=1e-4)


@given(
    text=st.lists(st.integers(0, 2), min_size=2, max_size=30),
    penalty=st.floats(0, 1),
    min_match=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_cap_is_min_of_the_models_and_the_earlier_probability(text, penalty, min_match, seed):
    scores = random_scores(len(text), seed=seed)
    prompt = [7]
    out = feed(SelfReinforcementCapLogitsProcessor(penalty, min_match), [prompt], [text], scores)[:, 0]
    model = scores[:, 0].softmax(-1)
    history = prompt + text
    torch.testing.assert_close(out.sum(-1), torch.ones(len(text)))
    for step in range(len(text)):
        end = len(prompt) + step
        suffix = history[end - min_match : end]
        starts = [u for u in range(max(min_match, 1), end) if history[u - min_match : u] == suffix]
        starts = starts if end >= min_match else []
        if not starts or starts[-1] < len(prompt):
            torch.testing.assert_close(out[step], model[step])
            continue
        u = starts[-1]
        token = history[u]
        limit = penalty * out[u - len(prompt), token].item()  # what it had then, after the cap of that step
        assert out[step, token].item() == pytest.approx(min(model[step, token].item(), limit), rel=1e-3, abs=1e-7)
        others = torch.arange(VOCAB) != token
        torch.testing.assert_close(
            out[step, others] / out[step, others].sum(), model[step, others] / model[step, others].sum()
        )


def test_scores_without_a_match_are_returned_as_they_are():
    cap = SelfReinforcementCapLogitsProcessor()
    scores = random_scores(1)[0]
    ids = torch.tensor([[1, 2, 3]])
    for token in (4, 5, 6, 7, 8):
        assert cap(ids, scores) is scores
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def test_the_probability_recorded_for_another_choice_is_the_raised_one():
    scores = torch.tensor([[[0.8, 0.1, 0.1]]]).log().expand(9, 1, 3)
    # the third step caps token 0 at 0.4, so 1 has 0.3 when it is chosen there; its next copy may have 0.15
    out = feed(SelfReinforcementCapLogitsProcessor(0.5, 1), [[2]], [[0, 0, 1, 0, 1, 0]], scores)
    torch.testing.assert_close(out[1, 0], torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(out[2, 0], torch.tensor([0.4, 0.3, 0.3]))  # 0 followed 0 with 0.8
    torch.testing.assert_close(out[4, 0, 1], torch.tensor(0.1))  # 1 followed 0 with 0.3: the limit 0.15 does not bind


def test_prompt_counts_only_when_it_is_scored():
    model = tiny_llama(VOCAB)
    prompt = [3, 4, 5, 6, 3, 4]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    scores = logits[-1:].clone()
    scores[0, 5] += 9.0  # certain of repeating
    assert SelfReinforcementCapLogitsProcessor(0.5, 2)(torch.tensor([prompt]), scores) is scores
    cap = SelfReinforcementCapLogitsProcessor(0.5, 2, score_prompt=model)
    earlier = logits[1].softmax(-1)[5].item()
    assert cap(torch.tensor([prompt]), scores).softmax(-1)[0, 5].item() == pytest.approx(earlier / 2, rel=1e-5)


def test_sentence_unit_needs_the_same_beginning():
    end, text = 9, [1, 2, 3, 9, 4, 1, 2, 3, 9, 1, 2, 3]
    # The sentence "4 1 2 3" begins like none before, the second "1 2 3" like the first.
    scores = random_scores(1).expand(12, 1, VOCAB)
    model = scores[0, 0].softmax(-1)

    def ratio(**options):
        out = feed(SelfReinforcementCapLogitsProcessor(0.5, 2, **options), [[end]], [text], scores)[:, 0]
        return [round(out[step, token].item() / model[token].item(), 2) for step, token in enumerate(text)]

    sentence = {"unit": "sentence", "sentence_end_token_ids": [end]}
    assert ratio(**sentence) == [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5]
    assert ratio() == [1, 1, 1, 1, 1, 1, 1, 0.5, 0.5, 1, 0.5, 0.25]
    text += [end]
    scores = random_scores(1).expand(13, 1, VOCAB)
    assert ratio(**sentence)[-1] == 0.5  # where the sentence ended before, it may end again


@pytest.mark.parametrize("unit", ["any", "sentence"])
def test_padding_and_neighbours_change_nothing(unit):
    options = {"unit": "sentence", "sentence_end_token_ids": [9]} if unit == "sentence" else {}
    cap = SelfReinforcementCapLogitsProcessor(0.5, 2, pad_token_id=0, **options)
    prompts = [[0, 0, 1, 2, 3], [5, 6, 7, 5, 6], [0, 0, 0, 0, 4]]
    texts = [[9, 1, 2, 3, 9, 1, 2], [7, 5, 6, 7, 5, 6, 7], [4, 4, 4, 4, 4, 4, 4]]
    scores = random_scores(7, rows=3)
    together = feed(cap, prompts, texts, scores)
    for row, prompt in enumerate(prompts):
        alone = feed(cap, [[token for token in prompt if token]], [texts[row]], scores[:, row : row + 1])
        assert torch.equal(alone[:, 0], together[:, row])


def test_another_text_starts_afresh():
    scores = random_scores(8)
    cap = SelfReinforcementCapLogitsProcessor(0.5, 1)
    first = feed(cap, [[3]], [[4, 5, 4, 5, 4]], scores)
    assert torch.equal(feed(cap, [[3]], [[4, 5, 4, 5, 4]], scores), first)
    # the next call's prompt is one token longer than the last text, but another one
    assert torch.equal(feed(cap, [[6, 3, 4, 5, 4, 5]], [[8]], scores)[0], scores[0].softmax(-1))
    # a larger batch
    assert torch.equal(feed(cap, [[3], [3]], [[4], [4]], scores.expand(8, 2, VOCAB))[0, :1], scores[0].softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_certain_models_are_capped_without_loss_of_digits(dtype):
    scores = torch.tensor([[60.0, 0.0, 0.0]], dtype=dtype)  # 1 - p = 1.8e-26
    before = scores.clone()
    cap = SelfReinforcementCapLogitsProcessor(0.5, 1)
    ids = torch.tensor([[1]])
    for expected in (1.0, 1.0, 0.5, 0.25, 0.125):
        out = cap(ids, scores)
        p = out.double().softmax(-1)[0]
        assert out.dtype == dtype
        torch.testing.assert_close(p[0].item(), expected, rtol=1e-2, atol=0)
        assert p[1] == p[2]
        ids = torch.cat([ids, torch.tensor([[0]])], 1)
    assert torch.equal(scores, before)


def test_the_only_token_allowed_stays_allowed():
    scores = torch.tensor([[0.0, -math.inf, -math.inf]])
    cap = SelfReinforcementCapLogitsProcessor(0.0, 1)
    for length in range(1, 6):
        out = cap(torch.zeros(1, length, dtype=torch.long), scores)
        assert out.softmax(-1).tolist() == [[1.0, 0.0, 0.0]]


def test_extreme_penalties():
    scores = random_scores(1).expand(6, 1, VOCAB)
    model = scores[0, 0].softmax(-1)
    banned = feed(SelfReinforcementCapLogitsProcessor(0.0, 1), [[3]], [[4] * 6], scores)[:, 0, 4]
    assert banned[:2].tolist() == pytest.approx([model[4].item()] * 2)
    assert (banned[2:] == 0).all()
    rising = torch.stack([scores[0] + step * torch.eye(VOCAB)[4] for step in range(6)])
    steady = feed(SelfReinforcementCapLogitsProcessor(1.0, 1), [[3]], [[4] * 6], rising)[:, 0, 4]
    assert steady[2:].tolist() == pytest.approx([steady[1].item()] * 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": 1.2}, r"penalty \(1.2\) must lie in \[0, 1\]"),
        ({"penalty": float("nan")}, r"penalty \(nan\) must lie in \[0, 1\]"),
        ({"min_match": 0}, r"min_match \(0\) must be a positive integer"),
        ({"min_match": 2.5}, r"min_match \(2.5\) must be a positive integer"),
        ({"unit": "word"}, r"unit \('word'\) must be 'any' or 'sentence'"),
        ({"unit": "sentence"}, r"sentence_end_token_ids \(None\) must be given if and only if unit is 'sentence'"),
        ({"sentence_end_token_ids": [4]}, r"sentence_end_token_ids \(\[4\]\) must be given .* unit is 'any'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelfReinforcementCapLogitsProcessor(**arguments)


PROMPTS = [[5, 6, 7, 8, 9], [11, 3], [10, 4, 2]]


def generate(cap, model=None, prompts=PROMPTS, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 40, "logits_processor": [cap] if cap else []} | options
    batch = left_padded(prompts)
    out = (model or tiny_llama(VOCAB)).generate(**batch, **options)
    return out[:, batch["input_ids"].shape[1] :]


def test_greedy_loops_are_cut():
    looping = generate(None).tolist()
    cut = generate(SelfReinforcementCapLogitsProcessor()).tolist()
    assert sum(map(rep_n, cut)) < 0.5 * sum(map(rep_n, looping))


def test_generate_batched_equals_single_and_again():
    model, cap = tiny_llama(VOCAB), SelfReinforcementCapLogitsProcessor(0.5, 2)
    batch = generate(cap, model)
    assert torch.equal(generate(cap, model), batch)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(generate(cap, model, [prompt])[0], batch[row])


def test_generate_samples_several_sequences():
    cap = SelfReinforcementCapLogitsProcessor(0.0, 2)
    out = generate(cap, do_sample=True, num_return_sequences=4)
    assert out.shape == (12, 40)
    for row in out.tolist():  # with penalty 0 a pair has a new continuation every time: no trigram comes twice
        assert len({tuple(row[i : i + 3]) for i in range(38)}) == 38


def test_beams_are_refused_with_advice():
    message = r"input_ids must keep every sequence in its row .* use num_beams=1, or no_repeat_ngram_size with beams"
    with pytest.raises(ValueError, match=message):
        generate(SelfReinforcementCapLogitsProcessor(), num_beams=4)
    assert SelfReinforcementCapLogitsProcessor.supports_continuous_batching is False


UNITS = {"any": {"min_match": 2}, "sentence": {"min_match": 1, "unit": "sentence", "sentence_end_token_ids": [9]}}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("draft", ["prompt lookup", "assistant", "the model as its own assistant"])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_assisted_greedy_decoding_writes_the_same(draft, penalty, unit):
    model = tiny_llama(VOCAB)
    assistant = {
        "prompt lookup": {"prompt_lookup_num_tokens": 5},
        "assistant": {"assistant_model": tiny_llama(VOCAB, seed=1)},
        "the model as its own assistant": {"assistant_model": tiny_llama(VOCAB)},
    }[draft]
    changed, forwards = 0, []
    with model.register_forward_hook(lambda *_: forwards.append(1)):
        for prompt in PROMPTS:
            cap = SelfReinforcementCapLogitsProcessor(penalty, **UNITS[unit])
            assisted = generate(cap, model, [prompt], **assistant)
            assert torch.equal(generate(cap, model, [prompt], **assistant), assisted)  # and once more
            steps = len(forwards)
            plain = generate(SelfReinforcementCapLogitsProcessor(penalty, **UNITS[unit]), model, [prompt])
            assert torch.equal(assisted, plain)
            del forwards[steps:]
            changed += not torch.equal(plain, generate(None, tiny_llama(VOCAB), [prompt]))
    assert changed >= 2
    if draft != "assistant":  # a stranger may guess nothing right
        assert len(forwards) < 2 * 3 * 40  # drafts were accepted


def test_a_rejected_draft_leaves_no_trace():
    scores, made_up = random_scores(12, seed=1), torch.ones(1, VOCAB)
    prompt, text = [3], [4, 5, 4, 5, 4, 5, 4, 5, 4, 6, 4]
    plain = feed(SelfReinforcementCapLogitsProcessor(0.5, 1), [prompt], [text], scores)
    cap = SelfReinforcementCapLogitsProcessor(0.5, 1)
    ids = torch.tensor([prompt + text])
    for step in range(len(text)):
        draft = torch.cat([ids[:, : step + 1], torch.tensor([[4, 5, 7, 4, 5]])], 1)
        for length in range(step + 1, step + 7):
            cap(draft[:, :length], made_up)
        out = cap(ids[:, : step + 1], scores[step]).softmax(-1)
        torch.testing.assert_close(out, plain[step])
        for length in range(step + 2, step + 7):  # the model scores the rest of the draft, to no avail
            cap(draft[:, :length], scores[-1])


def test_drafts_are_remembered_up_to_a_limit():
    cap = SelfReinforcementCapLogitsProcessor(0.5, 1)
    ids = torch.randint(0, VOCAB, (1, 400), generator=torch.Generator().manual_seed(0))
    for length in range(1, 400):
        cap(ids[:, :length], random_scores(1)[0])
    assert len(cap._scored) == 130
    cap = SelfReinforcementCapLogitsProcessor(0.5, 1)
    for length in range(1, 40):
        cap(ids[:, :length].expand(2, -1), random_scores(1, rows=2)[0])
    assert len(cap._scored) == 1  # no drafts in batches
