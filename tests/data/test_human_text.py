import re

import pytest

from undersong.data.human_text import fingerprint, human_text, split


def test_paragraphs_are_prose_once_each_and_always_the_same():
    text = human_text()
    assert text == human_text()
    assert len(set(text)) == len(text) > 2000
    assert sum(len(p.split()) for p in text) > 80_000
    for paragraph in text:
        assert paragraph[0].isupper()
        assert paragraph[-1] in ".!?"
        assert "\n" not in paragraph
        assert not re.search(r">>>|::=| \|", paragraph)
        letters = sum(c.isalpha() or c in " '’-,.;:!?\"" for c in paragraph)
        assert letters > 0.85 * len(paragraph), paragraph


def test_a_caller_cannot_spoil_the_next_ones_text():
    human_text().clear()
    assert human_text()


def test_split_shares_nothing_and_loses_nothing():
    text = human_text()
    train, held_out = split(text)
    assert sorted(train + held_out) == sorted(text)
    assert not set(train) & set(held_out)
    assert len(held_out) / len(text) == pytest.approx(0.2, abs=0.01)
    assert held_out[:8] == text[32:40]  # whole blocks of neighbours


@pytest.mark.parametrize(
    ("paragraphs", "held_out", "message"),
    [
        (100, 1, r"held_out \(1\) must be at least 2"),
        (32, 5, r"paragraphs \(32\) must be more than 32 to hold out one block of 5"),
    ],
)
def test_impossible_splits_are_refused(paragraphs, held_out, message):
    with pytest.raises(ValueError, match=message):
        split(["A."] * paragraphs, held_out)


def test_fingerprint_sees_paragraph_borders():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
