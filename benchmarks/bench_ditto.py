"""Does a short DITTO fine-tune cure SmolLM2-135M-Instruct of loops, and what does it cost? Against a plain fine-tune.

    python benchmarks/bench_ditto.py --device cuda                                  # about 5 minutes on an H100
    python benchmarks/bench_ditto.py --device cuda --setting default strong clip    # several, side by side
    python benchmarks/bench_ditto.py --part judge                                   # only that, into the same file
    python benchmarks/bench_ditto.py --fast                                         # a smoke run, writes nothing

All fine-tunes are LoRA, r = 16 on every linear layer, 300 steps of 8 rows of 512 tokens: of `data.human_text`, or of
text that the untuned model itself sampled (top-p 0.95) after the first words of those paragraphs, for people who have
no text of the kind their model writes. The control sees the same rows in the same order, all of them plain. Methods
continue the 20 prompts of `prompts/repetition.txt`, on which a setting may be chosen, and the 44 of
`prompts/ditto.txt` greedily by at most 200 tokens. rep-n counts repeated n-grams of SmolLM2's tokens, rep-sen repeated
sentences. Perplexity is that of human text held out from training (same sources)
and of six openings of classics, `prompts/classics.txt`, which tells forgetting from learning the training text's
style. Curves: TP_n and the rest of `self_reinforcement` for 24 held-out sentences. The judge is Gemma-3-270M, which
wrote none of the texts: nats per token of the continuation, given the prompt.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import harness
import torch
from bench_repetition import nll
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from undersong.data import gemma3_270m, smollm2
from undersong.data.human_text import fingerprint, human_text, split
from undersong.demo.decode import continuations, load
from undersong.generation.repetition_cap import SelfReinforcementCapLogitsProcessor
from undersong.metrics import rep_sen, repetition_scores
from undersong.metrics.self_reinforcement import self_reinforcement
from undersong.training import DittoDataCollator, DittoLoss, DittoTrainer

HERE = Path(__file__).parent
DECODING = {
    "untuned": lambda: {},
    "repetition_penalty=1.2": lambda: {"repetition_penalty": 1.2},
    "no_repeat_ngram_size=4": lambda: {"no_repeat_ngram_size": 4},
    "repetition cap": lambda: {"logits_processor": [SelfReinforcementCapLogitsProcessor()]},
}
DITTO = {"rows": "human", "lr": 3e-4, "rate": 0.5, "lambda_": 0.5, "kind": "nl", "per_batch": False}
SETTINGS = {
    "default": DITTO,
    "strong": DITTO | {"lr": 1e-3},
    "gentle": DITTO | {"lr": 1e-4},
    "clip": DITTO | {"kind": "nl_clip"},
    "paper": DITTO | {"per_batch": True},
    "own text": DITTO | {"rows": "own"},
}
FULL = {"steps": 300, "rows": 8, "length": 512, "tokens": 200, "prompts": 64, "sentences": 24, "repeats": 20}
FAST = {"steps": 2, "rows": 2, "length": 64, "tokens": 8, "prompts": 2, "sentences": 2, "repeats": 3}


class Bench:
    """The data and the measurements that all models share."""

    def __init__(self, device, sizes):
        self.device, self.sizes = torch.device(device), sizes
        self.model, self.tokenizer = load(smollm2())
        self.text = human_text()
        train, held_out = split(self.text)
        self.train, self.held_out = {"human": self._rows("\n\n".join(train))}, self._rows("\n\n".join(held_out))
        self.starts = [" ".join(paragraph.split()[:2]) for paragraph in train]
        self.classics = [self.tokenizer(text)["input_ids"] for text in lines("classics")]
        prompts = lines("repetition") + lines("ditto")
        self.prompts = prompts[:: len(prompts) // sizes["prompts"]]
        # one sentence per paragraph, of usual length, spread over the held-out text
        sentences = [p.split(". ")[0].rstrip(".") + "." for p in held_out]
        sentences = [s for s in sentences if 8 <= len(s.split()) <= 25]
        self.sentences = sentences[:: len(sentences) // sizes["sentences"]][: sizes["sentences"]]
        if sizes is FAST:
            self.held_out, self.classics = self.held_out[:2], self.classics[:1]

    def _rows(self, text):
        """The text in rows of equal length, the rest left out."""
        ids, length = self.tokenizer(text)["input_ids"], self.sizes["length"]
        return [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]

    def fresh_model(self):
        return load(smollm2())[0].to(self.device)

    def write_own_rows(self):
        """As many rows as there are human ones, sampled by the untuned model; no more than a training reads."""
        count = min(len(self.train["human"]), self.sizes["steps"] * self.sizes["rows"])
        starts = self.starts[:: len(self.starts) // count][:count]
        length = {"max_new_tokens": self.sizes["length"], "min_new_tokens": self.sizes["length"]}
        sampling = {"do_sample": True, "top_k": 0, "top_p": 0.95}
        self.train["own"] = continuations(self.fresh_model(), self.tokenizer, starts, **length, **sampling)

    def tuned(self, trainer_class, collator, lr, rows, **options):
        """Fine-tunes SmolLM2; the merged model and the training log."""
        set_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(self.fresh_model(), config)
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder,
                max_steps=self.sizes["steps"],
                per_device_train_batch_size=self.sizes["rows"],
                learning_rate=lr,
                warmup_steps=self.sizes["steps"] // 15,
                bf16=self.device.type == "cuda",
                use_cpu=self.device.type == "cpu",
                logging_steps=max(1, self.sizes["steps"] // 20),
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            dataset = [{"input_ids": row} for row in self.train[rows]]
            trainer = trainer_class(model, arguments, train_dataset=dataset, data_collator=collator, **options)
            trainer.train()
        names = ("step", "loss", "lm_loss", "ditto_loss", "tp_ratio")
        log = [{k: entry[k] for k in names if k in entry} for entry in trainer.state.log_history if "loss" in entry]
        return model.merge_and_unload().eval(), log

    def measure(self, name, model, options=None):
        """Repetition of the greedy continuations; without `options` also what belongs to the model itself."""
        decoding = {"max_new_tokens": self.sizes["tokens"], "do_sample": False} | (options or {})
        tokens = continuations(model, self.tokenizer, self.prompts, **decoding)
        texts = [self.tokenizer.decode(ids) for ids in tokens]
        parts = {"all": slice(None), "repetition.txt": slice(20), "ditto.txt": slice(20, None)}
        result = {part: repetition(tokens[rows], texts[rows]) for part, rows in parts.items() if texts[rows]}
        if not options:
            result["perplexity"] = {
                "held-out": perplexity(model, self.held_out),
                "classics": perplexity(model, self.classics),
            }
            curves = self_reinforcement(model, self.tokenizer, self.sentences, self.prompts[:4], self.sizes["repeats"])
            result["self_reinforcement"] = rounded(curves)
        print(f"{name:<28} rep-4 {result['all']['rep_4']:.3f}  {result.get('perplexity', '')}", flush=True)
        return result, texts


def lines(name):
    return (HERE / "prompts" / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def repetition(tokens, texts):
    written = [(ids, text) for ids, text in zip(tokens, texts, strict=True) if text.strip()]
    scores = repetition_scores([ids for ids, _ in written], lengths=())
    return scores | {
        "rep_sen": statistics.mean(rep_sen(text) for _, text in written),
        "mean_tokens": statistics.mean(map(len, tokens)),
        "empty": len(tokens) - len(written),
    }


@torch.no_grad()
def perplexity(model, rows):
    total = count = 0
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        total += model(ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    return math.exp(total / count)


def rounded(value):
    """Four digits are enough for a plot; JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return (float(f"{value:.4g}") if math.isfinite(value) else None) if isinstance(value, float) else value


