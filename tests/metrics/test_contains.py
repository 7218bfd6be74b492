"""Hand-computed values; the `evaluate` module gives the functions' figures and needs nothing of undersong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undersong.hub.local_hub import LocalHub
from undersong.metrics.contains import measures
from undersong.metrics.contains.measures import contains, contains_score

FOLDER = Path(measures.__file__).parent
FILES = ("contains", "measures")  # what a Hub repository of the metric holds


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The applicant is Birk Medical.", "birk medical", True),
        ("BIRK MEDICAL", ["Lund", "Birk Medical"], True),
        ("Birk", "Birk Medical", False),
        ("", "x", False),
        ("costs 3x5", "3.5", False),  # a point is a point
        ("costs 3.5 (net)", "3.5 (NET)", True),
        ("a+b", "a+b", True),
        ("aab", "a+b", False),
        ("C:\\temp [1]", ["\\d", "[0-9]"], False),
        ("C:\\temp [1]", "\\TEMP [1", True),
        ("STRASSE", "straße", True),
    ],
)
def test_contains(prediction, references, expected):
    assert contains(prediction, references) is expected


@given(st.text(), st.text(min_size=1), st.text())
def test_a_value_is_found_wherever_it_stands(before, value, after):
    assert contains(before + value + after, ["\0 no such thing", value])


def test_score_is_the_mean_over_documents():
    assert contains_score(["a plum", "a fig", "x", "y"], [["Plum"], "FIG", ["a", "b"], "z"]) == 0.5
    assert contains_score(iter(["ab"]), iter([("c", "B")])) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contains("a", []), r"references \(\[\]\) must hold values of at least 1 character"),
        (lambda: contains("a", ["b", ""]), r"references \(\['b', ''\]\)"),
        (lambda: contains("a", ""), r"references \(\[''\]\)"),
        (lambda: contains_score(["a"], ["a", "b"]), r"predictions \(1\) and references \(2\) must be equally many"),
        (lambda: contains_score([], []), "predictions must hold at least one text"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MODULE = """
import json, sys
import evaluate
metric = evaluate.load(sys.argv[1])
texts, golds = ["a plum", "a fig"], (["Plum", "pear"], [["fig", "PLUM"], ["x"]])
out = [metric.compute(predictions=texts, references=gold) for gold in golds]
assert not any(name.partition(".")[0] == "undersong" for name in sys.modules)
print(json.dumps(out))
"""


@pytest.mark.parametrize("origin", ["folder", "hub"])
def test_evaluate_module_needs_nothing_of_undersong(origin, tmp_path):
    with LocalHub() as hub:
        hub.create("spaces", "org/contains")
        hub.commit("spaces", "org/contains", {f"{name}.py": (FOLDER / f"{name}.py").read_bytes() for name in FILES})
        env = hub.env(home=tmp_path)
        path = FOLDER if origin == "folder" else "org/contains"
        run = subprocess.run([sys.executable, "-c", MODULE, path], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == [{"contains": 0.5}, {"contains": 0.5}]
