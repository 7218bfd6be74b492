"""Exact prompts of every task, cutting, loading, and made-up documents that hold what is asked."""

import builtins
import json
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undersong.data.key_value import FORMS, KeyValueTask
from undersong.data.recall import TASKS, cut_context, load_recall, recall_answers, recall_prompt, report_records

FDA = {
    "text": "\nSummary.\nThe device is K1. purpose for submission:",
    "key": "purpose for submission",
    "value": "new",
}
SWDE = {
    "text": "Film page. Director: Ann.\nSummary of information above...\n director: Summary of information above...",
    "key": "director",
    "value": "Ann",
}
SQUAD = {
    "text": "Plums are red. Figs are green. Question: What are figs? Answer: Figs are \n",
    "context": "Plums are red. Figs are green. Question: What are figs?",
    "question": "What are figs?",
    "value": "green",
}
QA = {
    "context": " Plums are red.. \n",
    "question": "The colour of plums is",
    "orig_question": "What colour are plums:",
    "answers": ["red", "crimson"],
}
PROMPTS = {  # task -> record, read once, read twice
    "fda": (
        FDA,
        "Summary.\nThe device is K1. Purpose for submission:",
        "Information about Purpose for submission. Summary.\nThe device is K1.\n"
        "Summary.\nThe device is K1. Purpose for submission:",
    ),
    "swde": (
        SWDE,
        "Film page. Director: Ann. Director:",
        "Information about Director. Film page. Director: Ann.\nFilm page. Director: Ann. Director:",
    ),
    "squad": (
        SQUAD,
        "Plums are red. Figs are green. Question: What are figs? Answer: Figs are",
        "What are figs? Plums are red. Figs are green. \n"
        "Plums are red. Figs are green. Question: What are figs? Answer: Figs are",
    ),
    **dict.fromkeys(
        ("nq_512", "nq_1024", "nq_2048", "triviaqa", "drop"),
        (
            QA,
            "Plums are red. The colour of plums is",
            "What colour are plums Plums are red.\nPlums are red. The colour of plums is",
        ),
    ),
}


def test_every_task_is_listed_below():
    assert PROMPTS.keys() == TASKS.keys()


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts(task):
    record, once, twice = PROMPTS[task]
    before = dict(record)
    assert recall_prompt(task, record) == once
    assert recall_prompt(task, record, times=2) == twice
    assert record == before


def test_three_copies():
    assert recall_prompt("fda", {"text": "A", "key": "k"}, times=3) == "Information about K. A.\nA.\nA. K:"
    record = SQUAD | {"context": "C. Question: Q?", "question": "Q?", "text": "C. Question: Q? C is"}
    assert recall_prompt("squad", record, times=3) == "Q? C. \nC. \nC. Question: Q? C is"


def test_a_question_without_an_original_asks_itself_first():
    record = {"context": "C", "question": "The x is", "answers": ["y"]}
    assert recall_prompt("drop", record, times=2) == "The x is C.\nC. The x is"


@pytest.mark.parametrize("ending", ["", " Key:", " key:", "\nKEY: Key:", " Key:Key:\n", ". Key:"])
def test_cues_at_the_end_are_taken_off_and_the_rest_kept(ending):
    assert recall_prompt("fda", {"text": f"Key: 3. End{ending}", "key": "key"}) == "Key: 3. End. Key:"


@pytest.mark.parametrize("task", ["fda", "swde"])
def test_prompting_a_prompt_changes_nothing(task):
    record = PROMPTS[task][0]
    once = recall_prompt(task, record)
    assert recall_prompt(task, record | {"text": once}) == once


def test_triviaqa_markers_are_removed():
    record = QA | {"context": "[DOC] [TLE] Fruit[PAR] Plums are red."}
    assert recall_prompt("triviaqa", record) == "Fruit Plums are red. The colour of plums is"


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"task \('fdb'\) must be one of fda, swde, squad"):
        recall_prompt("fdb", FDA)
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        recall_prompt("fda", FDA, times=0)
    with pytest.raises(ValueError, match=r"context_length \(512\) needs a tokenizer"):
        load_recall("fda", context_length=512)
    with pytest.raises(ValueError, match=r"context_length \(50\) must exceed answer_length \(50\).*562"):
        cut_context("a", "a", letters, 50)
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\nnot json\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 3: not a JSON object"):
        load_recall("fda", tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"fields \(25\) must lie in 1..24"):
        report_records(1, fields=25)


def letters(text, add_special_tokens, return_offsets_mapping):
    """A tokenizer of one token per letter."""
    return {"offset_mapping": [(i, i + 1) for i in range(len(text))]}


TEXT = "abcdefghijANSWERqrstuvwxyz"  # 26 tokens, the answer at 10


