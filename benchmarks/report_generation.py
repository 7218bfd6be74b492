"""Writes docs/generation-report.html: every generation experiment, from the JSON files in benchmarks/results.

    python benchmarks/report_generation.py                       # all results files that are there
    python benchmarks/report_generation.py --out /tmp/page.html

The page refers to nothing outside itself. A section whose results are missing says so by name; the sections are in
report_sections*.py. Needs `undersong[demo]` (jinja2, matplotlib).
"""

from __future__ import annotations

import argparse
import json
import operator
import re
from importlib.resources import files
from pathlib import Path

from report_sections import SECTIONS

from undersong.demo.report import mark_repeats

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "generation-report.html"
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
_LIMIT = re.compile(r"(<=|>=|==|<|>)\s*(-?[\d.]+)\s?(?:ms|us|x)?$")
_COMPARE = {"==": operator.eq, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


def load(folder):
    """Records of the results files that the sections ask for, by file name without `.json`.

    A section may ask for "name_*": then the run on a GPU counts, and the one on a CPU if there is no other.
    """
    found = {}
    for name in (name for section in SECTIONS for name in section.files):
        for candidate in _candidates(name):
            path = Path(folder) / f"{candidate}.json"
            if path.exists():
                found[candidate] = json.loads(path.read_text(encoding="utf-8"))
                break
    return found


def render(records):
    """HTML text of the report; `records` as `load` gives them."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["mark_repeats"] = mark_repeats
    template = environment.from_string((HERE / "report_generation.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        style=_style(),
        sections=[_context(section, records) for section in SECTIONS],
        sources={key: text for name, record in records.items() for key, text in provenance(name, record).items()},
    )


def provenance(name, record):
    """By which machine, versions and command the figures of a file came about: `{name: text}`.

    A file whose parts were run apart holds several runs, `{"<part>_run": ...}`: then `{"<name>/<part>": text}`.
    """
    runs = {name: record} if "hardware" in record else {}
    runs |= {f"{name}/{key.removesuffix('_run')}": run for key, run in record.items() if key.endswith("_run")}
    texts = {}
    for key, run in runs.items():
        packages = ", ".join(f"{package} {version}" for package, version in run["versions"].items() if version)
        facts = [f"benchmarks/results/{name}.json", run["hardware"]["device"], run["date"], packages, run["command"]]
        texts[key] = " · ".join(facts)
    return texts


def criteria(acceptance, prefix=""):
    """Acceptance criteria as records state them: `claim`, `figures` (text) and `met`; None if no limit is stated.

    `acceptance` is `{claim: {..., "met": bool}}`, `{claim: bool}`, or `{claim: figures}` with a claim that ends in its
    limit, e.g. "speed / greedy >= 0.9"; a dict of such dicts by group; anything else is a figure for comparison.
    """
    found = []
    for claim, value in acceptance.items():
        figures, met, limit = value, None, _LIMIT.search(claim)
        if isinstance(value, bool):
            figures, met = None, value
        elif isinstance(value, dict) and isinstance(value.get("met"), bool):
            figures, met = {key: item for key, item in value.items() if key != "met"}, value["met"]
        elif limit:
            compare, bound = _COMPARE[limit[1]], float(limit[2])
            met = all(leaf is not None and compare(leaf, bound) for leaf in _leaves(value))
        elif isinstance(value, dict):
            found += criteria(value, f"{prefix}{claim}: ")
            continue
        found.append({"claim": prefix + claim, "figures": _plain(figures), "met": met})
    return found


def _context(section, records):
    own, missing = {}, []
    for name in section.files:
        there = [candidate for candidate in _candidates(name) if candidate in records]
        own |= {candidate: records[candidate] for candidate in there[:1]}
        missing += [] if there else [_candidates(name)[0]]
    context = {
        "id": section.id,
        "title": section.title,
        "intro": section.intro,
        "records": own,
        "missing": [f"benchmarks/results/{name}.json" for name in missing],
        "commands": [_command(name) for name in missing],
    }
    if own:
        blocks, found = section.build(own)
        stated = []
        for name, record in own.items():
            claims = section.accept(record)
            shared = any(claims.keys() & section.accept(other).keys() for other in own.values() if other is not record)
            stated += criteria(claims, f"{DEVICES[name.rpartition('_')[2]]}: " if shared else "")
        verdicts = [criterion["met"] for criterion in stated if criterion["met"] is not None]
        context |= {"blocks": blocks, "found": found, "criteria": stated, "met": sum(verdicts), "of": len(verdicts)}
    return context


def _candidates(name):
    return [name.replace("*", "cuda"), name.replace("*", "cpu")] if name.endswith("*") else [name]


def _command(name):
    benchmark, _, device = name.rpartition("_")
    return f"python benchmarks/bench_{benchmark}.py --device {device}"


def _style():
    """The style sheet of the demo's report, so that every page looks alike."""
    page = files("undersong.demo").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return page[page.index("<style>") + len("<style>") : page.index("</style>")]


def _leaves(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else [value]


def _plain(value):
    """Figures as text; nothing for None."""
    if isinstance(value, dict):
        parts = {key: _plain(item) for key, item in value.items()}
        return ", ".join(part if key == "figures" else f"{key} {part}" for key, part in parts.items() if part)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    records = load(arguments.results)
    arguments.out.write_text(render(records), encoding="utf-8")
    print(f"{arguments.out}: {len(records)} results files, {arguments.out.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
