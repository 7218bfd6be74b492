"""The curves are means over copies of one teacher-forced pass; a model that copies wins every repeated token."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.generation.tiny_llama import tiny_llama
from undersong.metrics.self_reinforcement import plot_self_reinforcement, self_reinforcement

VOCAB = 32


class Copier(torch.nn.Module):
    """Predicts, with probability 0.9, the token that followed the latest earlier occurrence of the current one."""

    def __init__(self, context=None):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        config = SimpleNamespace(max_position_embeddings=context)
        self.config = SimpleNamespace(get_text_config=lambda: config)

    def forward(self, input_ids, attention_mask):
        p = torch.full((*input_ids.shape, VOCAB), 1 / VOCAB)
        for row, ids in enumerate(input_ids.tolist()):
            follows = {}
            for t, token in enumerate(ids):
                if t:
                    follows[ids[t - 1]] = token
                if token in follows:
                    p[row, t] = 0.1 / (VOCAB - 1)
                    p[row, t, follows[token]] = 0.9
        return SimpleNamespace(logits=p.log())


def test_a_copying_model_wins_every_repeated_token():
    curves = self_reinforcement(Copier(), None, [[5, 6, 7, 8], [9, 10, 11, 12]], [[1, 2]], max_repeats=6)
    assert curves["tp"][0] == pytest.approx(1 / VOCAB)
    # nothing has followed the sentence's last token before the second copy: its first token cannot be known
    assert curves["tp"][1] == pytest.approx((1 / VOCAB + 3 * 0.9) / 4)
    assert curves["wr"][1] == curves["ip"][1] == 3 / 4
    assert curves["tp"][2:] == pytest.approx([0.9] * 5)
    assert curves["wr"][2:] == curves["ip"][2:] == [1.0] * 5
    assert curves["positions"]["first"]["wr"] == [0.0, 0.0] + [1.0] * 5
    assert curves["positions"]["middle"]["wr"] == curves["positions"]["end"]["wr"] == [0.0] + [1.0] * 6


def test_means_are_those_of_single_forward_passes():
    model = tiny_llama(VOCAB)
    sentences, prefixes = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 4]], [[1, 2], [3]]
    curves = self_reinforcement(model, None, sentences, prefixes, max_repeats=3, batch_size=2)
    p, first, won = ([[] for _ in range(4)] for _ in range(3))
    for sentence, prefix in zip(sentences, [[1, 2], [3], [1, 2]], strict=True):
        ids = torch.tensor([prefix + sentence * 4])
        with torch.no_grad():
            probabilities = model(ids).logits[0].softmax(-1)
        for n in range(4):
            for i in range(len(sentence)):
                at = len(prefix) + n * len(sentence) + i
                p[n].append(probabilities[at - 1, ids[0, at]].item())
                first[n].append(probabilities[at - 1 - n * len(sentence), ids[0, at]].item())
                won[n].append(float(probabilities[at - 1].argmax() == ids[0, at]))
    assert curves["tp"] == pytest.approx([sum(x) / 10 for x in p], rel=1e-4)
    assert curves["wr"] == pytest.approx([sum(x) / 10 for x in won])
    above = [sum(a > b for a, b in zip(x, y, strict=True)) / 10 for x, y in zip(p, first, strict=True)]
    assert curves["ip"] == pytest.approx(above)


def test_copies_end_with_the_models_context():
    # 2 tokens of prefix and 30 positions: 7 copies of 4 tokens, 3 of 9
    curves = self_reinforcement(Copier(context=30), None, [[5, 6, 7, 8], list(range(10, 19))], [[1, 2]], max_repeats=8)
    assert curves["sentences"] == [2, 2, 2, 1, 1, 1, 1, 0, 0]
    assert math.isnan(curves["tp"][7])
    assert curves["wr"][2:7] == [1.0] * 5


def test_words_have_a_first_token_only():
    curves = self_reinforcement(Copier(), None, [[5]], [[1, 2]], max_repeats=2)
    assert curves["positions"]["first"]["tp"] == curves["tp"]
    assert all(math.isnan(x) for place in ("middle", "end") for x in curves["positions"][place]["tp"])


def test_texts_are_joined_as_in_running_text():
    calls = []

    def tokenizer(text, add_special_tokens=True):
        calls.append((text, add_special_tokens))
        return {"input_ids": [1] * add_special_tokens + [5, 6]}

    self_reinforcement(Copier(), tokenizer, ["It rains. "], ["Once"], max_repeats=1)
    assert sorted(calls) == [(" It rains.", False), ("Once", True)]


@pytest.mark.parametrize("several", [False, True])
def test_plot_draws_every_curve(tmp_path, several):
    curves = self_reinforcement(tiny_llama(VOCAB), None, [[5, 6, 7]], [[1, 2]], max_repeats=3)
    path = tmp_path / "plot.png"
    figure = plot_self_reinforcement({"before": curves, "after": curves} if several else curves, path)
    assert path.read_bytes()[1:4] == b"PNG"
    assert len(figure.axes) == 3
    for axes, measure in zip(figure.axes, ("tp", "ip", "wr"), strict=True):
        assert len(axes.lines) == 4 * (1 + several)
        assert list(axes.lines[0].get_ydata()) == curves[measure]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_repeats": 0}, r"max_repeats \(0\) must be at least 1"),
        ({"sentences": []}, r"sentences \(0\) and prefixes \(1\) must not be empty"),
        ({"prefixes": []}, r"sentences \(1\) and prefixes \(0\) must not be empty"),
        ({"prefixes": [[]]}, r"sentences\[0\] \(\[5, 6\]\) and its prefix \(\[\]\) must have a token each"),
        ({"sentences": [[]]}, r"sentences\[0\] \(\[\]\) and its prefix \(\[1\]\) must have a token each"),
        (
            {"sentences": [[5] * 20]},
            r"sentences\[0\] \(20 tokens after 1 of its prefix\) must fit twice into the model's context of 40 tokens",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        self_reinforcement(Copier(40), None, **{"sentences": [[5, 6]], "prefixes": [[1]]} | arguments)
