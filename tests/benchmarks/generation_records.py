"""Small made-up results of the generation experiments, in the form their scripts write."""

RUN = {
    "date": "2026-01-02",
    "git_commit": "0123abcd",
    "git_dirty": False,
    "hardware": {"device": "Toy GPU 9000", "cpu": "Toy CPU", "cpu_count": 2, "platform": "Linux"},
    "versions": {
        "python": "3.11.7",
        "undersong": "0.1.0",
        "torch": "2.13.0",
        "triton": None,
        "transformers": "5.22.2",
    },
    "threads": 2,
}


def run(name, command="python benchmarks/bench_{name}.py --device cuda"):
    return {"benchmark": name, "command": command.format(name=name), **RUN}


def typical_text():
    keys = ("REP", "rep_4", "diversity_mean", "diversity_product", "zipf", "zipf_r_squared", "zipf_without_hapaxes")
    keys += ("epsilon_gap", "nll", "entropy")
    methods = ("greedy", "ancestral", "top-p 0.95", "typical 0.2")
    rows = {
        name: {
            key: {"mean": 0.1 * index + 0.01 * column, "half_width": None if name == "greedy" else 0.005, "runs": []}
            for column, key in enumerate(keys)
        }
        for index, name in enumerate(methods, 1)
    }
    edges = [-1.0, 0.0, 1.0, 2.0]
    texts = {name: ["to be or not to be or not <b>to</b> be", "b"] for name in ("human", *methods)}
    return run("typical_text") | {
        "text": {
            "model": "SmolLM2-135M-Instruct",
            "dtype": "float32",
            "prompts": 2,
            "prompt_tokens": 16,
            "new_tokens": 12,
            "runs": 2,
            "human_text": "abc",
            "human": dict.fromkeys(keys, 0.123),
            "rows": rows,
            "deviation": {"edges": edges, "shares": {name: [0.2, 0.5, 0.3] for name in ("human", *methods)}},
            "samples": {"prompts": ["Whether 'tis <i>nobler</i>", "Second"], "texts": texts},
        },
        "acceptance": {
            "REP(typical 0.2) < REP(top-p 0.95)": {"figures": {"typical 0.2": 0.4, "top-p 0.95": 0.3}, "met": False},
            "gap <= 0.5 x ancestral": {"figures": {"ratio": 0.25}, "met": True},
        },
    }


def typical_share():
    row = {
        "ms": {"step": 40.0, "stock": 10.0, "undersong": 1.0},
        "share": {"stock": 0.2, "undersong": 0.0244},
        "share_ratio": 8.2,
    }
    return run("typical_text", "python benchmarks/bench_{name}.py --device cpu") | {
        "warper": {"vocabulary": 49152, "mass": 0.9, "threads": 2, "batches": {"1": row, "16": row}},
        "acceptance": {"share falls by >= 4x": {"figures": {"batch 1": 8.2}, "met": True}},
    }


def repetition():
    methods = ("greedy", "repetition_penalty=1.2", "repetition cap")
    speed = {name: {"tokens_per_s": 20.0, "ratio_to_greedy": 0.97} for name in methods}
    part = RUN | {"command": "python benchmarks/bench_repetition.py --part {}"}
    return {
        "benchmark": "repetition",
        "quality": {name: {"rep_4": 0.5 / i, "nll": 1.0 + i} for i, name in enumerate(methods, 1)},
        "texts": {name: ["a b c d a b c d"] for name in methods},
        "speed": {"batch 1": speed, "batch 20": speed},
        "quality_run": part | {"command": part["command"].format("quality")},
        "speed_run": part | {"command": part["command"].format("speed")},
        "acceptance": {
            "rep-4 of the cap / greedy <= 0.5": 0.33,
            "NLL of the cap - repetition_penalty=1.2 <= 0": 1.0,
            "speed of the cap / greedy >= 0.9": {"batch 1": 0.97, "batch 20": 0.97},
        },
    }


def ditto():
    curve = [0.1, 0.5, 0.9, None]
    reinforcement = {"tp": curve, "ip": curve, "wr": curve, "sentences": [2, 2, 2, 0], "positions": {}}

    def method(rep_4, tuned=True, **facts):
        scores = {"rep_4": rep_4, "rep_sen": 0.2, "mean_tokens": 190.0, "empty": 0}
        own = (
            {"perplexity": {"held-out": 20.0, "classics": 30.0}, "self_reinforcement": reinforcement} if tuned else {}
        )
        return {"all": scores, "repetition.txt": scores, "judge_nll": 1.5, **own, **facts}

    methods = {
        "untuned": method(0.5),
        "repetition cap": method(0.1, tuned=False),
        "control, lr 0.0003": method(0.4, log=[]),
        "DITTO, default": method(0.15, log=[], setting={"lr": 3e-4}, control="control, lr 0.0003"),
    }
    return run("ditto") | {
        "sizes": {"steps": 300, "prompts": 64, "tokens": 200},
        "methods": methods,
        "texts": {name: ["a b c d a b c d"] for name in ("prompts", *methods)},
        "judge": {"model": "Gemma-3-270M", "device": "cuda"},
        "acceptance": {
            "DITTO, default": {"rep-4 / untuned <= 0.5": 0.3, "rep-4 / control": 0.375, "TP_N / TP_1 <= 1": None}
        },
    }


