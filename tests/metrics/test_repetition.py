"""Hand-computed values; the `evaluate` module gives the functions' figures and needs nothing of undersong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.hub.local_hub import LocalHub
from undersong.metrics import rep_l, rep_n, rep_sen, repetition_scores
from undersong.metrics.repetition import measures

FOLDER = Path(measures.__file__).parent
FILES = ("repetition", "measures")  # what a Hub repository of the metric holds
TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=40)


@pytest.mark.parametrize(("n", "expected"), [(1, 5 / 9), (2, 4 / 8), (3, 3 / 7), (4, 2 / 6), (9, 0.0), (10, 0.0)])
def test_rep_n_by_hand(n, expected):
    # 4-grams of abcabcabd: abca bcab cabc abca bcab cabd, 4 distinct of 6
    assert rep_n("abcabcabd", n) == expected


@pytest.mark.parametrize(("length", "expected"), [(1, 1 / 7), (2, 2 / 7), (3, 3 / 7), (6, 4 / 7), (100, 4 / 7)])
def test_rep_l_by_hand(length, expected):
    # a b b c b a a: distances to the same token before: b 1, b 2, a 5, a 1
    distances = [1, 2, 5, 1]
    assert rep_l("abbcbaa", length) == sum(d <= length for d in distances) / 7
    assert rep_l("abcabca", 3) == 4 / 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rains. It rains. We wait. It rains.", 2 / 4),
        ("Why? Why? No!\nNo!", 2 / 4),
        ("Version 2.5 is out. Version 2.5 is out.", 1 / 2),  # a point inside a number ends nothing
        ('He said "no." He said "no."', 1 / 2),
        ("雨です。雨です。終わり。", 1 / 3),
        ("no punctuation at all", 0.0),
        (["one", "two", "one"], 1 / 3),
    ],
)
def test_rep_sen_by_hand(text, expected):
    assert rep_sen(text) == expected


@given(TOKENS, st.integers(1, 6))
def test_measures_are_shares_and_doubling_a_text_raises_them(tokens, n):
    for measure in (rep_n, rep_l):
        assert 0 <= measure(tokens, n) < 1
    assert rep_n(tokens * 2, n) >= rep_n(tokens, n)
    assert rep_n(tokens, 1) == pytest.approx(rep_l(tokens, len(tokens)))


def test_scores_are_means_over_texts():
    scores = repetition_scores([[1, 1], [1, 2]], ngrams=[1], lengths=[1, 2])
    assert scores == {"rep_1": 0.25, "rep_l_1": 0.25, "rep_l_2": 0.25, "rep_l": 0.25}


def test_texts_are_split_into_words_and_punctuation_or_by_the_tokenizer():
    assert repetition_scores(["Yes, yes, yes."], ngrams=[1])["rep_1"] == 2 / 6
    assert repetition_scores(["a-b-a"], tokenizer=list, ngrams=[1])["rep_1"] == 2 / 5

    class Tokenizer:
        convert_tokens_to_ids = None

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [0] * add_special_tokens + text.split()}

    assert repetition_scores(["0 1"], tokenizer=Tokenizer(), ngrams=[1])["rep_1"] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rep_n([]), "tokens must not be empty"),
        (lambda: rep_l("", 3), "tokens must not be empty"),
        (lambda: rep_sen(" \n "), "tokens must not be empty"),
        (lambda: rep_n([1], n=0), r"n \(0\) must be at least 1"),
        (lambda: rep_l([1], length=-2), r"length \(-2\) must be at least 1"),
        (lambda: repetition_scores(["a", "  "]), r"texts\[1\] \('  '\) must hold a token"),
        (lambda: repetition_scores([]), "texts must hold at least one text"),
    ],
)
def test_empty_texts_and_wrong_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MODULE = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
text = "It rains. It rains. We wait. It rains."
ids = [[1, 2, 1, 2, 1, 2], [3, 4, 5]]
out = [metric.compute(predictions=x) for x in ([text], ids)] + [metric.compute(predictions=ids, ngrams=[2])]
assert not any(name.partition(".")[0] == "undersong" for name in sys.modules)
print(json.dumps(out))
"""


@pytest.mark.parametrize("origin", ["folder", "hub"])
def test_evaluate_module_needs_nothing_of_undersong(origin, tmp_path):
    with LocalHub() as hub:
        hub.create("spaces", "org/repetition")
        hub.commit("spaces", "org/repetition", {f"{name}.py": (FOLDER / f"{name}.py").read_bytes() for name in FILES})
        env = hub.env(home=tmp_path)
        path = FOLDER if origin == "folder" else "org/repetition"
        run = subprocess.run([sys.executable, "-c", MODULE, path], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    texts, ids, bigrams = json.loads(run.stdout.splitlines()[-1])
    assert texts == repetition_scores(["It rains. It rains. We wait. It rains."])
    assert ids == repetition_scores([[1, 2, 1, 2, 1, 2], [3, 4, 5]])
    assert bigrams["rep_2"] == pytest.approx(0.3)
    assert "rep_sen" not in ids
