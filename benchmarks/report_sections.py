"""The report's sections: which results files each reads, and what it shows of them."""

from __future__ import annotations

from pathlib import Path

from report_blocks import Section, Table, Texts, bars, lines, number, percent
from report_sections_code import SECTIONS as CODE
from report_sections_prompts import SECTIONS as PROMPTS
from report_sections_speed import SECTIONS as SPEED

HERE = Path(__file__).parent


def typical(records):
    blocks, found = [], []
    for source, record in records.items():
        if text := record.get("text"):
            blocks += _typical_text(text, source)
            rows, human = text["rows"], text["human"]
            nearest = min(rows, key=lambda name: abs(rows[name]["epsilon_gap"]["mean"] - human["epsilon_gap"]))
            found.append(
                f"Human text has REP {number(human['REP'])}, Zipf {number(human['zipf'])} and an epsilon gap of "
                f"{number(human['epsilon_gap'])} nats; typical sampling at mass 0.2 has "
                f"{number(rows['typical 0.2']['REP']['mean'])}, {number(rows['typical 0.2']['zipf']['mean'])} and "
                f"{number(rows['typical 0.2']['epsilon_gap']['mean'])}, ancestral sampling "
                f"{number(rows['ancestral']['REP']['mean'])}, {number(rows['ancestral']['zipf']['mean'])} and "
                f"{number(rows['ancestral']['epsilon_gap']['mean'])}. The method nearest to human text in the gap is "
                f"{nearest}."
            )
        if warper := record.get("warper"):
            blocks.append(_typical_share(warper, source))
            shares = (
                f"from {percent(row['share']['stock'])} to {percent(row['share']['undersong'])} at batch {batch}"
                for batch, row in warper["batches"].items()
            )
            found.append(f"The warper's share of a decode step on the CPU goes {' and '.join(shares)}.")
    return blocks, " ".join(found)


def _typical_text(text, source):
    rows, human = text["rows"], text["human"]
    about = f"{text['prompts']} prompts x {text['new_tokens']} tokens, {text['runs']} runs; 95 % intervals over runs."
    plots = [
        ("REP", "REP, share of tokens seen shortly before", "How often a token repeats one of the last 16, 32, 128."),
        ("epsilon_gap", "epsilon gap, nats", "How far a token's information is from what the model expected."),
        ("zipf", "Zipf's coefficient of words", "How fast frequency falls with rank."),
    ]
    blocks = [
        bars(
            {name: row[key]["mean"] for name, row in rows.items()},
            errors={name: row[key]["half_width"] for name, row in rows.items()},
            reference=("human text", human[key]),
            xlabel=label,
            alt=f"{label} per method, as in the table",
            caption=f"{caption} Dashed: human continuations of the same prompts. {about}",
            source=source,
        )
        for key, label, caption in plots
    ]
    shown = [
        name
        for name in ("human", "ancestral", "typical 0.2", "top-p 0.95", "greedy")
        if name in text["deviation"]["shares"]
    ]
    blocks.append(
        lines(
            {name: (text["deviation"]["edges"], text["deviation"]["shares"][name]) for name in shown},
            xlabel="information - entropy, nats",
            ylabel="share of tokens",
            steps=True,
            alt="Distribution of information minus entropy per method",
            caption="0: exactly as informative as expected; positive: a surprise. The outer bins hold the rest.",
            source=source,
        )
    )
    keys = [
        "REP",
        "rep_4",
        "diversity_mean",
        "diversity_product",
        "zipf",
        "epsilon_gap",
        "nll",
    ]
    table = [["human text", *(number(human[key]) for key in keys)]]
    table += [
        [name, *(number(row[key]["mean"], 3, row[key]["half_width"]) for key in keys)] for name, row in rows.items()
    ]
    heads = ["", "REP", "rep-4", "diversity, mean", "product", "Zipf", "epsilon gap", "NLL"]
    blocks.append(Table(heads, table, f"{text['model']} in {text['dtype']}. {about}", source))
    samples = text["samples"]
    methods = [
        name for name in ("human", "typical 0.2", "ancestral", "top-p 0.95", "greedy") if name in samples["texts"]
    ]
    blocks += [
        Texts(prompt.strip(), {name: samples["texts"][name][index] for name in methods}, source)
        for index, prompt in enumerate(samples["prompts"][:1])
    ]
    return blocks


def _typical_share(warper, source):
    rows = {}
    for batch, row in warper["batches"].items():
        for name in ("stock", "undersong"):
            rows[f"batch {batch}, {name}"] = {"forward pass": row["ms"]["step"], "warper": row["ms"][name]}
    return bars(
        rows,
        xlabel="milliseconds",
        alt="Time of the forward pass and of the warper in one decode step",
        caption=f"One decode step on the CPU; the vocabulary has {warper['vocabulary']:,} tokens.",
        source=source,
    )


