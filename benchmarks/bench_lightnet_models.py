"""LightNet against gated linear attention, linear attention and ViT of its size, on images and on bytes.

    python benchmarks/bench_lightnet_models.py                      # all parts; the byte models want a GPU
    python benchmarks/bench_lightnet_models.py --parts digits quadrant throughput --device cpu
    python benchmarks/bench_lightnet_models.py --fast               # a smoke run of every part, writes nothing
    python benchmarks/bench_lightnet_models.py --write-checkpoints hub_configs

Parts: "digits" (scikit-learn's, enlarged to 16 x 16), "quadrant" (where a bright patch lies, with and without position
encodings), "bytes" (causal and masked models of Python sources), "throughput" (64 x 64 patches), "decode" (memory of
generation). Every model trains at each of the same learning rates; the rate is chosen on validation data, and test
data is read for that rate alone. `--write-checkpoints` saves the chosen LightNets of the first seed, with figures.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import harness
import torch
from gated_linear_attention import exchange_attention
from library_bytes import library_bytes
from transformers import ViTConfig, ViTForImageClassification

from undersong.data.digits import digits
from undersong.hub.cards import model_card
from undersong.modeling.lightnet.configuration_lightnet import LightNetConfig
from undersong.modeling.lightnet.modeling_lightnet import LightNetForCausalLM, LightNetForMaskedLM
from undersong.modeling.lightnet_vision.configuration_lightnet_vision import LightNetVisionConfig
from undersong.modeling.lightnet_vision.modeling_lightnet_vision import LightNetVisionForImageClassification

PARTS = ("digits", "quadrant", "bytes", "throughput", "decode")
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
VISION = {"image_size": 16, "patch_size": 2, "num_channels": 1, "num_labels": 10, "hidden_size": 128,
          "num_hidden_layers": 5, "num_attention_heads": 4, "expand_ratio": 32, "intermediate_size": 256,
          "gate_low_rank_dim": 32}  # fmt: skip
TEXT = {"vocab_size": 257, "hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4, "expand_ratio": 40,
        "intermediate_size": 448, "gate_low_rank_dim": 40, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
MASK_ID = 256
BATCH, LENGTH = 32, 1024  # of the byte models
NO_POSITIONS = {"use_lrpe": False, "use_tpe": False}


def image_model(kind, **options):
    if kind == "vit":
        shared = ("image_size", "patch_size", "num_channels", "num_labels", "hidden_size", "num_hidden_layers",
                  "num_attention_heads")  # fmt: skip
        sizes = {name: {**VISION, **options}[name] for name in shared}
        return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=2 * VISION["hidden_size"] + 160))
    model = LightNetVisionForImageClassification(LightNetVisionConfig(**{**VISION, **options}))
    return model if kind == "lightnet" else exchange_attention(model, kind)


def text_model(kind):
    if kind == "lightnet masked":
        return LightNetForMaskedLM(LightNetConfig(**TEXT, use_tpe=True))
    # every causal model gets MD-TPE, so that they differ in the recurrence alone
    model = LightNetForCausalLM(LightNetConfig(**TEXT, use_tpe=True))
    return model if kind == "lightnet" else exchange_attention(model, kind)


def fit(model, batches, rate, device, steps):
    """AdamW, 5% warm-up, cosine to zero; returns seconds."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    begin = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**{name: x.to(device) for name, x in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def choose(train_and_score, rates, seeds, better):
    """Runs of every rate and seed -> the rate with the best mean validation figure, and its test figures.

    train_and_score: (rate, seed) -> {"model", "validation", "test", "seconds"}, "test" a function."""
    runs = {rate: [train_and_score(rate, seed) for seed in seeds] for rate in rates}
    means = {rate: statistics.mean(run["validation"] for run in of_rate) for rate, of_rate in runs.items()}
    best = better(means, key=means.get)
    test = [run["test"]() for run in runs[best]]
    model = runs[best][0]["model"]
    return {
        "learning_rate": best,
        "validation_mean_by_rate": means,
        "test_by_seed": test,
        "test_mean": statistics.mean(test),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_mean": statistics.mean(run["seconds"] for of_rate in runs.values() for run in of_rate),
    }, model


