"""The loader reads what is there and names what is not; synthetic prompts are correct code that ends in a loop."""

import ast
import json

import pytest

from undersong.data.code_repeteval import SCENARIOS, load_code_repeteval, make_synthetic
from undersong.generation.grammar_units import GrammarUnits
from undersong.generation.periods import best_period


def write(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "\n")
    return path


def test_a_file_is_read_line_by_line(tmp_path):
    entries = [{"prompt": "x = 1", "samples": ["y", "z"]}, {"prompt": "é"}, {"prompt": "p", "samples": "s"}]
    path = write(tmp_path / "a.jsonl", *entries)
    assert load_code_repeteval(path) == [
        {"prompt": "x = 1", "samples": ["y", "z"]},
        {"prompt": "é", "samples": []},
        {"prompt": "p", "samples": ["s"]},
    ]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("place", ["{}.jsonl", "{}/data.jsonl", "deep/{}_512.jsonl"])
def test_a_folder_holds_a_file_per_scenario(tmp_path, scenario, place):
    for name in SCENARIOS:
        write(tmp_path / place.format(name), {"prompt": name})
    assert load_code_repeteval(tmp_path, scenario) == [{"prompt": scenario, "samples": []}]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"scenario \('Real'\) must be one of ArtificialSynthesis, CodeGeneration"):
        load_code_repeteval(tmp_path, "Real")
    with pytest.raises(ValueError, match="is a folder; name a scenario, one of ArtificialSynthesis"):
        load_code_repeteval(tmp_path)
    with pytest.raises(FileNotFoundError, match="no jsonl file for ArtificialSynthesis under"):
        load_code_repeteval(tmp_path, "ArtificialSynthesis")
    with pytest.raises(FileNotFoundError):
        load_code_repeteval(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 must be an object with a text 'prompt'"):
        load_code_repeteval(write(tmp_path / "a.jsonl", {"prompt": "x"}, {"samples": []}))
    with pytest.raises(ValueError, match=r"n \(0\) must be at least 1"):
        make_synthetic(n=0)


EXAMPLES = make_synthetic(seed=3, n=60)


def test_the_same_seed_gives_the_same_prompts():
    assert make_synthetic(seed=3, n=60) == EXAMPLES
    assert make_synthetic(seed=4, n=60) != EXAMPLES
    assert make_synthetic(seed=3, n=5) == EXAMPLES[:5]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example["template"])
def test_the_pattern_is_repeated_five_to_ten_times(example):
    assert 6 <= example["repeats"] <= 11
    units = GrammarUnits("python")
    units.update((example["prompt"] + "\n").encode())
    found = [best_period(place.last.runs, 3) for place in units.places()]
    assert any(pattern is not None and pattern[1] >= example["repeats"] - 1 for pattern in found)


@pytest.mark.parametrize("example", EXAMPLES[:24], ids=lambda example: example["template"])
def test_prompts_are_the_beginning_of_correct_code(example):
    prompt = example["prompt"]
    closers = ("", "\n}", "\n]", "\n    return None")
    assert any(_parses(prompt + closer) for closer in closers)
    assert not prompt.endswith("\n")


def test_templates_are_varied():
    assert len({example["template"] for example in EXAMPLES}) >= 10
    assert len({example["prompt"] for example in EXAMPLES}) == len(EXAMPLES)


def _parses(code):
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
