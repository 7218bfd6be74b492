"""Hand-computed values; the `evaluate` module gives the functions' figures and needs undersong for grammars only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.metrics.code_repetition import measures
from undersong.metrics.code_repetition.measures import (
    ccp,
    code_repetition_scores,
    egp,
    rep_r,
    rep_w,
    sr_rate,
    tr_n,
    tr_s,
)

FOLDER = Path(measures.__file__).parent
TOKENS = st.lists(st.integers(0, 4), max_size=30)


@pytest.mark.parametrize(("n", "expected"), [(2, (2 + 1) / (6 + 4)), (3, (1 + 0) / (5 + 3)), (4, 0.0), (9, 0.0)])
def test_tr_n_by_hand_is_summed_over_codes(n, expected):
    # x = 1 ; x = 1 has the pairs x= =1 1; ;x x= =1 and the triples x=1 =1; 1;x ;x= x=1; y.a.a the pairs y. .a a. .a
    assert tr_n(["x = 1; x = 1", "y.a.a"], n) == pytest.approx(expected)


def test_tr_n_with_other_tokens():
    assert tr_n(["abab"], 1, tokenize=list) == 0.5


def test_tr_s_by_hand_ignores_blank_lines_and_indentation():
    assert tr_s(["if x:\n    y()\ny()\n\n\ny()\n", "z\n"]) == 2 / 5


@pytest.mark.parametrize(("width", "expected"), [(1, 1 / 7), (2, 2 / 7), (4, 2 / 7), (5, 4 / 7), (16, 4 / 7)])
def test_rep_w_by_hand(width, expected):
    # a b b c b a a: distances to the same token before: b 1, b 2, a 5, a 1
    distances = [1, 2, 5, 1]
    assert rep_w("abbcbaa", width) == sum(d <= width for d in distances) / 7
    assert rep_w("abcdabc", width) == (3 / 7 if width >= 4 else 0)


@pytest.mark.parametrize(
    ("tokens", "expected"), [("abcab", 4 / 5), ("abcd", 0), ("aaaa", 1), ("abxbay", 0), ("abxaby", 4 / 6), ("", 0)]
)
def test_rep_r_by_hand(tokens, expected):
    assert rep_r(tokens) == expected


@given(TOKENS)
def test_rep_r_is_the_share_of_tokens_with_a_recurring_neighbourhood(tokens):
    def recurs(i):
        others = [j for j in range(len(tokens)) if j != i and tokens[j] == tokens[i]]
        after = any(tokens[i + 1 : i + 2] == tokens[j + 1 : j + 2] != [] for j in others)
        before = i > 0 and any(j > 0 and tokens[i - 1] == tokens[j - 1] for j in others)
        return after or before

    assert rep_r(tokens) == (sum(map(recurs, range(len(tokens)))) / len(tokens) if tokens else 0)


@pytest.mark.parametrize(
    ("code", "language", "parses"),
    [
        ("x = [1, 2]\n", "python", True),
        ("return 1\n", "python", False),  # compile() knows that it stands outside a function
        ("x = '\\d' is 'd'\n", "python", True),  # warnings are no errors
        ("x = 1\0", "python", False),
        ("(" * 500, "python", False),
        ("let x = [1];\n", "javascript", True),
        ("let x = [1;\n", "javascript", False),
        ("class A { int f() { return 1; } }\n", "java", True),
        ("class A { int f() { return 1; }\n", "java", False),
        ("int f(void) { return 1; }\n", "c", True),
        ("auto f = [](int x) { return x; };\n", "cpp", True),
        ("package main\nfunc f() int {\n\treturn 1\n}\n", "go", True),
        ("fn f() -> i32 { 1 }\n", "rust", True),
        ("fn f( -> i32 { 1 }\n", "rust", False),
    ],
)
def test_ccp_is_about_parsing(code, language, parses):
    assert ccp([code], language) == parses


def test_ccp_and_egp_are_shares():
    assert ccp(["x", "x +", "y", "z"]) == 3 / 4
    assert egp([True, False, False, True, True]) == 3 / 5


def test_sr_rate_by_hand():
    loop = "".join(f"x{i} = {i}\n" for i in range(6))
    assert sr_rate([loop]) == 4 / 6  # the third to the sixth assignment
    assert sr_rate([loop, "f(x)\ny = g\n"]) == 4 / 8
    assert sr_rate(["".join(f"f({i})\nx = {i}\n" for i in range(3))]) == 1 / 6  # the third pair is complete at its end
    assert sr_rate(["y = 7\n"], prompts=[loop]) == 1
    assert sr_rate(["y()\n"], prompts=[loop]) == 0
    assert sr_rate([loop], min_repeats=6) == 1 / 6
    assert sr_rate([""]) == 0
    assert sr_rate(["".join(f"  v.push({i});\n" for i in range(4))], "cpp") == 2 / 4


def test_scores_gather_all_measures():
    codes, ended = ["a = 1\na = 1\na = 1\n", "f(x"], [True, False]
    assert code_repetition_scores(codes, ended) == {
        "tr_2": tr_n(codes, 2),
        "tr_3": tr_n(codes, 3),
        "tr_4": tr_n(codes, 4),
        "tr_s": 2 / 4,
        "rep_w": (6 / 9 + 0) / 2,
        "rep_r": (1 + 0) / 2,
        "ccp": 1 / 2,
        "sr_rate": sr_rate(codes),
        "egp": 1 / 2,
    }
    assert {"sr_rate", "egp", "tr_2"}.isdisjoint(code_repetition_scores(codes, ngrams=[3], units=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tr_n([]), "codes must hold at least one entry"),
        (lambda: tr_s([]), "codes must hold at least one entry"),
        (lambda: egp([]), "codes must hold at least one entry"),
        (lambda: tr_n(["x"], 0), r"n \(0\) must be at least 1"),
        (lambda: rep_w("x", -2), r"width \(-2\) must be at least 1"),
        (lambda: sr_rate(["x"], min_repeats=1), r"min_repeats \(1\) must be at least 2"),
        (lambda: sr_rate(["x"], prompts=[]), "prompts has 0 entries but there are 1 codes"),
        (lambda: ccp(["x"], "cobol"), r"language \('cobol'\) must be one of python"),
        (lambda: code_repetition_scores(["x", "y"], ended=[True]), "ended has 1 entries but there are 2 codes"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MODULE = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
codes = ["a = 1\\na = 1\\n", "f(x"]
out = [metric.compute(predictions=codes, ended=[True, False], units=False)]
assert not any(name.partition(".")[0] == "undersong" for name in sys.modules)
out.append(metric.compute(predictions=codes))
print(json.dumps(out))
"""


def test_evaluate_module_gives_the_figures_of_the_functions(tmp_path):
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", MODULE, str(FOLDER)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    codes = ["a = 1\na = 1\n", "f(x"]
    alone, full = json.loads(run.stdout.splitlines()[-1])
    assert alone == code_repetition_scores(codes, ended=[True, False], units=False)
    assert full == code_repetition_scores(codes)
