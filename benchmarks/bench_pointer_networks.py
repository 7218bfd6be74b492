"""Pointer networks on convex hulls and round trips: how often right, how far from the best, and beyond the training.

    python benchmarks/bench_pointer_networks.py --device cuda             # some seven minutes on a GPU with 16 cores
    python benchmarks/bench_pointer_networks.py --device cpu --tasks hull # under half an hour on two cores
    python benchmarks/bench_pointer_networks.py --fast                    # smoke test, writes nothing
    python benchmarks/bench_pointer_networks.py --plot benchmarks/results/pointer_networks_cuda.json

The tasks of Vinyals et al. (arXiv 1506.03134, section 4) at 5 to 10 points. "lstm" is the paper's model, "blend" its
baseline with an attention that blends and a fixed output dictionary, "transformer" has a small Transformer in place of
the LSTM that reads. Each learning rate is tried in a shorter training and chosen by the loss on validation instances;
three seeds are then trained in full. Test instances are seen by nothing else.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import harness
import torch
from recorded_steps import RecordedSteps
from torch import nn
from transformers import BertConfig

from undersong import PointerNetworkConfig, PointerNetworkForConditionalGeneration
from undersong.data.geometry import ConvexHullDataset, TSPDataset
from undersong.generation.pointer_processors import decoding_steps, pointer_processors
from undersong.metrics.hull.measures import hull_scores
from undersong.metrics.tour.measures import tour_scores

RESULTS = Path(__file__).parent / "results"
DATASETS = {"hull": ConvexHullDataset, "tour": TSPDataset}
TRAIN, VALIDATION, TEST = 1_000, 2_000, 3_000  # seeds of the instances; training has one for each part
SIZES = range(5, 11)
KINDS = {"hull": ("lstm", "blend"), "tour": ("lstm", "transformer")}
RATES = {"lstm": (2e-3, 4e-3, 8e-3), "blend": (2e-3, 4e-3, 8e-3), "transformer": (5e-4, 1e-3, 2e-3)}
BEYOND = {"hull": (12, 15, 20, 30), "tour": (11, 12)}  # shortest tours are known for certain up to 12
if importlib.util.find_spec("elkai") is not None:
    BEYOND["tour"] += (20,)  # and in practice
WARMUP, CHECKS = 100, 8


@dataclass(frozen=True)
class Setting:
    """A training: progress is the larger share of `steps` and `seconds` spent, so that either ends it well."""

    hidden_size: int = 256
    batch: int = 512
    steps: int = 40_000
    seconds: float = 200
    rates: int = 3  # learning rates that are tried
    search: float = 0.25  # length of a training that tries a learning rate
    clip: float = 2.0
    rows: int = 300_000  # instances of each size, in parts
    parts: int = 6
    test_rows: int = 1_000
    beyond_rows: int = 500
    seeds: int = 3
    jobs: int = 12


GPU = Setting()
CPU = replace(GPU, batch=128, steps=6_000, seconds=360, rows=200_000, parts=2, jobs=2)
FAST = Setting(
    hidden_size=32,
    batch=32,
    steps=40,
    rates=1,
    rows=500,
    parts=1,
    test_rows=20,
    beyond_rows=10,
    seeds=1,
    jobs=1,
)


@dataclass(frozen=True)
class Job:
    task: str
    kind: str
    seed: int
    learning_rate: float
    device: str
    folder: str  # of the training instances

    @property
    def name(self):
        return f"{self.task} {self.kind}, seed {self.seed}, lr {self.learning_rate:g}"


def make_part(task, n, part, rows, folder):
    DATASETS[task](n, n, rows, seed=TRAIN + part).save(Path(folder) / f"{task}-{n}-{part}.safetensors")


def beside(processes, function, work):
    """`function(*arguments)` for all arguments in `work`, so many at a time."""
    if processes == 1:
        return [function(*arguments) for arguments in work]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, *zip(*work, strict=True)))


def make_instances(tasks, setting, folder):
    """Training instances as files, the longest work first; seconds it took."""
    start = time.perf_counter()
    rows = setting.rows // setting.parts
    work = [(task, n, part, rows, folder) for n in reversed(SIZES) for task in tasks for part in range(setting.parts)]
    beside(1 if setting.jobs == 1 else os.cpu_count(), make_part, work)
    return time.perf_counter() - start


@functools.cache
def load_instances(task, n, folder, device):
    parts = [DATASETS[task].load(path) for path in sorted(Path(folder).glob(f"{task}-{n}-*.safetensors"))]
    return tuple(torch.cat([getattr(part, name) for part in parts]).to(device) for name in ("points", "targets"))


def build(task, kind, setting):
    width = setting.hidden_size
    options = {"hidden_size": width, "mask_visited_in_training": task == "tour"}
    if kind == "blend":
        options |= {"attention_mode": "blend", "max_num_points": max(SIZES)}
    elif kind == "transformer":
        reader = BertConfig(
            hidden_size=width // 2,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=2 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=128,
            vocab_size=1,
        )
        options |= {"encoder_type": "transformer", "encoder_config": reader}
    return PointerNetworkForConditionalGeneration(PointerNetworkConfig(**options))


@torch.no_grad()
def validation_loss(model, task, rows):
    """Nats per id, the mean over the sizes."""
    device = model.device
    data = [DATASETS[task](n, n, rows, seed=VALIDATION) for n in SIZES]
    losses = [model(d.points.to(device), labels=d.targets.long().to(device)).loss.item() for d in data]
    return statistics.mean(losses)


class Training:
    """One model and its training, a step at a time; a GPU replays steps, one recorded for each size."""

    def __init__(self, job, setting):
        torch.manual_seed(job.seed)
        self.job, self.setting, self.model = job, setting, build(job.task, job.kind, setting).to(job.device)
        self.data = {n: load_instances(job.task, n, job.folder, job.device) for n in SIZES}
        self.generator = torch.Generator(job.device).manual_seed(job.seed)
        self.rate, self.total = (torch.zeros((), device=job.device) for _ in range(2))
        on_gpu = torch.device(job.device).type == "cuda"
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate, fused=on_gpu, capturable=on_gpu)
        sizes = torch.randint(len(SIZES), (setting.steps,), generator=torch.Generator().manual_seed(job.seed))
        self.sizes = [SIZES[i] for i in sizes.tolist()]
        self.steps, self.counted, self.history, self.start = 0, 0, [], None
        self.recorded = None
        if on_gpu:  # with a rate of 0, so that nothing is learned here
            self.recorded = RecordedSteps(self.generator)
            for n in SIZES:
                self.recorded.record(n, lambda n=n: self.learn(n))
            self.total.zero_()
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def learn(self, n):
        points, targets = self.data[n]
        rows = torch.randint(
            len(points), (self.setting.batch,), generator=self.generator, device=self.generator.device
        )
        self.optimizer.zero_grad()
        loss = self.model(points[rows], labels=targets[rows].long()).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.setting.clip)
        self.optimizer.step()
        self.total += loss.detach()

    def advance(self):
        """Takes a step; True while there is another."""
        self.start = self.start or time.perf_counter()
        progress = max(self.steps / self.setting.steps, (time.perf_counter() - self.start) / self.setting.seconds)
        if progress >= (len(self.history) + 1) / CHECKS:
            self.history.append({"step": self.steps, "loss": self.total.item() / self.counted})
            self.counted = 0
            self.total.zero_()
        if progress >= 1:
            return False
        rate = self.job.learning_rate * min(1, (self.steps + 1) / WARMUP) * (1 + math.cos(math.pi * progress)) / 2
        n = self.sizes[self.steps]
        if self.recorded is None:
            self.rate.fill_(rate)
            self.learn(n)
        else:
            with torch.cuda.stream(self.recorded.stream):
                self.rate.fill_(rate)
            self.recorded.replay(n)
        self.steps, self.counted = self.steps + 1, self.counted + 1
        return True

    def facts(self):
        seconds = time.perf_counter() - self.start
        self.model.eval()
        job = self.job
        facts = {"task": job.task, "kind": job.kind, "seed": job.seed, "learning_rate": job.learning_rate}
        facts |= {"steps": self.steps, "seconds": seconds, "history": self.history}
        facts["validation_loss"] = validation_loss(self.model, job.task, self.setting.test_rows)
        facts["parameters"] = sum(p.numel() for p in self.model.parameters())
        print(
            f"{job.name}: {self.steps} steps in {seconds:.0f} s, validation {facts['validation_loss']:.4f}", flush=True
        )
        return facts


def train(job, setting):
    """A trained model and what is to be told of the training."""
    torch.set_num_threads(1)
    training = Training(job, setting)
    while training.advance():
        pass
    return training.model, training.facts()


def train_side_by_side(jobs, setting):
    """The same for several on one GPU: each on a stream of its own, fed by turns."""
    trainings = [Training(job, setting) for job in jobs]
    torch.cuda.synchronize()
    waiting = trainings
    while waiting:
        waiting = [training for training in waiting if training.advance()]
    torch.cuda.synchronize()
    return [(training.model, training.facts()) for training in trainings]


@torch.no_grad()
def decode(model, task, points, *, constrained, beams=1):
    rules = pointer_processors(task, points) if constrained else None
    return model.generate(
        points,
        attention_mask=torch.ones(points.shape[:2], dtype=torch.long, device=points.device),
        max_new_tokens=decoding_steps(task, points.shape[1]),
        do_sample=False,
        num_beams=beams,
        logits_processor=rules,
    ).cpu()


def evaluate(model, task, n, rows):
    """Test figures at one size: free greedy decoding, then by the rules of the task; beams for tours."""
    data = DATASETS[task](n, n, rows, seed=TEST)
    scores = hull_scores if task == "hull" else tour_scores
    ways = {"free": {"constrained": False}, "rules": {"constrained": True}}
    if task == "tour":
        ways["beam 5"] = {"constrained": True, "beams": 5}
    found = {}
    for name, options in ways.items():
        ids = decode(model, task, data.points.to(model.device), **options)
        found[name] = scores(ids.tolist(), data.targets.tolist(), data.points.numpy())
    # NaN, a mean over nothing, is no JSON
    return {way: {k: None if math.isnan(v) else v for k, v in row.items()} for way, row in found.items()}


def evaluate_all(model, task, setting):
    most = model.config.max_num_points
    sizes = dict.fromkeys(SIZES, setting.test_rows) | dict.fromkeys(BEYOND[task], setting.beyond_rows)
    return {str(n): evaluate(model, task, n, rows) for n, rows in sizes.items() if most is None or n <= most}


def train_all(jobs, setting):
    """[(a trained model, facts)]: on a GPU side by side in this process, else in processes."""
    if jobs[0].device != "cpu":
        return train_side_by_side(jobs, setting)
    return beside(setting.jobs, train, [(job, setting) for job in jobs])


def test_model(folder, task, device, setting):
    torch.set_num_threads(1)
    model = PointerNetworkForConditionalGeneration.from_pretrained(folder).to(device).eval()
    return evaluate_all(model, task, setting)


def run_all(tasks, setting, device, keep=None):
    pairs = [(task, kind) for task in tasks for kind in KINDS[task]]
    with tempfile.TemporaryDirectory() as folder:
        seconds = make_instances(tasks, setting, folder)
        print(f"instances: {seconds:.0f} s", flush=True)
        jobs = [Job(*pair, 0, rate, device, folder) for pair in pairs for rate in RATES[pair[1]][: setting.rates]]
        short = replace(setting, steps=int(setting.steps * setting.search), seconds=setting.seconds * setting.search)
        tried = [facts for _, facts in train_all(jobs, short)]
        best = {}
        for task, kind in pairs:
            own = [run for run in tried if (run["task"], run["kind"]) == (task, kind)]
            best[task, kind] = min(own, key=lambda run: run["validation_loss"])["learning_rate"]
        jobs = [Job(*pair, seed, best[pair], device, folder) for seed in range(setting.seeds) for pair in pairs]
        work, runs = [], []
        for i, (model, facts) in enumerate(train_all(jobs, setting)):
            model.save_pretrained(Path(folder) / str(i))
            work.append((Path(folder) / str(i), facts["task"], device, setting))
            runs.append(facts)
            if keep is not None and facts["seed"] == 0:
                model.save_pretrained(Path(keep) / f"{facts['task']}-{facts['kind']}")
        for facts, figures in zip(runs, beside(setting.jobs, test_model, work), strict=True):
            facts["test"] = figures
    return {"instances_seconds": seconds, "tried": tried, "runs": runs}


def retest(record, models):
    """The record with the figures of kept models measured anew; of the others those of beams are left out."""
    setting = Setting(**record["setting"])
    for run in record["runs"]:
        folder = Path(models) / f"{run['task']}-{run['kind']}"
        if run["seed"] == 0 and folder.is_dir():
            run["test"] = test_model(folder, run["task"], "cpu", setting)
        else:
            for ways in run["test"].values():
                ways.pop("beam 5", None)
    record["retested"] = harness.run_record("pointer_networks", "cpu")
    record["acceptance"] = acceptance(record["runs"], list(dict.fromkeys(run["task"] for run in record["runs"])))
    return record


def mean(runs, task, kind, n, way, figure):
    ways = [run["test"].get(str(n), {}) for run in runs if (run["task"], run["kind"]) == (task, kind)]
    values = [found[way][figure] for found in ways if way in found]  # not every model was kept for a later test
    return None if None in values or not values else statistics.mean(values)


def difference(a, b):
    return None if None in (a, b) else a - b


def acceptance(runs, tasks):
    """The figures that were promised, as means over the seeds; None where nothing could be measured."""
    found = {}
    if "hull" in tasks:
        exact = {(kind, n): mean(runs, "hull", kind, n, "free", "accuracy") for kind in KINDS["hull"] for n in (5, 10)}
        found["hull, n=5: exact >= 0.85"] = exact["lstm", 5]
        found["hull, n=10: exact >= 0.65"] = exact["lstm", 10]
        found["hull, n=10: exact - blend >= 0.20"] = difference(exact["lstm", 10], exact["blend", 10])
        for n, least in ((10, 0.99), (20, 0.97)):
            found[f"hull, n={n}: area >= {least}"] = mean(runs, "hull", "lstm", n, "free", "area_coverage")
    if "tour" in tasks:
        gap = {way: mean(runs, "tour", "transformer", 10, way, "gap") for way in ("rules", "beam 5")}
        found["tour, n=10: gap <= 0.03, greedy by the rules"] = gap["rules"]
        kept = [run for run in runs if "beam 5" in run["test"]["10"]]
        of_kept = {way: mean(kept, "tour", "transformer", 10, way, "gap") for way in gap}
        found["tour, n=10: gap of beam 5 - greedy <= 0"] = difference(of_kept["beam 5"], of_kept["rules"])
        valid = (
            mean(runs, "tour", kind, n, way, "valid")
            for kind in KINDS["tour"]
            for n in (*SIZES, *BEYOND["tour"])
            for way in gap
        )
        found["tour: valid by the rules = 1, at every size"] = min(share for share in valid if share is not None)
    return found


def plot(record, path):
    """Draws the test figures of a record over the size of the instances: a line a kind and way, a dot a seed."""
    import matplotlib.pyplot as plt

    panels = {
        ("hull", "accuracy"): ("Hulls: share exactly right", {"free": "-"}),
        ("hull", "area_coverage"): ("Hulls: area covered", {"free": "-"}),
        ("tour", "gap"): ("Tours: length / shortest - 1", {"rules": "-", "beam 5": ":"}),
    }
    tasks = {run["task"] for run in record["runs"]}
    panels = {key: panel for key, panel in panels.items() if key[0] in tasks}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    colors = {"lstm": "tab:blue", "blend": "tab:orange", "transformer": "tab:green"}
    for axis, ((task, name), (title, ways)) in zip(axes[0], panels.items(), strict=True):
        axis.axvspan(min(SIZES), max(SIZES), color="0.93", label="sizes of training")
        for kind in KINDS[task]:
            runs = [run for run in record["runs"] if (run["task"], run["kind"]) == (task, kind)]
            for way, style in ways.items():
                sizes = [n for n in runs[0]["test"] if mean(runs, task, kind, n, way, name) is not None]
                if not sizes:
                    continue
                means = [mean(runs, task, kind, n, way, name) for n in sizes]
                label = kind if len(ways) == 1 else f"{kind}, {'greedy' if way == 'rules' else way}"
                axis.plot([int(n) for n in sizes], means, style, color=colors[kind], label=label)
                dots = [
                    (int(n), run["test"][n][way][name]) for run in runs for n in sizes if way in run["test"].get(n, {})
                ]
                axis.plot(*zip(*dots, strict=True), ".", color=colors[kind], markersize=4)
        axis.set(title=title, xlabel="points")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tasks", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--output", type=Path, help="where the record goes, or the picture with --plot")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="keeps the models of the first seed there")
    parser.add_argument("--retest", type=Path, metavar="RECORD", help="tests the beams of kept --models anew")
    parser.add_argument("--plot", type=Path, metavar="RECORD", help="only draw a record that is there already")
    arguments = parser.parse_args()
    if arguments.plot:
        record = json.loads(arguments.plot.read_text(encoding="utf-8"))
        plot(record, arguments.output or arguments.plot.with_suffix(".png"))
        return
    if arguments.retest:
        record = retest(json.loads(arguments.retest.read_text(encoding="utf-8")), arguments.models)
        harness.write_json(arguments.output or arguments.retest, record)
        return
    kind = torch.device(arguments.device).type
    setting = FAST if arguments.fast else GPU if kind == "cuda" else CPU
    found = run_all(arguments.tasks, setting, arguments.device, arguments.models)
    found["acceptance"] = acceptance(found["runs"], arguments.tasks)
    print(json.dumps(found["acceptance"], indent=1), flush=True)
    if not arguments.fast:
        record = harness.run_record("pointer_networks", arguments.device) | {"setting": asdict(setting)} | found
        harness.write_json(arguments.output or RESULTS / f"pointer_networks_{kind}.json", record)


if __name__ == "__main__":
    main()
