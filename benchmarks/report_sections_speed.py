"""The report's sections made of the harness's timings, and what they share: cases as plots, tables and sentences."""

from __future__ import annotations

from report_blocks import Section, Table, bars, number, percent

PLOTTED = 10  # cases in the figure; the table has all


def timings(record, source, about):
    """Blocks and sentences of a record's steady cases."""
    cases = [case for case in record.get("cases", ()) if case["clock"] == "steady"]
    if not cases:
        return [], []
    rows = [
        [
            case["case"],
            name,
            number(row["ms"], 4),
            " to ".join(number(quartile, 4) for quartile in row["quartiles_ms"]),
            f"{row['speedup']:.2f}x {case['baseline']}" if row.get("speedup") else "–",
            percent(row.get("floor_share"), 0),
        ]
        for case in cases
        for name, row in case["candidates"].items()
    ]
    heads = ["case", "candidate", "ms", "quartiles", "speed", "of the hardware's floor"]
    figure = bars(
        {case["case"]: {name: row["ms"] for name, row in case["candidates"].items()} for case in cases[:PLOTTED]},
        xlabel="milliseconds (logarithmic)",
        log=True,
        alt=f"Median times: {about}",
        caption=f"{about} Medians of interleaved rounds" + ("." if len(cases) <= PLOTTED else "; more in the table."),
        source=source,
    )
    return [figure, Table(heads, rows, f"{about} Every candidate is checked before it is timed.", source)], [
        f"{case['case']}: {name} {row['speedup']:.1f}x as fast as {case['baseline']}"
        for case in cases
        if case.get("baseline")
        for name, row in [min(case["candidates"].items(), key=lambda item: item[1]["ms"])]
        if name != case["baseline"]
    ]


def figures(record, source):
    """Every `{name: {measure: number}}` and `{measure: number}` of a record as a table."""
    blocks = []
    for key, value in record.items():
        if key in ("acceptance", "hardware", "versions", "yardsticks", "info") or not isinstance(value, dict):
            continue
        groups = {
            name: row for name, row in value.items() if isinstance(row, dict) and any(map(_is_number, row.values()))
        }
        if groups:
            columns = list(dict.fromkeys(name for row in groups.values() for name, x in row.items() if _is_number(x)))
            rows = [[name, *(number(row.get(column), 4) for column in columns)] for name, row in groups.items()]
            blocks.append(Table(["", *columns], rows, f"{key.replace('_', ' ')}.", source))
        elif value and all(map(_is_number, value.values())):
            rows = [[name, number(x, 4)] for name, x in value.items()]
            blocks.append(Table(["", ""], rows, f"{key.replace('_', ' ')}.", source))
    return blocks


def measured(about):
    """A section's `build` for records of timings and plain figures; `about` says in a sentence what they are of."""

    def build(records):
        blocks, found = [], []
        for name, record in records.items():
            runs = [key.removesuffix("_run") for key in record if key.endswith("_run")]
            run = record if "hardware" in record else record[f"{runs[0]}_run"]
            source = name if run is record else f"{name}/{runs[0]}"
            timed, sentences = timings(record, source, about)
            blocks += timed + figures(record, source)
            where = f"{run['hardware']['device']}: " if len(records) > 1 else ""
            found += [where + sentence for sentence in sentences]
        return blocks, "; ".join(found) + "." if found else "The figures are in the tables."

    return build


def _is_number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


SECTIONS = (
    Section(
        "typical_mask",
        "Selecting without a sort",
        "Typical sampling and top-p need the mass under a threshold, not the order of the vocabulary. A radix select "
        "over the bits finds the threshold; transformers sorts.",
        ("typical_mask_cuda", "typical_mask_cpu"),
        measured("Masks of typical sampling and of top-p against transformers' warpers."),
    ),
)
