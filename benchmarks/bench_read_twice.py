"""Does reading a document twice help a model that must choose what to remember? Recurrent models, and SmolLM2.

    python benchmarks/bench_read_twice.py --device cuda                     # both parts
    python benchmarks/bench_read_twice.py --device cuda --part key_value    # only that part, into the same file
    python benchmarks/bench_read_twice.py --fast                            # a smoke run, writes nothing

key_value: tiny models trained from scratch on documents of key-value pairs (`undersong.data.key_value`), all runs side
by side as processes on one device. A run's `forms` are the layouts it was trained on, in turn; every run is evaluated
on all layouts, by the share of right answers to one question about a document it has not seen. Layouts: D the
document, E a document without a common key, Q the question. The paper's prompt is QDDQ; DDQ is the form that can be
cached; QDQ is the control that asks first and reads once.
smollm2: SmolLM2-135M-Instruct reads values out of made-up reports, once and twice; score `contains`.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import harness
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM
from transformers.utils import logging

import undersong
from undersong.data.key_value import FORMS, KeyValueTask

HERE = Path(__file__).parent
ALL_FORMS = tuple(FORMS.values())
ONCE, CACHED, PAPER, ASKED_FIRST, OTHER = "DQ", "DDQ", "QDDQ", "QDQ", "EDQ"
TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Run:
    model: str = "mamba2"
    seed: int = 0
    forms: tuple[str, ...] = ALL_FORMS
    steps: int = 4000
    max_seconds: float = 240  # a limit on what a run may cost; `steps_done` says whether it was met
    batch: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32)  # sizes of training documents, in turn; the two largest are evaluated
    keys: int = 64
    values: int = 16
    hidden_size: int = 64
    layers: int = 3
    state_size: int = 2
    learning_rate: float = 5e-3

    @property
    def name(self):
        size = f" with state size {self.state_size}" if self.model == "mamba2" else ""
        return (
            f"{self.model}{size}, trained on {'all layouts' if self.forms == ALL_FORMS else ' and '.join(self.forms)}"
        )

    def build(self):
        torch.manual_seed(self.seed)
        vocab_size = 2 + self.keys + self.values
        size = {"vocab_size": vocab_size, "hidden_size": self.hidden_size, "num_hidden_layers": self.layers, **TOKENS}
        if self.model == "mamba2":
            heads = {"expand": 1, "num_heads": 4, "head_dim": self.hidden_size // 4, "n_groups": 1}
            config = Mamba2Config(**size, **heads, state_size=self.state_size, chunk_size=32, initializer_range=0.02)
            return Mamba2ForCausalLM(config)
        size |= {"num_attention_heads": 4, "intermediate_size": self.hidden_size}
        if self.model == "aaren":
            return undersong.AarenForCausalLM(undersong.AarenConfig(**size))
        # the default spread of 0.02 leaves attention of this width flat for thousands of steps
        config = LlamaConfig(**size, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.1)
        return LlamaForCausalLM(config)


@torch.no_grad()
def accuracy(model, task, form, device, count):
    """Share of right answers to the first question, over `count` documents that no training step saw."""
    generator = torch.Generator(device).manual_seed(1_000_003)
    right = 0
    for _ in range(count // 500):
        ids, labels = task.sample(form, batch=500, generator=generator)
        right += (model(ids[:, :-1]).logits[:, -1].argmax(-1) == labels[:, -1]).sum()
    return int(right) / (count // 500 * 500)


def train(run, device, count):
    model = run.build().to(device)
    generator = torch.Generator(device).manual_seed(run.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.01, fused=device == "cuda")
    warmup = min(100, run.steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, max((run.steps - i) / (0.3 * run.steps), 1e-3), 1.0)
    )
    start, losses = time.perf_counter(), []
    plan = [(form, pairs) for pairs in run.pairs for form in run.forms]
    for step in range(run.steps):
        form, pairs = plan[step % len(plan)]
        # Without a question in front, every pair may be asked for: all of them are, for denser supervision.
        questions = 1 if form.startswith("Q") else pairs
        task = KeyValueTask(pairs, run.keys, run.values)
        ids, labels = task.sample(form, batch=run.batch, questions=questions, generator=generator)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            losses.append(round(loss.item(), 4))
            if time.perf_counter() - start > run.max_seconds:
                break
    model.eval()
    sizes = {pairs: KeyValueTask(pairs, run.keys, run.values) for pairs in run.pairs[-2:]}
    return {
        **dataclasses.asdict(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps_done": step + 1,
        "seconds": round(time.perf_counter() - start, 1),
        "loss_every_100": losses,
        "accuracy": {
            n: {form: accuracy(model, task, form, device, count) for form in ALL_FORMS} for n, task in sizes.items()
        },
    }


RUNS = [
    *(Run(seed=seed) for seed in range(3)),
    *(Run(state_size=size) for size in (1, 4, 16)),  # what the state can hold is the lever
    Run(forms=(ONCE,)),  # never saw a document twice
    *(Run("transformer", seed=seed, learning_rate=2e-3) for seed in range(2)),
    Run("aaren", learning_rate=2e-3),
]


def key_value(device, fast):
    """Every run in a process of its own, all at once on a GPU (they are bound by launches), one by one on a CPU."""
    runs = [dataclasses.replace(run, steps=4, batch=8) for run in RUNS[::4]] if fast else RUNS
    results, waiting = [], []
    for run in runs:
        job = json.dumps(dataclasses.asdict(run) | {"count": 500 if fast else 2000})
        command = [sys.executable, __file__, "--device", device, "--train", job]
        waiting.append((run, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
        if device == "cpu":
            waiting[-1][1].wait()
    for run, process in waiting:
        output, _ = process.communicate()
        if process.returncode:
            print(f"{run.name}, seed {run.seed}: failed", flush=True)
            continue
        results.append({"name": run.name} | json.loads(output.splitlines()[-1]))
        shown = {form: round(share, 3) for form, share in results[-1]["accuracy"][str(run.pairs[-1])].items()}
        print(f"{run.name}, seed {run.seed}: {shown} ({results[-1]['seconds']:.0f} s)", flush=True)
    return results


def smollm2_recall(device, count, fields):
    """Share of reports whose value SmolLM2 gives, read once, twice, and once after the question."""
    from undersong.data import smollm2
    from undersong.data.recall import recall_answers, recall_prompt, report_records
    from undersong.demo.decode import continuations, load
    from undersong.metrics.contains.measures import contains

    model, tokenizer = load(smollm2())
    model.to(device)
    records = report_records(count, fields=fields)
    layouts = {
        ONCE: [recall_prompt("fda", record) for record in records],
        PAPER: [recall_prompt("fda", record, times=2) for record in records],
    }
    layouts[ASKED_FIRST] = [
        twice[: twice.index(". ") + 2] + once for once, twice in zip(layouts[ONCE], layouts[PAPER], strict=True)
    ]
    rows = {}
    for form, prompts in layouts.items():
        answers = []
        for start in range(0, count, 8):
            batch = prompts[start : start + 8]
            for ids in continuations(model, tokenizer, batch, max_new_tokens=48, do_sample=False):
                answers.append(tokenizer.decode(ids).split("\n")[0])
        right = [contains(answer, recall_answers(record)) for answer, record in zip(answers, records, strict=True)]
        lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        rows[form] = {
            "contains": statistics.mean(right),
            "documents": count,
            "mean_prompt_tokens": statistics.mean(lengths),
            "answers": [
                {"key": record["key"], "value": record["value"], "answer": answer[:80]}
                for record, answer in list(zip(records, answers, strict=True))[:6]
            ],
        }
        print(f"SmolLM2 {form}: {rows[form]['contains']:.3f} of {count}", flush=True)
    return rows


def acceptance(record):
    found = {}
    for kind, label in (
        ("mamba2", Run().name),
        ("transformer", Run("transformer").name),
        ("aaren", Run("aaren").name),
    ):
        runs = [run["accuracy"][str(run["pairs"][-1])] for run in record.get("key_value", []) if run["name"] == label]
        if not runs:
            continue
        gains = {
            form: [round(run[form] - run[ONCE], 4) for run in runs] for form in (PAPER, CACHED, ASKED_FIRST, OTHER)
        }
        bounds = {"mamba2": " >= 0.10", "transformer": " <= 0.03"}.get(kind, "")
        found |= {
            f"{kind}: once, by seed": [run[ONCE] for run in runs],
            f"{kind}: QDDQ - once, by seed{bounds}": gains[PAPER],
            f"{kind}: DDQ - once, by seed": gains[CACHED],
            f"{kind}: QDQ - once, by seed (control: the question alone)": gains[ASKED_FIRST],
            f"{kind}: another document first - once, by seed <= 0.02": gains[OTHER],
        }
    lever = {}
    for run in record.get("key_value", []):
        if run["model"] == "mamba2" and run["forms"] == list(ALL_FORMS) and run["seed"] == 0:
            lever[str(run["state_size"])] = [run["accuracy"][str(run["pairs"][-1])][form] for form in (ONCE, PAPER)]
    if lever:
        found["mamba2: once and QDDQ, by state size"] = dict(sorted(lever.items(), key=lambda item: int(item[0])))
    if "smollm2" in record:
        rows = record["smollm2"]
        found["smollm2: QDDQ - once"] = rows[PAPER]["contains"] - rows[ONCE]["contains"]
        found["smollm2: QDQ - once (control: the question alone)"] = (
            rows[ASKED_FIRST]["contains"] - rows[ONCE]["contains"]
        )
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a few steps and documents, nothing written")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--part", choices=("key_value", "smollm2"), help="run this part, keep the other as it is")
    parser.add_argument("--documents", type=int, default=200, help="reports for SmolLM2")
    parser.add_argument("--output", type=Path, help="results file; results/read_twice_<device>.json by default")
    parser.add_argument("--train", help=argparse.SUPPRESS)  # one run as JSON: how this script starts its processes
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, fast = arguments.device, arguments.fast
    if arguments.train:
        job = json.loads(arguments.train)
        count = job.pop("count")
        run = Run(**{name: tuple(value) if isinstance(value, list) else value for name, value in job.items()})
        print(json.dumps(train(run, device, count)))
        return
    path = arguments.output or HERE / "results" / f"read_twice_{device}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if arguments.part and path.exists() else {}
    run = harness.run_record("read_twice", device)
    record["benchmark"] = run.pop("benchmark")
    if arguments.part != "smollm2":
        record |= {"layouts": FORMS, "key_value": key_value(device, fast), "key_value_run": run}
    if arguments.part != "key_value":
        rows = smollm2_recall(device, 2 if fast else arguments.documents, 4 if fast else 16)
        record |= {"smollm2": rows, "smollm2_run": run}
    record["acceptance"] = acceptance(record)
    print(json.dumps(record["acceptance"], indent=1))
    if not fast:
        harness.write_json(path, record)


if __name__ == "__main__":
    main()