@pytest.mark.parametrize(
    ("length", "expected"),
    [(26 + 5, TEXT), (12 + 5, "efghijANSWER"), (13 + 5, "efghijANSWERq"), (4 + 5, "ijAN"), (24 + 5, TEXT[:24])],
)
def test_cut_keeps_half_the_budget_before_the_answer(length, expected):
    assert cut_context(TEXT, "answer", letters, length, answer_length=5) == expected


def test_cut_at_the_ends_and_without_the_answer():
    assert cut_context(TEXT, "a", letters, 9, 5) == "abcd"
    assert cut_context(TEXT, "yz", letters, 9, 5) == "wxyz"
    assert cut_context(TEXT, "missing", letters, 9, 5) == "abcd"


@given(st.text("ab ", min_size=1, max_size=60), st.integers(1, 70))
def test_cut_texts_are_pieces_of_the_right_length(text, budget):
    piece = cut_context(text, "b", letters, budget + 3, 3)
    assert piece in text
    assert len(piece) == min(budget, len(text))


def test_files_are_read_line_by_line_and_cut(tmp_path):
    path = tmp_path / "fda.jsonl"
    records = [
        {"text": TEXT + " Key:", "key": "key", "value": "ANSWER"},
        {"text": "short", "key": "key", "value": "s"},  # too short an answer to be told from chance
        {"text": "empty", "key": "key", "value": ""},
    ]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    assert load_recall("fda", path) == records
    cut = load_recall("fda", path, tokenizer=letters, context_length=17, answer_length=5)
    assert cut == [records[0] | {"text": "efghijANSWER"}]
    path.write_text(json.dumps(QA | {"context": TEXT, "answers": ["answer", "x"]}))
    cut = load_recall("nq_512", path, tokenizer=letters, context_length=9, answer_length=5)
    assert cut[0]["context"] == "ijAN"
    path.write_text(json.dumps(SQUAD))
    assert load_recall("squad", path, tokenizer=letters, context_length=9, answer_length=5) == [SQUAD]


def test_the_hub_is_asked_through_datasets(monkeypatch):
    asked = []
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, split: asked.append((name, split)) or [FDA]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_recall("fda", split="train") == [FDA]
    assert asked == [("hazyresearch/based-fda", "train")]


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"based_drop comes from the Hub .* pip install 'undersong\[metrics\]'"):
        load_recall("drop")


@pytest.mark.parametrize("fields", [1, 12, 24])
def test_reports_hold_their_values_and_ask_for_one(fields):
    records = report_records(20, fields=fields, filler=3, seed=5)
    assert records == report_records(20, fields=fields, filler=3, seed=5)
    assert records != report_records(20, fields=fields, filler=3, seed=6)
    for record in records:
        key = record["key"][0].upper() + record["key"][1:]
        assert f"{key}: {record['value']}" in record["text"]
        assert record["text"].count(f"{key}:") == 1
        assert record["text"].count(": ") == fields
        assert recall_answers(record) == [record["value"]]


@pytest.mark.parametrize("form", [*FORMS.values(), "QEDDQ"])
def test_key_value_documents_are_laid_out_as_named(form):
    task = KeyValueTask(pairs=3, keys=8, values=5)
    ids, labels = task.sample(form, batch=40, questions=2, generator=torch.Generator().manual_seed(0))
    again, _ = task.sample(form, batch=40, questions=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, again)
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        end = row[-6:]
        assert [end[0], end[3]] == [1, 1]
        asked = [(end[1], end[2]), (end[4], end[5])]
        parts, rest = [], row[:-6]
        for letter in form[:-1]:
            size = 2 if letter == "Q" else 6
            parts.append((letter, rest[:size]))
            assert rest[size] == 0
            rest = rest[size + 1 :]
        assert rest == []
        documents = [list(zip(part[::2], part[1::2], strict=True)) for letter, part in parts if letter == "D"]
        others = [part[::2] for letter, part in parts if letter == "E"]
        assert all(document == documents[0] for document in documents)
        keys = [key for key, _ in documents[0]]
        assert len(set(keys)) == 3
        assert all(2 <= key < 10 for key in keys)
        assert all(10 <= value < 15 for _, value in documents[0])
        assert set(asked) <= set(documents[0])
        assert asked[0] != asked[1]
        assert all(not set(other) & set(keys) for other in others)
        assert all(part == [1, asked[0][0]] for letter, part in parts if letter == "Q")
        assert [(i, t) for i, t in enumerate(targets) if t != -100] == [
            (len(row) - 4, end[2]),
            (len(row) - 1, end[5]),
        ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyValueTask(pairs=5, keys=9), r"keys \(9\) must be at least 10"),
        (lambda: KeyValueTask(2).sample("QD", batch=1), r"form \('QD'\) must consist of D, E and Q and end with Q"),
        (lambda: KeyValueTask(2).sample("DXQ", batch=1), r"form \('DXQ'\)"),
        (lambda: KeyValueTask(2).sample("DQ", batch=1, questions=3), r"questions \(3\) must lie in 1..2"),
    ],
)
def test_key_value_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