def repetition(records):
    ((source, record),) = records.items()
    rows, clocks = record["quality"], record["speed"]
    cap, greedy, penalty = (rows[name] for name in ("repetition cap", "greedy", "repetition_penalty=1.2"))
    quality, speed = f"{source}/quality", f"{source}/speed"
    prompts = (HERE / "prompts" / "repetition.txt").read_text(encoding="utf-8").splitlines()
    shown = ("greedy", "repetition_penalty=1.2", "repetition cap")
    blocks = [
        bars(
            {name: 100 * row["rep_4"] for name, row in rows.items()},
            xlabel="4-grams that occurred before, %",
            alt="Repeated 4-grams per method",
            caption=f"SmolLM2 continues {len(prompts)} prompts by up to 200 tokens.",
            source=quality,
        ),
        bars(
            {name: row["nll"] for name, row in rows.items()},
            xlabel="nats per token under Gemma-3-270M",
            alt="Negative log-likelihood per method under another model",
            caption="The same texts scored by a model that did not write them. Loops are likely, so low is no praise.",
            source=quality,
        ),
        bars(
            {
                name: {batch: clock[name]["ratio_to_greedy"] for batch, clock in clocks.items()}
                for name in clocks["batch 1"]
            },
            xlabel="speed relative to greedy",
            alt="Speed per method relative to greedy decoding",
            caption="Median ratio of rounds run in turns.",
            source=speed,
        ),
        Texts(prompts[0], {name: record["texts"][name][0] for name in shown}, quality),
    ]
    speeds = " and ".join(
        f"{number(clock['repetition cap']['ratio_to_greedy'], 2)} at {b}" for b, clock in clocks.items()
    )
    found = (
        f"Greedy decoding repeats {percent(greedy['rep_4'])} of its 4-grams, with the cap {percent(cap['rep_4'])}. "
        f"Under Gemma-3 the cap's texts take {number(cap['nll'], 2)} nats per token, those of repetition_penalty=1.2 "
        f"{number(penalty['nll'], 2)}. Speed relative to greedy: {speeds}."
    )
    return blocks, found


def ditto(records):
    ((source, record),) = records.items()
    methods = record["methods"]
    tuned = {name: method for name, method in methods.items() if "self_reinforcement" in method}
    sizes = record["sizes"]
    about = f"{sizes['prompts']} prompts, greedy, up to {sizes['tokens']} tokens."
    keys = ("rep_4", "rep_sen")
    rows = [
        [
            name,
            *(percent(method["all"][key]) for key in keys),
            number(method["all"]["mean_tokens"], 0),
            *(number(method.get("perplexity", {}).get(text), 2) for text in ("held-out", "classics")),
            number(method.get("judge_nll"), 2),
        ]
        for name, method in methods.items()
    ]
    heads = ["", "rep-4", "rep-sen", "tokens", "perplexity, held-out", "perplexity, classics", "nats, Gemma-3"]
    texts = record["texts"]
    shown = ["untuned", "repetition cap", *(name for name in tuned if name.startswith("DITTO"))]
    blocks = [
        bars(
            {name: 100 * method["all"]["rep_4"] for name, method in methods.items()},
            xlabel="4-grams that occurred before, %",
            alt="Repeated 4-grams per method",
            caption=f"Greedy continuations of SmolLM2: decoding methods and fine-tunes. {about}",
            source=source,
        ),
        lines(
            {name: _curve(method["self_reinforcement"]["tp"]) for name, method in tuned.items()},
            xlabel="copies before",
            ylabel="mean probability",
            ylim=(0, 1.02),
            alt="Self-reinforcement curves",
            caption="How certain a model is of the tokens of a sentence it has read n times already.",
            source=source,
        ),
        Table(
            heads,
            rows,
            f"{about} A dash: the model is the untuned one. Fine-tunes: LoRA, {sizes['steps']} steps.",
            source,
        ),
        Texts(texts["prompts"][0], {name: texts[name][0] for name in shown}, source),
    ]
    found = []
    for name, method in tuned.items():
        n, tp = (axis[-1] for axis in _curve(method["self_reinforcement"]["tp"]))
        found.append(
            f"{name}: rep-4 {percent(method['all']['rep_4'])}, held-out perplexity "
            f"{number(method['perplexity']['held-out'], 2)}, mean probability after {n} copies {number(tp, 2)}"
        )
    return blocks, "; ".join(found) + "."


def _curve(values):
    """x and y of a curve over 0, 1, ..., without the points that nothing reached."""
    points = [(n, value) for n, value in enumerate(values) if value is not None]
    return [n for n, _ in points], [value for _, value in points]


SECTIONS = (
    Section(
        "typical",
        "Typical sampling against human text",
        "Locally typical sampling keeps the tokens whose information is nearest to the entropy the model expects. Is "
        "the text nearer to human text than other samples are, and what does the warper cost?",
        ("typical_text_cuda", "typical_text_cpu"),
        typical,
    ),
    Section(
        "repetition",
        "The repetition cap",
        "Self-reinforcement makes a sentence likelier with every copy. The cap holds each further copy to half the "
        "probability of the one before.",
        ("repetition_cpu",),
        repetition,
    ),
    Section(
        "ditto",
        "DITTO fine-tuning",
        "A short LoRA fine-tune on pseudo-repetitive data teaches the model to be less certain of every further copy. "
        "The control is the same fine-tune on the same rows without the repetitions.",
        ("ditto_*",),
        ditto,
    ),
    *CODE,
    *PROMPTS,
    *SPEED,
)