def read_twice():
    layouts = {"once": "DQ", "twice": "DDQ", "question, twice": "QDDQ", "question, once": "QDQ", "other": "EDQ"}
    shares = {"DQ": 0.5, "DDQ": 0.7, "QDDQ": 0.9, "QDQ": 0.85, "EDQ": 0.5}
    runs = [
        {
            "name": f"{model}, trained on all layouts",
            "model": model,
            "seed": seed,
            "pairs": [4, 32],
            "parameters": 60_000,
            "steps_done": 2500,
            "accuracy": {"16": shares, "32": {form: share - 0.1 * seed for form, share in shares.items()}},
        }
        for model, seed in (("mamba2", 0), ("mamba2", 1), ("transformer", 0))
    ]
    answers = [{"key": "weight", "value": "3 kg", "answer": "3 kg"}]
    row = {"contains": 0.6, "documents": 200, "mean_prompt_tokens": 300.5, "answers": answers}
    return {
        "benchmark": "read_twice",
        "layouts": layouts,
        "key_value": runs,
        "key_value_run": RUN | {"command": "python benchmarks/bench_read_twice.py --device cuda"},
        "smollm2": {"DQ": row, "QDDQ": row, "QDQ": row},
        "smollm2_run": RUN | {"command": "python benchmarks/bench_read_twice.py --part smollm2"},
        "acceptance": {"mamba2: QDDQ - once, by seed >= 0.10": [0.4, 0.4], "smollm2: QDDQ - once": 0.0},
    }


def timed(name, device):
    def row(ms):
        return {
            "ms": ms,
            "quartiles_ms": [ms, ms],
            "floor_share": 0.5,
            "speedup": 10 / ms,
            "peak_bytes": 1,
            "error": 0.0,
        }

    case = {"clock": "steady", "case": "batch 1", "baseline": "stock", "info": {}}
    case["candidates"] = {"stock": row(10.0), "undersong": row(0.5)}
    command = f"python benchmarks/bench_{name}.py --device {device}"
    return run(name, command) | {"yardsticks": {}, "cases": [case], "acceptance": {"speed / stock >= 7": 20.0}}


def code_loops():
    def row(share):
        scores = dict.fromkeys(("egp", "code_ended", "sr_rate", "ccp", "tr_4"), share)
        return scores | {"mean_tokens": 100.0, "seconds": 1.0}

    methods = {"greedy": row(0.1), "grammar penalty": row(0.9), "repetition_penalty=1.2": row(0.5)}
    texts = {name: ["x = 1\nx = 1\n<b>"] for name in methods}

    def claims(can_end):
        return {
            "greedy can end": can_end,
            "EGP - EGP(greedy) >= 0.3, if greedy can end": 0.2,
            "code ended - code ended(greedy)": 0.5,
            "unit-level repetition / that of greedy <= 0.3, otherwise": 0.25,
            "CCP >= CCP of the peers": {"ours": 0.9, "repetition_penalty=1.2": 0.5},
            "identical to greedy where greedy does not loop >= 0.95": 0.98,
        }

    return run("code_loops") | {
        "prompts": 100,
        "new_tokens": 256,
        "seed": 0,
        "loops": {"chat": methods, "raw": methods},
        "texts": {"templates": ["elif chain"], "chat": texts, "raw": texts},
        "no_harm": {"tried": 180, "greedy_ends": 90, "without_repetition": 70, "kept": 50, "identical": 0.98},
        "acceptance": {"chat": claims(True), "raw": claims(False)},
    }


def grammar_penalty():
    clock = {str(n): {"mean_ms": 0.1 * n / 512, "median_ms": 0.1, "max_ms": 2.0} for n in (512, 4096)}
    return run("grammar_penalty", "python benchmarks/bench_{name}.py") | {
        "ms_per_row_and_token": {"python, one line": {"batch 1": clock, "batch 8": clock}, "go": {"batch 1": clock}},
        "peers, python, an elif chain": {"repetition_penalty=1.2": clock},
        "acceptance": {"worst mean at 4096 tokens <= 0.3 ms": 0.8, "largest ratio of 4096 to 512 tokens": 8.0},
    }


def set_mcq():
    def layout(changes, accuracy):
        return {
            "questions whose answer changes": changes,
            "questions with any different bit": changes,
            "largest change of a log probability": 1.5 * changes,
            "accuracy, mean over orders": accuracy,
            "accuracy, worst and best order": [accuracy - 0.1, accuracy + 0.1],
        }

    example = {
        "context": "Rosa keeps the key <here>.",
        "question": "Where?",
        "options": ["a", "b"],
        "answer": "a",
        "chosen, times": {"plain": {"a": 20, "b": 4}, "set": {"a": 24}},
    }
    return run("set_mcq") | {
        "model": "SmolLM2-135M-Instruct",
        "seed": 0,
        "questions": 200,
        "layouts": {"plain": layout(0.6, 0.5), "set": layout(0.0, 0.55)},
        "examples": [example],
        "acceptance": {
            "plain, share of questions whose answer changes >= 0.20": 0.6,
            "set, share of questions with any different bit == 0": 0.0,
            "set, accuracy - plain, mean accuracy over orders >= -0.05": 0.05,
        },
    }


def set_prompting():
    ways = {
        way: {"ms": ms, "ratio_to_plain": ms / 20} for way, ms in (("plain", 20.0), ("set", 18.0), ("set, warm", 4.0))
    }
    row = ways | {"rounds": 20, "members": 16, "tokens_per_member": 256, "error": 0.0}
    record = timed("set_prompting", "cuda")
    return record | {"first_token": {"SmolLM2": row, "1B": row}}


RECORDS = {
    "typical_text_cuda": typical_text(),
    "typical_text_cpu": typical_share(),
    "repetition_cpu": repetition(),
    "ditto_cuda": ditto(),
    "read_twice_cuda": read_twice(),
    "typical_mask_cuda": timed("typical_mask", "cuda"),
    "typical_mask_cpu": timed("typical_mask", "cpu"),
    "code_loops_cuda": code_loops(),
    "grammar_penalty_cpu": grammar_penalty(),
    "set_mcq_cuda": set_mcq(),
    "set_prompting_cuda": set_prompting(),
}