# Images


def labelled_digits():
    def enlarge(part):
        images = part.past_values.view(-1, 1, 8, 8)
        return torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear") * 2 - 1, part.labels

    return {name: enlarge(part) for name, part in digits().items()}


def quadrants(count, seed):
    """16 x 16 noise with a bright 2 x 2 patch somewhere; the label says in which quadrant."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 1, 16, 16, generator=generator)
    row, column = torch.randint(8, (2, count), generator=generator)
    patches = images.view(count, 8, 2, 8, 2)
    patches[torch.arange(count), row, :, column] += 3.0
    return images, (row >= 4) * 2 + (column >= 4)


def image_batches(images, labels, size, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(labels), generator=generator).split(size):
            yield {"pixel_values": images[index], "labels": labels[index]}


@torch.no_grad()
def accuracy(model, images, labels, device):
    model.eval()
    guesses = [model(pixel_values=part.to(device)).logits.argmax(-1).cpu() for part in images.split(360)]
    return (torch.cat(guesses) == labels).double().mean().item()


def train_images(kind, data, options, steps, device):
    def run(rate, seed):
        torch.manual_seed(seed)
        model = image_model(kind, **options)
        seconds = fit(model, image_batches(*data["train"], 64, seed), rate, device, steps)
        return {"model": model, "seconds": seconds, "validation": accuracy(model, *data["validation"], device),
                "test": lambda: accuracy(model, *data["test"], device)}  # fmt: skip

    return run


def part_digits(settings):
    data, models, saved = labelled_digits(), {}, {}
    for kind in ("lightnet", "gla", "gla two scans", "vit"):
        run = train_images(kind, data, {}, settings.steps(600), settings.device)
        models[kind], saved[kind] = choose(run, settings.rates, settings.seeds, max)
        print(f"digits {kind:<14} test {models[kind]['test_mean']:.4f} at {models[kind]['learning_rate']}", flush=True)
    ours = models["lightnet"]["test_mean"]
    acceptance = {
        "digits: LightNet - one-scan GLA >= 2 points": 100 * (ours - models["gla"]["test_mean"]),
        "digits: LightNet - ViT >= -1 point": 100 * (ours - models["vit"]["test_mean"]),
    }
    settings.checkpoint(
        "lightnet-digits",
        saved["lightnet"],
        lambda model: accuracy(model, *data["test"], settings.device),
        {
            "result": {
                "task_type": "image-classification",
                "dataset_type": "digits",
                "dataset_name": "scikit-learn digits, enlarged to 16 x 16",
                "metric_type": "accuracy",
                "metric_name": "accuracy",
            },
            "training_data": "1,077 handwritten digits of scikit-learn, enlarged to 16 x 16, values in [-1, 1].",
            "limitations": "A demonstration: it knows centred grey digits of this one collection.",
        },
    )
    return {"models": models}, acceptance


def part_quadrant(settings):
    sizes = {"train": (4096, 0), "validation": (512, 1), "test": (1024, 2)}
    data, models = {name: quadrants(*size) for name, size in sizes.items()}, {}
    for name, options in {"with positions": {}, "without": NO_POSITIONS}.items():
        run = train_images("lightnet", data, {**options, "num_labels": 4}, settings.steps(400), settings.device)
        models[name], _ = choose(run, settings.rates[:2], settings.seeds[:1], max)
        print(f"quadrant {name:<14} test {models[name]['test_mean']:.4f}", flush=True)
    acceptance = {
        "quadrant: with positions >= 0.95": models["with positions"]["test_mean"],
        "quadrant: without, about 0.25": models["without"]["test_mean"],
    }
    return {"models": models}, acceptance


def part_throughput(settings):
    """Images a second of inference and of training, 64 x 64 patches, interleaved."""
    side = settings.small(64, 8)
    options = {"image_size": 2 * side}
    on_gpu = settings.device == "cuda"
    bench = harness.Benchmark("throughput", device=settings.device, rounds=20, threads=None if on_gpu else 1)
    models = {kind: image_model(kind, **options).to(settings.device).eval() for kind in ("lightnet", "gla two scans")}
    if on_gpu:
        models = {kind: model.bfloat16() for kind, model in models.items()}
    weight = next(models["lightnet"].parameters())
    images = torch.randn(settings.small(8, 1), 1, 2 * side, 2 * side, device=weight.device, dtype=weight.dtype)
    labels = torch.zeros(len(images), dtype=torch.long, device=weight.device)

    def infer(model):
        with torch.no_grad():
            return model(pixel_values=images).logits

    def train(model):
        model(pixel_values=images, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    unchecked = dict.fromkeys(models, "models with weights of their own")
    rows = {}
    for name, call in (("inference", infer), ("training", train)):
        calls = {kind: lambda model=model, call=call: call(model) for kind, model in models.items()}
        rows[name] = bench.add(f"{name}, {side} x {side} patches", calls, reference=[], tolerance=0.0,
                               unchecked=unchecked, baseline="gla two scans")  # fmt: skip
    print(bench.table(), flush=True)
    acceptance = {f"{side} x {side} patches, {name}: LightNet over two-scan GLA >= 1.8": row["lightnet"]["speedup"]
                  for name, row in rows.items()}  # fmt: skip
    return {"cases": bench.cases}, acceptance


# Bytes


def byte_batches(stream, batch, length, seed, masked=False):
    generator = torch.Generator().manual_seed(seed)
    while True:
        begins = torch.randint(len(stream) - length, (batch,), generator=generator)
        ids = stream[begins[:, None] + torch.arange(length)].long()
        yield mask_bytes(ids, generator) if masked else {"input_ids": ids, "labels": ids}


def mask_bytes(ids, generator):
    """15% of positions are to be told: 80% of them hidden, 10% replaced, 10% kept."""
    told = torch.rand(ids.shape, generator=generator) < 0.15
    fate = torch.rand(ids.shape, generator=generator)
    other = torch.randint(256, ids.shape, generator=generator)
    shown = torch.where(told & (fate < 0.8), MASK_ID, torch.where(told & (fate >= 0.9), other, ids))
    return {"input_ids": shown, "labels": torch.where(told, ids, -100)}


@torch.no_grad()
def score_bytes(model, stream, batch, length, device, masked):
    """(mean loss, accuracy) over 16 fixed batches, both of the labelled bytes."""
    model.eval()
    loss = right = count = 0.0
    for inputs in itertools.islice(byte_batches(stream, batch, length, 12345, masked), 16):
        inputs = {name: x.to(device) for name, x in inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(**inputs)
        logits, labels = (
            (outputs.logits, inputs["labels"]) if masked else (outputs.logits[:, :-1], inputs["labels"][:, 1:])
        )
        told = labels != -100
        right += (logits.argmax(-1) == labels)[told].sum().item()
        loss, count = loss + outputs.loss.item() / 16, count + told.sum().item()
    return loss, right / count


def part_bytes(settings):
    parts, fingerprint = library_bytes(settings.small(20_000_000, 400_000))
    batch, length = settings.small(BATCH, 2), settings.small(LENGTH, 64)
    models, saved = {}, {}
    for kind in ("lightnet", "gla", "linear", "lightnet masked"):
        masked = kind.endswith("masked")

        def run(rate, seed, kind=kind, masked=masked):
            torch.manual_seed(seed)
            model = text_model(kind)
            batches = byte_batches(parts["train"], batch, length, seed, masked)
            seconds = fit(model, batches, rate, settings.device, settings.steps(3000))

            def score(part):
                return score_bytes(model, parts[part], batch, length, settings.device, masked)

            return {"model": model, "seconds": seconds, "validation": score("validation")[0],
                    "test": lambda: score("test")[0]}  # fmt: skip

        models[kind], saved[kind] = choose(run, settings.rates, settings.seeds[:1], min)
        models[kind]["test_accuracy"] = score_bytes(
            saved[kind], parts["test"], batch, length, settings.device, masked
        )[1]
        figures = {name: models[kind][name] for name in ("test_mean", "test_accuracy", "learning_rate")}
        print(f"bytes {kind:<16} {figures}", flush=True)
    loss = {kind: row["test_mean"] for kind, row in models.items()}
    acceptance = {
        "bytes: LightNet - GLA <= 0.05": loss["lightnet"] - loss["gla"],
        "bytes: LightNet - linear attention <= -0.03": loss["lightnet"] - loss["linear"],
        "bytes: masked - causal accuracy >= 0": models["lightnet masked"]["test_accuracy"]
        - models["lightnet"]["test_accuracy"],
    }
    settings.checkpoint(
        "lightnet-bytes",
        saved["lightnet"],
        lambda model: score_bytes(model, parts["test"], batch, length, settings.device, False)[0],
        {
            "result": {
                "task_type": "text-generation",
                "dataset_type": "python-sources",
                "dataset_name": "Python's standard library and torch, as bytes",
                "metric_type": "loss",
                "metric_name": "nats per byte",
            },
            "training_data": "About 20 MB of Python sources: the standard library's and torch's, a token a byte.",
            "limitations": "A demonstration of 2 million weights: it writes what looks like Python. Recall over long"
            " distances is weak by design: the weight of a new token falls like 1/t unless its key stands out.",
        },
    )
    return {"models": models, "texts": fingerprint}, acceptance


@torch.no_grad()
def part_decode(settings):
    """Bytes of the cache after 1k and 64k tokens."""
    model, sizes = text_model("lightnet").to(settings.device).eval(), {}
    cache, seen = None, 0
    for length in settings.small((1024, 65536), (16, 128)):
        while seen < length:
            ids = torch.randint(256, (1, min(4096, length - seen)), device=settings.device)
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
            seen += ids.shape[1]
        sizes[length] = sum(state.nbytes for layer in cache.layers for state in layer.states.values())
    first, last = sizes.values()
    return {"cache_bytes": sizes}, {"decode: cache after the longer text over the shorter = 1": last / first}


class Settings:
    def __init__(self, options):
        self.device, self.fast, self.folder = options.device, options.fast, options.write_checkpoints
        self.rates = RATES[1:2] if self.fast else RATES
        self.seeds = SEEDS[:1] if self.fast else SEEDS

    def small(self, full, fast):
        return fast if self.fast else full

    def steps(self, full):
        return self.small(full, 3)

    def checkpoint(self, name, model, measure, about):
        """Saves a model in bfloat16 and its card, whose figure `measure` finds on the files as they are.

        about: of the figure and the data, what `model_card` takes."""
        if self.folder is None or self.fast:
            return
        folder = Path(self.folder) / name
        model.to(torch.bfloat16).save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype=torch.float32).to(self.device)
        facts = harness.run_record("lightnet_models", self.device)
        versions = ", ".join(
            f"{package} {facts['versions'][package]}" for package in ("python", "torch", "transformers")
        )
        result = {**about["result"], "dataset_split": "test", "metric_value": round(measure(model), 4)}
        card = model_card(
            model,
            repo_id=f"undersong/{name}",
            results={
                "hardware": f"{facts['hardware']['device']} ({versions})",
                "command": facts["command"],
                "results": [result],
            },
            training_data=about["training_data"],
            limitations=about["limitations"],
        )
        (folder / "README.md").write_text(str(card), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--fast", action="store_true", help="a few steps of one rate and seed, nothing written")
    parser.add_argument("--write-checkpoints", default=None, metavar="FOLDER")
    parser.add_argument("--out", default=None)
    options = parser.parse_args()
    settings = Settings(options)
    path = Path(options.out or f"benchmarks/results/lightnet_models_{options.device}.json")
    record = harness.run_record("lightnet_models", options.device) | {"vision": VISION, "text": TEXT, "rates": RATES}
    record |= {"parts": {}, "acceptance": {}}
    for part in options.parts:
        record["parts"][part], acceptance = globals()[f"part_{part}"](settings)
        record["acceptance"] |= acceptance
        print(json.dumps(acceptance, indent=1), flush=True)
        if not options.fast:
            harness.write_json(path, record)  # after each part: a long run that is cut off leaves what it has


if __name__ == "__main__":
    main()
