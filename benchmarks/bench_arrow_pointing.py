"""Arrow pointing: trained on pictures of 96 pixels, tested on those and on pictures of 192, pLSTM against ViT.

    python benchmarks/bench_arrow_pointing.py --device cuda --output benchmarks/results/arrow_pointing_cuda.json
    python benchmarks/bench_arrow_pointing.py --device cuda --write-checkpoint  # also hub_configs/plstm-arrow-pointing
    python benchmarks/bench_arrow_pointing.py --fast                             # small, writes nothing
    python benchmarks/bench_arrow_pointing.py --plot benchmarks/results/arrow_pointing_cuda.json

The task of pLSTM (arXiv 2506.11997, section 5) at half its size: objects of half as many pixels, patches of 8, and the
same objects on four times the area to extrapolate to. Both models are 96 wide with 4 layers and 3 heads; both see the
same pictures for as many steps. All learning rates and seeds of a kind train beside each other on one card. A kind's
rate is the one with the best mean accuracy on validation pictures of 96 pixels; test pictures, of either size, are
read once, at the end.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import harness
import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from undersong.data.arrow_pointing import ArrowPointingDataset
from undersong.hub.cards import model_card
from undersong.modeling.plstm_vision.configuration_plstm_vision import PLSTMVisionConfig
from undersong.modeling.plstm_vision.modeling_plstm_vision import PLSTMVisionForImageClassification

FOLDER = Path(__file__).parents[1] / "hub_configs" / "plstm-arrow-pointing"
OBJECTS = {"radius": (7.5, 15), "arrow_length": (7.5, 15), "arrow_width": (1, 3), "padding": 15}
SEEDS = {"train": 1, "validation": 2, "test": 3, "extrapolation": 4}
SHOWN = 12  # pictures of each size in the report
LARGEST = 8 << 20  # bytes of the checkpoint


@dataclass(frozen=True)
class Setting:
    size: int = 96
    patch: int = 8
    hidden_size: int = 96
    layers: int = 4
    train: int = 100_000
    epochs: int = 10
    batch: int = 128
    held_out: int = 4096  # pictures of validation, test and extrapolation each
    checks: int = 10  # of the validation accuracy, over the training
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)

    @property
    def steps(self):
        return self.epochs * self.train // self.batch


FULL = Setting()
FAST = Setting(96, 8, 48, 2, train=96, epochs=1, batch=32, held_out=32, checks=1, learning_rates=(1e-3,))


def build(kind, setting):
    common = {
        "image_size": setting.size,
        "patch_size": setting.patch,
        "hidden_size": setting.hidden_size,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": 3,
        "id2label": {0: "misses", 1: "points at the disc"},
        "label2id": {"misses": 0, "points at the disc": 1},
    }
    if kind == "plstm":
        return PLSTMVisionForImageClassification(PLSTMVisionConfig(**common))
    return ViTForImageClassification(ViTConfig(**common, intermediate_size=4 * setting.hidden_size))


def dataset(split, setting):
    side = setting.size * (2 if split == "extrapolation" else 1)
    count = setting.train if split == "train" else setting.held_out
    return ArrowPointingDataset(count, image_size=side, seed=SEEDS[split], **OBJECTS)


def draw(split, setting, start, stop):
    """Pictures `[n, side, side]` uint8 (black and white need one channel) and labels, from `start` to `stop`."""
    data = dataset(split, setting)
    items = [data[index] for index in range(start, min(stop, len(data)))]
    return np.stack([np.asarray(x["image"].convert("L")) for x in items]), np.array([x["label"] for x in items])


def draw_all(setting, folder, jobs):
    """Every split as two files that the processes read."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for split in SEEDS:
            count = len(dataset(split, setting))
            cut = math.ceil(count / (4 * jobs))
            parts = [pool.submit(draw, split, setting, begin, begin + cut) for begin in range(0, count, cut)]
            pictures, labels = zip(*(part.result() for part in parts), strict=True)
            np.save(folder / f"{split}_pictures.npy", np.concatenate(pictures))
            np.save(folder / f"{split}_labels.npy", np.concatenate(labels))


def load(split, folder, device):
    return tuple(
        torch.from_numpy(np.load(folder / f"{split}_{part}.npy")).to(device) for part in ("pictures", "labels")
    )


