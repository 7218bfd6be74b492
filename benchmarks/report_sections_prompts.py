"""The report's sections on prompting: reading twice, sets instead of orders."""

from __future__ import annotations

import statistics

from report_blocks import Section, Table, bars, number, percent
from report_sections_speed import timings


def read_twice(records):
    ((source, record),) = records.items()
    names = {form: f"{form}, {name}" for name, form in record["layouts"].items()}
    blocks, found = [], []
    if runs := record.get("key_value"):
        models = {}
        for run in runs:
            pairs, shares = list(run["accuracy"].items())[-1]
            models.setdefault(run["name"], []).append(shares)
        means = {
            model: {names[form]: statistics.mean(shares[form] for shares in seeds) for form in seeds[0]}
            for model, seeds in models.items()
        }
        blocks += [
            bars(
                {model: {form: 100 * share for form, share in forms.items()} for model, forms in means.items()},
                xlabel="right answers, %",
                limit=118,
                alt="Recall per model and layout of the prompt",
                caption=f"Documents of {pairs} pairs, means over seeds. D: the document, E: another, Q: the question.",
                source=f"{source}/key_value",
                form="{:.0f}",
            ),
            Table(
                ["", "seed", "weights", *names.values()],
                [
                    [
                        run["name"],
                        str(run["seed"]),
                        f"{run['parameters']:,}",
                        *(percent(list(run["accuracy"].values())[-1][form]) for form in names),
                    ]
                    for run in runs
                ],
                f"Every run, documents of {pairs} pairs.",
                f"{source}/key_value",
            ),
        ]
        found += [
            f"{model}: " + ", ".join(f"{percent(share, 0)} ({form})" for form, share in forms.items())
            for model, forms in means.items()
        ]
    if rows := record.get("smollm2"):
        blocks.append(
            bars(
                {names[form]: 100 * row["contains"] for form, row in rows.items()},
                xlabel="answers that contain the value, %",
                alt="Recall of SmolLM2 per layout",
                caption=f"SmolLM2 reads a value out of a report; {next(iter(rows.values()))['documents']} reports.",
                source=f"{source}/smollm2",
            )
        )
        found.append(
            "SmolLM2: " + ", ".join(f"{percent(row['contains'])} ({names[form]})" for form, row in rows.items())
        )
    return blocks, "Right answers. " + "; ".join(found) + "."


def set_mcq(records):
    ((source, record),) = records.items()
    layouts = record["layouts"]
    changes, accuracy = "questions whose answer changes", "accuracy, mean over orders"
    about = f"{record['model']}, {record['questions']} questions, all orders of four options."
    rows = [
        [
            name,
            percent(row[changes]),
            percent(row["questions with any different bit"]),
            f"{row['largest change of a log probability']:.2g}",
            percent(row[accuracy]),
            " to ".join(percent(share) for share in row["accuracy, worst and best order"]),
        ]
        for name, row in layouts.items()
    ]
    heads = ["layout", "answer changes", "any bit changes", "largest change, nats", "accuracy", "worst to best order"]
    blocks = [
        bars(
            {name: 100 * row[key] for name, row in layouts.items()},
            xlabel=label,
            limit=118,
            alt=f"{label} per layout, as in the table",
            caption=caption + about,
            source=source,
        )
        for key, label, caption in (
            (changes, "questions whose answer changes with the order, %", ""),
            (accuracy, "right answers, mean over orders, %", "Chance is 25 %. "),
        )
    ]
    blocks.append(Table(heads, rows, about, source))
    shown = [name for name in ("plain", "set") if name in layouts]
    examples = [
        [f"{e['context']} {e['question']}", e["answer"], *(_counts(e["chosen, times"][name]) for name in shown)]
        for e in record["examples"][:4]
    ]
    blocks.append(Table(["question", "right", *shown], examples, "Answers chosen, over all orders.", source))
    found = "; ".join(
        f"{name}: {percent(row[changes])} of the questions change their answer with the order, "
        f"{percent(row[accuracy])} of the answers are right"
        for name, row in layouts.items()
    )
    return blocks, found + "."


def _counts(chosen):
    return ", ".join(f"{option} {count}x" for option, count in chosen.items())


def set_prompting(records):
    ((source, record),) = records.items()
    blocks, found = timings(record, source, "Sets of 16 members.")
    ways = ("plain", "set", "set, warm")
    rows = record["first_token"]
    sizes = next(iter(rows.values()))
    blocks.insert(
        0,
        bars(
            {name: {way: row[way]["ms"] for way in ways} for name, row in rows.items()},
            xlabel="milliseconds to the first token",
            alt="Time to the first token per model and way of prompting",
            caption=f"{sizes['members']} passages of {sizes['tokens_per_member']} tokens; warm: the passages are in a "
            "SetCache, the question is not.",
            source=source,
        ),
    )
    found += [
        f"{name}: the first token takes {number(row['set, warm']['ratio_to_plain'], 2)} of the plain prompt's time "
        f"with a warm SetCache, {number(row['set']['ratio_to_plain'], 2)} without"
        for name, row in rows.items()
    ]
    return blocks, "; ".join(found) + "."


SECTIONS = (
    Section(
        "read_twice",
        "Reading twice",
        "A recurrent model must choose what to remember before it knows the question. Repeating the document, or "
        "asking first, should help it, and should help a Transformer less.",
        ("read_twice_*",),
        read_twice,
    ),
    Section(
        "set_mcq",
        "Multiple choice without an order",
        "Options given as a set, instead of in an order, cannot change the answer by their order. Plain prompts can.",
        ("set_mcq_*",),
        set_mcq,
    ),
    Section(
        "set_prompting",
        "What set prompting costs",
        "Members of a set do not see each other: less attention to compute, and a cache that serves every order.",
        ("set_prompting_*",),
        set_prompting,
    ),
)