def train(record, texts, names, device, sizes):
    bench = Bench(device, sizes)
    record |= harness.run_record("ditto", device) | {"sizes": sizes, "human_text": fingerprint(bench.text)}
    record["training_rows"] = len(bench.train["human"])
    if any(SETTINGS[name]["rows"] == "own" for name in names):
        bench.write_own_rows()
    methods = record.setdefault("methods", {})
    texts["prompts"] = bench.prompts

    def note(name, model, options=None, **facts):
        result, texts[name] = bench.measure(name, model, options)
        methods[name] = result | facts

    model = bench.fresh_model()
    for name, options in DECODING.items():
        note(name, model, options())
    for name in names:
        setting = dict(SETTINGS[name])
        lr, rows, loss = setting.pop("lr"), setting.pop("rows"), DittoLoss(setting.pop("lambda_"), setting.pop("kind"))
        control = f"control, lr {lr:g}, {rows} text"
        if control not in methods:
            plain = DittoDataCollator(bench.tokenizer, rate=0.0)
            model, log = bench.tuned(Trainer, lambda batch, c=plain: without_ditto(c(batch)), lr, rows)
            note(control, model, log=log)
        collator = DittoDataCollator(bench.tokenizer, **setting)
        model, log = bench.tuned(DittoTrainer, collator, lr, rows, ditto_loss=loss)
        note(f"DITTO, {name}", model, log=log, setting=SETTINGS[name], control=control)