def pixels(pictures):
    """As the checkpoint's image processor gives them: three channels, from -1 to 1."""
    return (pictures.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def probabilities(model, pictures, batch=256):
    model.eval()
    found = []
    with torch.no_grad(), torch.autocast(pictures.device.type, torch.bfloat16, pictures.device.type == "cuda"):
        for part in pictures.split(batch):
            logits = model(pixels(part), interpolate_pos_encoding=True).logits
            found.append(logits.float().softmax(-1)[:, 1])
    model.train()
    return torch.cat(found)


def accuracy(model, pictures, labels):
    return ((probabilities(model, pictures) > 0.5) == labels.bool()).float().mean().item()


def train(kind, rate, seed, setting, device, folder):
    """One model: its record, and its weights in `folder`."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = build(kind, setting).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    warmup = max(setting.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / setting.steps, 1)))),
    )
    splits = {split: load(split, folder, device) for split in SEEDS}
    pictures, labels = splits["train"]
    order = torch.Generator().manual_seed(seed)
    losses, curve, step = [], [], 0
    while step < setting.steps:
        for chosen in torch.randperm(len(labels), generator=order).to(device).split(setting.batch):
            if len(chosen) < setting.batch or step == setting.steps:
                break
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = model(pixels(pictures[chosen]), labels=labels[chosen]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
            step += 1
            if step % max(setting.steps // setting.checks, 1) == 0:
                seen = {"step": step, "loss": torch.stack(losses).mean().item()}
                curve.append(seen | {"validation": accuracy(model, *splits["validation"])})
                losses.clear()
    seconds = time.perf_counter() - begin
    name = f"{kind}-{rate:g}-{seed}"
    model.save_pretrained(folder / name)
    return {
        "kind": kind,
        "learning_rate": rate,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "curve": curve,
        "name": name,
        **{split: accuracy(model, *splits[split]) for split in ("validation", "test", "extrapolation")},
        "shown": {s: probabilities(model, splits[s][0][:SHOWN]).tolist() for s in ("test", "extrapolation")},
    }


def choose(runs):
    """Of each kind the runs at the learning rate with the best mean validation accuracy."""
    chosen = {}
    for kind in dict.fromkeys(run["kind"] for run in runs):
        by_rate = {}
        for run in runs:
            if run["kind"] == kind:
                by_rate.setdefault(run["learning_rate"], []).append(run)
        chosen[kind] = max(by_rate.values(), key=lambda group: statistics.mean(run["validation"] for run in group))
    return chosen


def summary(chosen):
    table = {
        kind: {
            "learning_rate": runs[0]["learning_rate"],
            "parameters": runs[0]["parameters"],
            **{
                split: {"mean": statistics.mean(run[split] for run in runs), "all": [run[split] for run in runs]}
                for split in ("validation", "test", "extrapolation")
            },
        }
        for kind, runs in chosen.items()
    }
    gain = table["plstm"]["extrapolation"]["mean"] - table["vit"]["extrapolation"]["mean"]
    return table, {
        "extrapolation, plstm - vit >= 0.05": gain,
        "validation of plstm >= 0.90": table["plstm"]["validation"]["mean"],
    }


def plot(record, path):
    """Draws the validation curves and accuracies of a record, and pictures of both sizes with the model's answers."""
    import matplotlib.pyplot as plt

    setting = Setting(**{k: v for k, v in record["setting"].items() if k != "steps"})
    colors = {"plstm": "tab:blue", "vit": "tab:orange"}
    figure = plt.figure(figsize=(12, 7.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 4))
    curves, bars = above.subplots(1, 2)
    for at, (kind, runs) in enumerate(choose(record["runs"]).items()):
        for run in runs:
            curves.plot(*zip(*((p["step"], p["validation"]) for p in run["curve"]), strict=True), color=colors[kind])
        for split_at, split in enumerate(("test", "extrapolation")):
            values = [run[split] for run in runs]
            bars.bar(split_at + (at - 0.5) / 3, statistics.mean(values), 0.3, color=colors[kind], alpha=0.6)
            bars.plot([split_at + (at - 0.5) / 3] * len(values), values, "k.")
        curves.plot([], [], color=colors[kind], label=kind)
    curves.set(xlabel="step", ylabel="validation accuracy")
    curves.legend()
    sides = {"test": setting.size, "extrapolation": 2 * setting.size}
    bars.set(ylabel="accuracy", ylim=(0.4, 1), xticks=(0, 1), xticklabels=[f"{side} px" for side in sides.values()])
    (shown,) = (run["shown"] for run in record["runs"] if run["name"] == record["shown"])
    axes = below.subplots(2, 6)
    for row, (split, side) in zip(axes, sides.items(), strict=True):
        pictures, labels = draw(split, setting, 0, len(row))
        for axis, picture, label, p in zip(row, pictures, labels, shown[split], strict=False):
            axis.imshow(picture, cmap="gray")
            answer = "points at it" if p > 0.5 else "misses"
            color = "k" if (p > 0.5) == label else "r"
            axis.set_title(f"{side} px: {answer} ({max(p, 1 - p):.2f})", fontsize=8, color=color)
            axis.set(xticks=(), yticks=())
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_checkpoint(source, run, setting, facts):
    """The pLSTM with the best validation accuracy, its processor, and a card with figures of the files as they are."""
    model = PLSTMVisionForImageClassification.from_pretrained(source).eval()
    model.save_pretrained(FOLDER)
    if (size := sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))) > LARGEST:
        raise RuntimeError(f"the checkpoint ({size:,} bytes) must stay below {LARGEST:,}; train a smaller model.")
    # no resizing: a larger picture is a larger grid
    ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(FOLDER)
    of = {"task_type": "image-classification", "dataset_type": "synthetic", "metric_type": "accuracy"}
    results = [
        of
        | {
            "dataset_name": f"arrow pointing, {side} x {side} pixels",
            "dataset_args": {"seed": SEEDS[split], "samples": setting.held_out},
            "metric_value": round(run[split], 4),
        }
        for split, side in (("test", setting.size), ("extrapolation", 2 * setting.size))
    ]
    card = model_card(
        model,
        results={"hardware": facts["hardware"], "command": facts["command"], "results": results},
        repo_id="undersong/plstm-arrow-pointing",
        training_data=f"{setting.train:,} pictures of {setting.size} x {setting.size} pixels that"
        " `undersong.data.arrow_pointing` draws: an arrow and a disc; does the arrow point at the disc?",
        limitations="A demonstration of extrapolation to larger pictures that has seen black arrows and discs only."
        " Pictures have sides divisible by 8.",
    )
    (FOLDER / "README.md").write_text(str(card), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--fast", action="store_true", help="a smoke test: small sizes, nothing written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=9, help="models that train beside each other")
    parser.add_argument("--write-checkpoint", action="store_true", help=f"write hub_configs/{FOLDER.name}")
    parser.add_argument("--output", type=Path, help="JSON file to write, or the picture with --plot")
    parser.add_argument("--plot", type=Path, metavar="RECORD", help="only draw a record that is there already")
    arguments = parser.parse_args()
    if arguments.plot:
        record = json.loads(arguments.plot.read_text(encoding="utf-8"))
        plot(record, arguments.output or arguments.plot.with_suffix(".png"))
        return
    setting = FAST if arguments.fast else FULL
    seeds, jobs = (1, 1) if arguments.fast else (arguments.seeds, arguments.jobs)
    facts = harness.run_record("arrow pointing", arguments.device)
    record = facts | {"setting": asdict(setting) | {"steps": setting.steps}, "objects": OBJECTS, "seeds": SEEDS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw_all(setting, folder, jobs)
        runs, seconds = [], {}
        for kind in ("plstm", "vit"):
            begin = time.perf_counter()
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                trained = [
                    pool.submit(train, kind, rate, seed, setting, arguments.device, folder)
                    for rate in setting.learning_rates
                    for seed in range(seeds)
                ]
                runs += [future.result() for future in trained]
            seconds[kind] = time.perf_counter() - begin
        chosen = choose(runs)
        table, acceptance = summary(chosen)
        best = max(chosen["plstm"], key=lambda run: run["validation"])
        record |= {"seconds": seconds, "summary": table, "acceptance": acceptance, "runs": runs, "shown": best["name"]}
        for kind, row in table.items():
            figures = ", ".join(
                f"{split} {row[split]['mean']:.4f}" for split in ("validation", "test", "extrapolation")
            )
            print(f"{kind}: {row['parameters']:,} parameters, rate {row['learning_rate']:g}, {figures}")
        print(", ".join(f"{name}: {value:.4f}" for name, value in acceptance.items()), f"in {seconds}")
        if arguments.fast:
            return
        if arguments.output:
            harness.write_json(arguments.output, record)
        if arguments.write_checkpoint:
            shutil.rmtree(FOLDER, ignore_errors=True)
            write_checkpoint(folder / best["name"], best, setting, facts)


if __name__ == "__main__":
    main()
