"""The report's sections on code: does the grammar repetition penalty end loops, and what does it cost?"""

from __future__ import annotations

from report_blocks import Section, Table, Texts, bars, number, percent

RPG = "grammar penalty"
MEASURES = (
    ("code_ended", "programs that ended, %", "EOS, or the fence that closes the code, before the limit."),
    ("egp", "answers that ended, %", "EOS before the limit."),
    ("sr_rate", "repeated grammar units, %", "Units of the continuation that repeat the ones before."),
    ("ccp", "programs that parse, %", "Prompt and continuation together."),
)


def code_loops(records):
    ((source, record),) = records.items()
    forms, harm = record["loops"], record["no_harm"]
    methods = list(next(iter(forms.values())))
    about = f"{record['prompts']} looping prompts, up to {record['new_tokens']} tokens; as a chat answer and raw."
    blocks = [
        bars(
            {name: {form: 100 * rows[name][key] for form, rows in forms.items()} for name in methods},
            xlabel=label,
            alt=f"{label} per method, as in the table",
            caption=f"{caption} {about}",
            source=source,
        )
        for key, label, caption in MEASURES
    ]
    rows = [
        [f"{name}, {form}", *(percent(row[name][key]) for key, _, _ in MEASURES), number(row[name]["mean_tokens"], 0)]
        for form, row in forms.items()
        for name in methods
    ]
    blocks.append(Table(["", "programs ended", "EOS", "repeated units", "parse", "tokens"], rows, about, source))
    chosen = [
        ["requests tried", str(harm["tried"])],
        ["greedy ends them", str(harm["greedy_ends"])],
        ["and nothing stands three times in a row", str(harm["without_repetition"])],
        ["kept", str(harm["kept"])],
        ["identical with the penalty", percent(harm["identical"])],
    ]
    blocks.append(Table(["no harm", ""], chosen, "Requests chosen before the penalty ran on any of them.", source))
    templates = record["texts"]["templates"]
    blocks += [
        Texts(f"{templates[0]} ({form})", {name: record["texts"][form][name][0] for name in ("greedy", RPG)}, source)
        for form in forms
    ]
    found = [
        f"{form}: with the penalty {percent(rows[RPG]['code_ended'])} of the programs end (greedy "
        f"{percent(rows['greedy']['code_ended'])}), {percent(rows[RPG]['sr_rate'])} of the units are repeated "
        f"({percent(rows['greedy']['sr_rate'])}), {percent(rows[RPG]['ccp'])} parse ({percent(rows['greedy']['ccp'])})"
        for form, rows in forms.items()
    ]
    found.append(f"of {harm['kept']} answers without loops {percent(harm['identical'])} are identical to greedy's")
    return blocks, "; ".join(found) + "."


def code_criteria(record):
    """Which of two criteria counts depends on whether answers can end at all; the other one is for comparison."""
    stated = {}
    for form, claims in record["acceptance"].items():
        can_end = claims["greedy can end"]
        ended, repeated = (
            next(value for claim, value in claims.items() if claim.startswith(start))
            for start in ("EGP - EGP(greedy)", "unit-level repetition / that of greedy")
        )
        ccp = claims["CCP >= CCP of the peers"]
        best = max(value for name, value in ccp.items() if name != "ours")
        stated[form] = {
            f"EGP - EGP(greedy){' >= 0.3' if can_end else ''}": ended,
            f"unit-level repetition / that of greedy{'' if can_end else ' <= 0.3'}": repeated,
            "CCP >= CCP of the peers": {"figures": ccp, "met": ccp["ours"] >= best},
        }
    stated["identical to greedy where greedy does not loop >= 0.95"] = record["no_harm"]["identical"]
    return stated


def grammar_penalty(records):
    ((source, record),) = records.items()
    clocks = {name: row["batch 1"] for name, row in record["ms_per_row_and_token"].items()}
    peers = next(value for key, value in record.items() if key.startswith("peers"))
    lengths = list(next(iter(clocks.values())))
    first, last = lengths[0], lengths[-1]
    blocks = [
        bars(
            {
                name: {f"at {n} tokens": row[n]["mean_ms"] for n in (first, last)}
                for name, row in (clocks | peers).items()
            },
            xlabel="ms per row and token, mean",
            alt="Time of the penalty per token and text, as in the table",
            caption="Programs given token by token, as generate() does. Below: transformers' own remedies.",
            source=source,
        ),
        Table(
            ["mean ms (largest)", *(f"{n} tokens" for n in lengths)],
            [
                [name, *(f"{row[n]['mean_ms']:.3f} ({row[n]['max_ms']:.1f})" for n in lengths)]
                for name, row in (clocks | peers).items()
            ],
            "Per row and token; process time, one thread.",
            source,
        ),
    ]
    name, worst = max(clocks.items(), key=lambda item: item[1][last]["mean_ms"])
    found = (
        f"At {last} tokens the slowest text ({name}) costs {number(worst[last]['mean_ms'])} ms per row and token, at "
        f"{first} tokens {number(worst[first]['mean_ms'])} ms."
    )
    return blocks, found


SECTIONS = (
    Section(
        "code_loops",
        "Code without loops",
        "Small models repeat lines and statements of code. The grammar penalty looks at repeated grammar units and "
        "makes the way out likelier; here against the usual penalties, and on prompts that need no help.",
        ("code_loops_*",),
        code_loops,
        code_criteria,
    ),
    Section(
        "grammar_penalty",
        "What the grammar penalty costs",
        "The penalty parses as text grows; its time per token must not grow with the text.",
        ("grammar_penalty_cpu",),
        grammar_penalty,
    ),
)
