"""Against float64 sums over single texts: batching, padding, contexts, windows; distributions made by hand."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.generation.tiny_llama import tiny_llama
from undersong.metrics.epsilon_gap import measures
from undersong.metrics.epsilon_gap.measures import epsilon_gap_scores, token_information

from .evaluate_module import compute

LOOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums against float64


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (5, 30, 2, 17, 30, 9)]


@torch.no_grad()
def by_hand(model, ids, start):
    p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    entropy = [sum(-q * math.log(q) for q in p[t - 1].tolist()) for t in range(start, len(ids))]
    information = [-math.log(p[t - 1, ids[t]]) for t in range(start, len(ids))]
    return torch.tensor([entropy, information], dtype=torch.float64)


def toy(distribution):
    """A model that predicts the same distribution everywhere."""

    def forward(input_ids, **_):
        logits = torch.tensor(distribution).log()
        return SimpleNamespace(logits=logits.expand(*input_ids.shape, len(distribution)))

    forward.config, forward.device = SimpleNamespace(max_position_embeddings=64), "cpu"
    return forward


def test_hand_made_distributions():
    half = toy([0.5, 0.25, 0.25, 0.0])  # 1.5 bits; an impossible token adds nothing
    bit = math.log(2)
    scores = epsilon_gap_scores([[0, 0, 1], [2, 1]], half)  # 1, 2, 2 bits
    assert scores == {
        "epsilon_gap": pytest.approx(bit / 2), "nll": pytest.approx(5 / 3 * bit),
        "entropy": pytest.approx(1.5 * bit), "tokens": 3,
    }  # fmt: skip
    uniform = epsilon_gap_scores([[0, 1, 2, 3]], toy([0.25] * 4))  # every token is exactly as informative as expected
    assert uniform["epsilon_gap"] == pytest.approx(0, abs=1e-6)
    assert uniform["nll"] == pytest.approx(2 * bit)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_token_as_in_its_text_alone(model, texts, batch_size):
    for ids, got in zip(texts, token_information(texts, model, batch_size=batch_size), strict=True):
        assert got.shape == (2, len(ids) - 1)
        torch.testing.assert_close(got.double(), by_hand(model, ids, 1), **LOOSE)


def test_contexts_are_read_and_not_scored(model, texts):
    contexts = [[7, 8, 9], [], [5], [4] * 10, [11, 12], [60]]
    for context, ids, got in zip(contexts, texts, token_information(texts, model, contexts=contexts), strict=True):
        start = max(1, len(context))
        torch.testing.assert_close(got.double(), by_hand(model, context + ids, start), **LOOSE)


@pytest.mark.parametrize(
    ("max_length", "stride", "context"), [(8, 3, 0), (8, 7, 2), (10, None, 14), (2, 1, 1), (29, 5, 0)]
)
def test_long_texts_are_read_in_windows(model, texts, max_length, stride, context):
    contexts = [[6] * context] * len(texts)
    got = token_information(texts, model, contexts=contexts, max_length=max_length, stride=stride, batch_size=3)
    step = stride or max_length // 2
    for ids, values in zip(texts, got, strict=True):
        ids, first = [6] * context + ids, max(1, context)
        expected = []
        while first < len(ids):  # a window ends after `step` tokens, or is the full first one
            end = min(len(ids), max(max_length, first + step))
            begin = max(0, end - max_length)
            assert first - begin >= min(first, max_length - step)
            expected.append(by_hand(model, ids[begin:end], first - begin))
            first = end
        torch.testing.assert_close(values.double(), torch.cat(expected, 1), **LOOSE)


def test_windows_change_nothing_when_the_text_fits(model, texts):
    whole = epsilon_gap_scores(texts, model)
    assert epsilon_gap_scores(texts, model, max_length=30, stride=1) == whole
    assert epsilon_gap_scores(texts, model, max_length=29, stride=1) != whole


def test_summary_is_over_tokens_not_texts(model, texts):
    entropy, information = torch.cat([by_hand(model, ids, 1) for ids in texts], 1)
    scores = epsilon_gap_scores(texts, model)
    assert scores["epsilon_gap"] == pytest.approx((entropy - information).abs().mean().item(), abs=1e-4)
    assert scores["nll"] == pytest.approx(information.mean().item(), abs=1e-4)
    assert scores["entropy"] == pytest.approx(entropy.mean().item(), abs=1e-4)
    assert scores["tokens"] == sum(len(ids) - 1 for ids in texts)


class Letters:
    """Letters to ids; puts id 1 before what is encoded with special tokens, as Gemma's tokenizer does."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [ord(c) - 90 for c in text]}


def test_strings_begin_with_what_the_tokenizer_puts_first(model):
    ids = Letters()("abc", add_special_tokens=False)["input_ids"]
    (alone,) = token_information(["abc"], model, Letters())
    torch.testing.assert_close(alone.double(), by_hand(model, [1, *ids], 1), **LOOSE)
    (after,) = token_information(["c"], model, Letters(), contexts=["ab"])
    torch.testing.assert_close(after, alone[:, 2:])


def test_bfloat16_logits_are_summed_in_float32(texts):
    half = tiny_llama().bfloat16()
    for ids, got in zip(texts, token_information(texts, half, batch_size=1), strict=True):
        torch.testing.assert_close(got.double(), by_hand(half, ids, 1), **LOOSE)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "texts must hold at least one text"),
        ([[3, 4], []], {}, r"texts\[1\] \(\[\]\) must hold a token that has another one before it"),
        ([[3]], {}, r"texts\[0\] \(\[3\]\) must hold a token that has another one before it"),
        ([[]], {"contexts": [[3, 4]]}, r"texts\[0\] \(\[\]\) must hold a token"),
        (["", "ab"], {"tokenizer": Letters()}, r"texts\[0\] \(''\) must hold a token"),
        (["ab"], {}, r"tokenizer \(None\) must be the model's tokenizer"),
        ([[3, 4]], {"contexts": ["ab"]}, r"tokenizer \(None\) must be the model's tokenizer"),
        ([[3, 4]], {"contexts": [[1], [2]]}, r"contexts \(2 of them\) must be as many as texts \(1\)"),
        ([[3, 4]], {"max_length": 1}, r"max_length \(1\) must be at least 2"),
        ([[3, 4]], {"max_length": 8, "stride": 8}, r"stride \(8\) must lie in \[1, max_length - 1 = 7\]"),
        ([[3, 4]], {"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, texts, options, message):
    with pytest.raises(ValueError, match=message):
        epsilon_gap_scores(texts, model, **options)


SETUP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
extra = {"model": LlamaForCausalLM(LlamaConfig(**sizes)).eval()}
"""


def test_evaluate_module_stands_alone(tmp_path):
    space = {}
    exec(SETUP, space)
    ids = [[1, 2, 3, 4], [5, 6]]
    calls = [{"predictions": ids}, {"predictions": ids, "contexts": [[7], [8, 9]], "batch_size": 1}]
    out = compute(Path(measures.__file__).parent, calls, tmp_path, SETUP)
    model = space["extra"]["model"]
    expected = [epsilon_gap_scores(ids, model), epsilon_gap_scores(ids, model, contexts=[[7], [8, 9]], batch_size=1)]
    assert out == [pytest.approx(scores, abs=1e-6) for scores in expected]
