"""Recall tasks: read a value out of a document. Prompts, loaders, and documents made up on the spot.

The six tasks of Arora et al., "Just read twice" (arXiv 2407.05483), with the document read once or several times:
FDA and SWDE (a key of a report or a web page), SQuAD as completion, Natural Questions, TriviaQA and DROP. Answers are
generated greedily up to a line break, 48 tokens at most (`GENERATION`), and scored with `metrics.contains`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..generation.read_twice import JustReadTwice, check_times

__all__ = ["GENERATION", "TASKS", "cut_context", "load_recall", "recall_answers", "recall_prompt", "report_records"]

GENERATION = {"do_sample": False, "max_new_tokens": 48, "stop_strings": ["\n"]}

_SUMMARY = "Summary of information above..."
_MARKERS = re.compile(r"\[(?:PAR|DOC|TLE)\]")


@dataclass(frozen=True)
class _Task:
    hub: str  # data set on the Hub
    document: str  # field that holds the document
    prompt: Callable[[Mapping, int], str]


def recall_prompt(task: str, record: Mapping, times: int = 1) -> str:
    """The prompt of one record.

    Args:
        task: a key of `TASKS`.
        record: fda, swde: `text`, `key`; squad: `text`, `context`, `question`; nq, triviaqa, drop: `context`,
            `question` (the cue that the answer continues), and `orig_question` if there is one.
        times: copies of the document. From 2 on the question comes first too, in the paper's form.

    Raises:
        ValueError: an unknown task, times below 1.

    >>> record = {"text": "A fruit. Colour: red.", "key": "colour", "value": "red"}
    >>> recall_prompt("fda", record)
    'A fruit. Colour: red. Colour:'
    >>> print(recall_prompt("fda", record, times=2))
    Information about Colour. A fruit. Colour: red.
    A fruit. Colour: red. Colour:
    """
    check_times(times)
    return _task(task).prompt(record, times)


def recall_answers(record: Mapping) -> list[str]:
    """The gold values of a record: its `value`, or its `answers`.

    >>> recall_answers({"value": "red"}), recall_answers({"answers": ["red", "crimson"]})
    (['red'], ['red', 'crimson'])
    """
    return [record["value"]] if "value" in record else list(record["answers"])


def cut_context(text: str, answer: str, tokenizer, context_length: int, answer_length: int = 50) -> str:
    """At most `context_length - answer_length` tokens of a text, centred on the answer's first occurrence.

    Lengths are those of one copy: read twice, the prompt is about twice as long. A text without the answer keeps its
    beginning.

    Args:
        tokenizer: a fast transformers tokenizer; it is asked for offsets, and the text itself is cut.

    Raises:
        ValueError: a budget of no tokens.
    """
    budget = context_length - answer_length
    if budget < 1:
        raise ValueError(
            f"context_length ({context_length}) must exceed answer_length ({answer_length}), or nothing is left of the"
            f" document; use context_length={answer_length + 512}."
        )
    ends = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(ends) <= budget:
        return text
    place = max(text.lower().find(answer.lower()), 0)
    centre = next((i for i, (_, end) in enumerate(ends) if end > place), 0)
    start = min(max(centre - budget // 2, 0), len(ends) - budget)
    return text[ends[start][0] : ends[start + budget - 1][1]]


def load_recall(
    task: str,
    path: str | Path | None = None,
    *,
    split: str = "validation",
    tokenizer=None,
    context_length: int | None = None,
    answer_length: int = 50,
) -> list[dict]:
    """The records of a task, from a file of JSON lines or from the Hub.

    Args:
        task: a key of `TASKS`.
        path: file with one JSON object per line; None asks the Hub through the `datasets` library.
        split: split on the Hub.
        tokenizer: counts tokens for `context_length`.
        context_length: cuts every document with `cut_context` and drops records whose first answer has fewer than 2
            characters; None keeps all as they are. SQuAD's passages are short and end in the question: not cut.

    Raises:
        ValueError: an unknown task, `context_length` without a tokenizer, a line that is not JSON.
        ImportError: the Hub is asked and `datasets` is missing.
    """
    row = _task(task)
    if context_length is not None and tokenizer is None:
        raise ValueError(f"context_length ({context_length}) needs a tokenizer to count with; pass tokenizer=.")
    records = _from_hub(row.hub, split) if path is None else _from_file(Path(path))
    if context_length is None:
        return records
    kept = []
    for record in records:
        answer = next(iter(recall_answers(record)), "")
        if len(answer) < 2:
            continue
        if task != "squad":
            document = record[row.document]
            if "key" in record:
                document = _without_cue(document, record["key"] + ":")
            document = cut_context(document, answer, tokenizer, context_length, answer_length)
            record = {**record, row.document: document}
        kept.append(record)
    return kept


def _from_file(path):
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}, line {number}: not a JSON object ({error}).") from None
    return records


def _from_hub(name, split):
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{name} comes from the Hub through `datasets`; pip install 'undersong[metrics]', or pass path= to a file"
            " of JSON lines."
        ) from None
    return [dict(record) for record in datasets.load_dataset(name, split=split)]


def _task(name):
    if name not in TASKS:
        raise ValueError(f"task ({name!r}) must be one of {', '.join(TASKS)}.")
    return TASKS[name]


def _without_cue(text, cue):
    """The text without the cue at its end, however often it stands there."""
    text = text.rstrip()
    while text.lower().endswith(cue.lower()):
        text = text[: -len(cue)].rstrip()
    return text


def _tidy(text):
    return text.strip(" \n.") + "."


def _key_prompt(record, times):
    key = record["key"][0].upper() + record["key"][1:]
    document = _tidy(_without_cue(record["text"], f"{key}:"))
    return JustReadTwice(times, intro=f"Information about {key}. " if times > 1 else None).apply(document, f"{key}:")


def _page_prompt(record, times):
    return _key_prompt({**record, "text": record["text"].split(_SUMMARY)[0]}, times)


def _completion_prompt(record, times):
    # `text` is the passage, the question and the beginning of the answer's sentence; only the passage is read again
    text = record["text"].strip()
    passage = record["context"].split("Question:")[0]
    return text if times == 1 else "\n".join([f"{record['question']} {passage}", *[passage] * (times - 2), text])


def _question_prompt(record, times):
    question = record["question"].strip()
    document = _tidy(_without_cue(_MARKERS.sub("", record["context"]), question))
    first = record.get("orig_question", question).strip(":")
    return JustReadTwice(times, intro=f"{first} " if times > 1 else None).apply(document, question)


TASKS = {
    "fda": _Task("hazyresearch/based-fda", "text", _key_prompt),
    "swde": _Task("hazyresearch/based-swde-v2", "text", _page_prompt),
    "squad": _Task("hazyresearch/based-squad", "text", _completion_prompt),
    "nq_512": _Task("hazyresearch/based_nq_512", "context", _question_prompt),
    "nq_1024": _Task("hazyresearch/based_nq_1024", "context", _question_prompt),
    "nq_2048": _Task("hazyresearch/based_nq_2048", "context", _question_prompt),
    "triviaqa": _Task("hazyresearch/based_triviaqa", "context", _question_prompt),
    "drop": _Task("hazyresearch/based_drop", "context", _question_prompt),
}


_NAMES = "Arden Birk Calloway Dorsett Ekholm Farrow Gentry Hask Ilves Jarrow Kessler Lund Moravec Noble Oster Pryce"
_FIRST = "Ana Bela Carl Dina Ewan Fay Gus Hana Ines Jon Kira Liam Mona Nils Olga Paul"
_PLACES = "Bergen Cork Dresden Espoo Graz Lille Leiden Malmo Osaka Porto Quito Riga Split Turku Utrecht Vienna"
_THINGS = (
    "catheter pump monitor analyzer lens stent scanner syringe sensor implant drill suture laser clamp probe valve"
)
_MONTHS = "January February March April May June July August September October November December"


def _number(low, high):
    return lambda rng: str(rng.randrange(low, high))


def _pick(*lists):
    return lambda rng: " ".join(rng.choice(words.split()) for words in lists)


def _pattern(pattern):
    """Every 0 becomes a random digit, every A a random capital letter."""
    letters = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    return lambda rng: "".join(
        str(rng.randrange(10)) if c == "0" else rng.choice(letters) if c == "A" else c for c in pattern
    )


# key -> (how the report says it, what the value looks like)
_FIELDS: dict[str, tuple[str, Callable[[random.Random], str]]] = {
    "applicant": ("Applicant: {}", lambda rng: f"{_pick(_NAMES)(rng)} Medical"),
    "submission number": ("Submission number: {}", _pattern("k000000")),
    "contact person": ("Contact person: {}", _pick(_FIRST, _NAMES)),
    "telephone": ("Telephone: {}", _pattern("555-0000")),
    "date prepared": ("Date prepared: {}", lambda rng: f"{_pick(_MONTHS)(rng)} {rng.randrange(1, 29)}"),
    "trade name": ("Trade name: {}", _pattern("AAA-00")),
    "common name": ("Common name: {}", _pick("portable fixed sterile digital reusable wireless", _THINGS)),
    "product code": ("Product code: {}", _pattern("AAA")),
    "regulation number": ("Regulation number: {}", _pattern("800.0000")),
    "predicate device": ("Predicate device: {}", _pattern("AA-000")),
    "manufacturing site": ("Manufacturing site: {}", _pick(_PLACES)),
    "test laboratory": ("Test laboratory: {} Laboratories", _pick(_NAMES)),
    "sample size": ("Sample size: {} patients", _number(40, 900)),
    "storage temperature": ("Storage temperature: {} degrees", _number(2, 40)),
    "shelf life": ("Shelf life: {} months", _number(6, 61)),
    "battery voltage": ("Battery voltage: {} V", _pattern("0.0")),
    "weight": ("Weight: {} g", _number(50, 3000)),
    "sterilization method": ("Sterilization method: {}", _pick("steam gamma ethylene peroxide ozone plasma")),
    "detection limit": ("Detection limit: {} mg", _pattern("0.00")),
    "software version": ("Software version: {}", _pattern("0.0.00")),
    "lot number": ("Lot number: {}", _pattern("00A000")),
    "reviewer": ("Reviewer: {}", _pick(_FIRST, _NAMES)),
    "meeting room": ("Meeting room: {}", _pattern("A000")),
    "invoice": ("Invoice: {}", _pattern("AA0000")),
}
_FILLER = (
    "The device was compared with earlier devices of its kind and raises no new question of safety.",
    "All tests followed the written protocol, and deviations were recorded and explained.",
    "The intended use has not changed since the first notification.",
    "Instructions for the user are supplied in print with every unit.",
    "The summary below was prepared from the records of the quality system.",
    "Materials in contact with the patient were evaluated before the study began.",
)


def report_records(count: int, *, fields: int = 12, filler: int = 4, seed: int = 0) -> list[dict]:
    """Made-up reports on medical devices, in the manner of FDA: every record asks for one field of its report.

    Args:
        count: records.
        fields: key-value sentences in a report, 1 to 24.
        filler: sentences without any value, spread among them.
        seed: the same seed gives the same records.

    Returns:
        Records with `text`, `key` and `value`, as `recall_prompt("fda", ...)` takes them.

    Raises:
        ValueError: more fields than there are.

    >>> record = report_records(1, fields=2, filler=0)[0]
    >>> record["key"].capitalize() in record["text"] and record["value"] in record["text"]
    True
    """
    if not 1 <= fields <= len(_FIELDS):
        raise ValueError(f"fields ({fields}) must lie in 1..{len(_FIELDS)}, the fields a report can have.")
    rng = random.Random(seed)
    return [_report(rng, fields, filler) for _ in range(count)]


def _report(rng: random.Random, fields: int, filler: int) -> dict:
    keys: Sequence[str] = rng.sample(list(_FIELDS), fields)
    values = {key: _FIELDS[key][1](rng) for key in keys}
    sentences = [_FIELDS[key][0].format(values[key]) + "." for key in keys]
    for _ in range(filler):
        sentences.insert(rng.randrange(len(sentences) + 1), rng.choice(_FILLER))
    key = rng.choice(keys)
    return {"text": " ".join(sentences), "key": key, "value": values[key]}