def without_ditto(batch):
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


def judge(record, texts, device):
    model, tokenizer = load(gemma3_270m())
    model = model.to(device)
    for name, method in record["methods"].items():
        pairs = [(p, t) for p, t in zip(texts["prompts"], texts[name], strict=True) if t.strip()]
        scores = [nll(model, tokenizer, *pair) for pair in pairs]
        method["judge_nll"] = sum(total for total, _ in scores) / sum(count for _, count in scores)
        print(f"{name:<28} NLL {method['judge_nll']:.3f}", flush=True)
    record["judge"] = {"model": "Gemma-3-270M", "device": str(device)}


def merge(paths, output):
    """Joins runs side by side on one machine; what they share (untuned, decoding methods) must agree."""
    record, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for other in others:
        for key in ("sizes", "human_text", "hardware", "versions"):
            assert other[key] == record[key], f"{key}: {other[key]} is not {record[key]}"
        for name in record["methods"].keys() & other["methods"].keys() & DECODING.keys():
            assert other["methods"][name]["all"] == record["methods"][name]["all"], name
        record["methods"] = other["methods"] | record["methods"]
        record["texts"] |= other["texts"]
        record["command"] += " & " + other["command"]
    record["acceptance"] = acceptance(record["methods"])
    harness.write_json(output, record)


def acceptance(methods):
    """Ratios per setting; N is the largest number of repeats."""

    def flattening(name):
        tp = methods[name]["self_reinforcement"]["tp"]
        return tp[-1] / tp[1]

    def ratio(name, other, *keys):
        a, b = methods[name], methods[other]
        for key in keys:
            a, b = a[key], b[key]
        return a / b if b else None

    table = {}
    for name, method in methods.items():
        if "setting" in method:
            control = method["control"]
            part = "ditto.txt" if "ditto.txt" in method else "all"  # a smoke run has too few prompts for parts
            table[name] = {
                "rep-4 / untuned <= 0.5": ratio(name, "untuned", part, "rep_4"),
                "rep-4 / control <= 0.5": ratio(name, control, part, "rep_4"),
                "rep-sen / untuned": ratio(name, "untuned", part, "rep_sen"),
                "rep-sen / control": ratio(name, control, part, "rep_sen"),
                "held-out perplexity / untuned <= 1.02": ratio(name, "untuned", "perplexity", "held-out"),
                "held-out perplexity / control <= 1.02": ratio(name, control, "perplexity", "held-out"),
                "classics perplexity / untuned": ratio(name, "untuned", "perplexity", "classics"),
                "classics perplexity / control": ratio(name, control, "perplexity", "classics"),
                "TP_N / TP_1 <= 1": flattening(name),
                "TP_N / TP_1 of untuned, control": [flattening("untuned"), flattening(control)],
            }
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--fast", action="store_true", help="a few short steps, nothing written")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=["default"], help="fine-tunes to run")
    parser.add_argument("--part", choices=("train", "judge"), help="judging alone needs the texts of training")
    parser.add_argument("--output", type=Path, help="results/ditto_<device>.json by default")
    parser.add_argument("--texts", type=Path, help="build/ditto_texts_<device>.json by default")
    parser.add_argument("--merge", nargs="+", type=Path, help="outputs of runs with other settings, into --output")
    parser.add_argument("--judge-device", choices=("cpu", "cuda"), help="as --device by default")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    output = arguments.output or HERE / "results" / f"ditto_{arguments.device}.json"
    side = arguments.texts or HERE.parent / "build" / f"ditto_texts_{arguments.device}.json"
    record, texts = {}, {}
    if arguments.merge:
        merge(arguments.merge, output)
        return
    if arguments.part == "judge":
        record, texts = (json.loads(path.read_text(encoding="utf-8")) for path in (output, side))
    else:
        train(record, texts, arguments.setting, arguments.device, FAST if arguments.fast else FULL)
        record["acceptance"] = acceptance(record["methods"])
        record["texts"] = {name: [text[:400] for text in texts[name][:3]] for name in texts}
        if not arguments.fast:  # written before the judge starts, which may lack its model
            harness.write_json(output, record)
            harness.write_json(side, texts)
    if arguments.part != "train":
        judge(record, texts, arguments.judge_device or arguments.device)
        if not arguments.fast:
            harness.write_json(output, record)
    print(json.dumps(record["acceptance"], indent=1))


if __name__ == "__main__":
    main()
