"""The wrapper's side only: what reaches mauve-text, and what is said when it is missing."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.generation.tiny_llama import tiny_llama
from undersong.metrics.mauve import mauve_score


class Letters:
    def __call__(self, text, truncation, max_length, return_tensors):
        assert (truncation, return_tensors) == (True, "pt")
        return {"input_ids": torch.tensor([[ord(c) - 90 for c in text[:max_length]]])}


@pytest.fixture
def calls(monkeypatch):
    """Stands in for mauve-text and records its arguments."""
    seen = []
    fake = SimpleNamespace(compute_mauve=lambda **arguments: seen.append(arguments) or SimpleNamespace(mauve=0.25))
    monkeypatch.setitem(sys.modules, "mauve", fake)
    return seen


def test_texts_are_handed_on(calls):
    assert mauve_score(["a", "b"], ["c", "d"], max_length=64, num_buckets=2) == 0.25
    assert calls == [
        {"p_text": ["a", "b"], "q_text": ["c", "d"], "max_text_length": 64, "verbose": False, "num_buckets": 2}
    ]


def test_a_model_embeds_the_last_token_of_the_shortened_text(calls):
    model = tiny_llama()
    assert mauve_score(["abcd", "b"], ["dcba"], model, Letters(), max_length=3, seed=1) == 0.25
    (arguments,) = calls
    assert arguments["seed"] == 1
    with torch.no_grad():
        states = [model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([7, 8, 9], [8], [10, 9, 8])]
    torch.testing.assert_close(torch.from_numpy(arguments["p_features"]), torch.stack(states[:2]))
    torch.testing.assert_close(torch.from_numpy(arguments["q_features"]), torch.stack(states[2:]))


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match=r"MAUVE needs mauve-text; pip install 'undersong\[mauve\]'"):
        mauve_score(["a"], ["b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["a"]), "texts must hold at least one text"),
        ((["a"], []), "references must hold at least one text"),
        ((["a", " \n"], ["a"]), r"texts\[1\] \(' \\n'\) must hold a word"),
        ((["a"], ["a"], "model"), "model and tokenizer must be given together"),
    ],
)
def test_empty_texts_and_half_a_model_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mauve_score(*arguments)
