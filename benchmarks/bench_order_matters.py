"""Does order matter: sorting with an encoder that sees a set, and training that searches the order of its targets.

    python benchmarks/bench_order_matters.py --device cuda          # 90 models that sort, minutes on a GPU
    python benchmarks/bench_order_matters.py --device cpu           # the same, smaller: an hour on 2 cores
    python benchmarks/bench_order_matters.py --fast                 # a few tiny models, writes nothing
    python benchmarks/bench_order_matters.py --plot benchmarks/results/order_matters_cuda.json

Both parts follow "Order Matters: Sequence to sequence for sets" (arXiv 1511.06391). Sorting (sec. 4.3): pointer
networks with an LSTM encoder, or with Read-Process-Write and P process steps, with 0 or 1 glimpses; new sets in every
step; a test set is right if all of its n + 1 ids are. Teacher forcing shows that: the most likely id is right at every
step if and only if greedy decoding is. "by the rules" leaves out ids that were used, as decoding with
PermutationLogitsProcessor does.

Order search (sec. 5): a small causal model writes five-word sentences of a Markov chain in their natural order, in a
scrambled one, in a random one of the two, or in the one of the two that `OrderSearchLoss` draws. A star is a binary
head with leaves that depend on it; there a search is among all orders of its variables. Entropies are exact.

On a GPU the sorting models train side by side in one process: every training step, with its data, is one CUDA graph on
a stream of its own. The order search runs beside it in CPU processes, as everything does on a CPU.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # streams that the GPU keeps apart; read when it starts

import harness
import torch
from recorded_steps import RecordedSteps
from transformers import LlamaConfig, LlamaForCausalLM

from undersong.data.joint_tokens import FIRST_TOKEN, SCRAMBLED, JointTokenDataset, MarkovSentences, Star
from undersong.data.sorting import sorting
from undersong.modeling.pointer_network.configuration_pointer_network import PointerNetworkConfig
from undersong.modeling.pointer_network.modeling_pointer_network import PointerNetworkForConditionalGeneration
from undersong.training.order_search import OrderSearchLoss

RESULTS = Path(__file__).parent / "results"
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by the number of seeds
LSTM = "lstm"  # beside numbers of process steps


@dataclass(frozen=True)
class Setting:
    sizes: tuple[int, ...] = (5, 10, 15)
    encoders: tuple[str | int, ...] = (LSTM, 0, 1, 5, 10)
    glimpses: tuple[int, ...] = (0, 1)
    seeds: int = 3
    hidden_size: int = 128
    batch: int = 128
    steps: int = 10_000
    learning_rate: float = 1e-3
    test_sets: int = 10_000
    search_steps: int = 1000
    search_batch: int = 64
    search_warmup: int = 300
    search_rows: int = 20_000
    search_test_rows: int = 4000
    star_steps: int = 900
    star_leaves: int = 6


GPU = Setting()
CPU = replace(GPU, hidden_size=64, steps=4000, learning_rate=2e-3)
FAST = replace(
    GPU,
    sizes=(3,),
    encoders=(LSTM, 1),
    glimpses=(1,),
    seeds=1,
    hidden_size=16,
    batch=32,
    steps=60,
    test_sets=200,
    search_steps=40,
    search_warmup=10,
    search_rows=500,
    search_test_rows=200,
    star_steps=20,
    star_leaves=3,
)


class SortingRun:
    """One model and its training, a step at a time; on a GPU a step is recorded once and then replayed."""

    def __init__(self, n, encoder, glimpses, seed, setting, device):
        self.labels = {"n": n, "encoder": encoder, "glimpses": glimpses, "seed": seed}
        self.n, self.setting, self.device = n, setting, torch.device(device)
        on_gpu = self.device.type == "cuda"
        torch.manual_seed(seed)
        self.model = PointerNetworkForConditionalGeneration(
            PointerNetworkConfig(
                input_size=1,
                hidden_size=setting.hidden_size,
                encoder_type=LSTM if encoder == LSTM else "set",
                num_process_steps=0 if encoder == LSTM else encoder,
                num_glimpses=glimpses,
            )
        ).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.rate = torch.full((), setting.learning_rate, device=self.device)
        self.count = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.rate, capturable=on_gpu)
        self.recorded = RecordedSteps(self.generator) if on_gpu else None

    def step(self):
        """The learning rate falls to 0 in a line; everything stays on the device."""
        values, labels = sorting(self.setting.batch, self.n, generator=self.generator)
        self.rate.copy_(self.setting.learning_rate * (1 - self.count / self.setting.steps))
        self.count += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_values=values, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()

    @torch.no_grad()
    def result(self):
        self.model.eval()
        generator = torch.Generator(self.device).manual_seed(10_000)
        values, labels = sorting(self.setting.test_sets, self.n, generator=generator)
        pieces = zip(values.split(1000), labels.split(1000), strict=True)
        logits = torch.cat([self.model(input_values=v, labels=y).logits for v, y in pieces])
        used = torch.nn.functional.one_hot(labels, self.n + 1).cumsum(1).roll(1, 1).bool()
        used[:, 0] = False
        used[:, :, 0] = torch.arange(self.n + 1, device=self.device) < self.n  # the end comes when nothing is left
        ways = {"free": logits, "rules": logits.masked_fill(used, -torch.inf)}
        right = {way: (scores.argmax(-1) == labels).all(1).float().mean().item() for way, scores in ways.items()}
        return self.labels | {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "loss": torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels).item(),
            "accuracy": right,
        }


def sorting_jobs(setting):
    return [
        (n, encoder, glimpses, seed)
        for n in setting.sizes
        for encoder in setting.encoders
        for glimpses in setting.glimpses
        for seed in range(setting.seeds)
    ]


def sort_side_by_side(setting, device):
    """All models at once on one GPU."""
    start = time.perf_counter()
    runs = [SortingRun(*job, setting, device) for job in sorting_jobs(setting)]
    taken = [run.recorded.record("step", run.step) for run in runs]
    print(f"sorting: {len(runs)} models recorded after {time.perf_counter() - start:.0f} s", flush=True)
    for step in range(max(taken), setting.steps):
        for run in runs:
            run.recorded.replay("step")
        if step % 1000 == 0:
            torch.cuda.synchronize()
            print(f"sorting: step {step} after {time.perf_counter() - start:.0f} s", flush=True)
    torch.cuda.synchronize()
    return [run.result() for run in runs], time.perf_counter() - start


def sort_alone(job, setting):
    """One model in a process of its own, on a CPU core."""
    torch.set_num_threads(1)
    run = SortingRun(*job, setting, "cpu")
    for _ in range(setting.steps):
        run.step()
    return run.result()


SEARCHES = {  # source -> way of training -> strategy, and whether the rows come in the source's other order
    "markov": {
        "natural": ("fixed", False),
        "scrambled": ("fixed", True),
        "random": ("random", False),
        "search": ("sample", False),
    },
    "star": {
        "head first": ("fixed", False),
        "head last": ("fixed", True),
        "random": ("random", False),
        "search, sampled": ("sample", False),
        "search, greedy": ("greedy", False),
    },
}


def search_alone(source_name, way, seed, setting):
    """A small causal model trained in one way; its loss is that of the order it would write in."""
    torch.set_num_threads(1)
    strategy, other = SEARCHES[source_name][way]
    if source_name == "markov":
        source, steps, other_order = MarkovSentences(), setting.search_steps, SCRAMBLED
        orders = [tuple(range(source.length)), SCRAMBLED]
    else:
        source, steps, orders = Star(setting.star_leaves, flip=0.2), setting.star_steps, None
        other_order = tuple(reversed(range(source.length)))
    order = other_order if other else None
    data = JointTokenDataset(source, setting.search_rows, seed=100 + seed, order=order)
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=source.vocab_size, **config))
    orders = None if strategy == "fixed" else orders
    search = OrderSearchLoss(strategy, setting.search_warmup, orders=orders)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 50) * (1 - s / steps))
    generator, entropy, start = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for step in range(steps):
        rows = torch.randint(len(data), (setting.search_batch,), generator=generator)
        chosen = search.choose(model, {"input_ids": data.input_ids[rows], "labels": data.labels[rows]}, step)
        entropy.append(chosen.entropy.mean().item())
        optimizer.zero_grad()
        model(**chosen.inputs).loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    test = JointTokenDataset(source, setting.search_test_rows, seed=10_000, order=order)
    test = {"input_ids": test.input_ids, "labels": test.labels}
    with torch.no_grad():
        # the best of the given orders; among all orders, the one that greedy writing takes
        chosen = search.choose(model, test, strategy="greedy" if strategy == "sample" else strategy).inputs
        nats = model(**chosen).loss.item() * (source.length + 1)
    result = {"source": source_name, "way": way, "seed": seed, "nats": nats, "source_entropy": source.entropy}
    result |= {"seconds": time.perf_counter() - start, "order_entropy": entropy[:: max(1, steps // 50)]}
    result["as_given"] = (chosen["input_ids"] == test["input_ids"]).all(1).float().mean().item()
    if source_name == "star":
        heads = (chosen["input_ids"][:, 1:-1] - FIRST_TOKEN) // 2 == 0
        result["place_of_head"] = heads.float().argmax(1).float().mean().item()
    return result


def interval(values):
    """Mean and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return {"mean": values[0], "half_width": None}
    width = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half_width": width}


def sorting_table(runs):
    """n -> encoder -> glimpses -> accuracy over the seeds, free and by the rules."""
    table = {}
    for run in runs:
        cell = table.setdefault(str(run["n"]), {}).setdefault(str(run["encoder"]), {})
        cell.setdefault(str(run["glimpses"]), []).append(run["accuracy"])
    for rows in table.values():
        for row in rows.values():
            for glimpses, found in row.items():
                row[glimpses] = {way: interval([accuracy[way] for accuracy in found]) for way in ("free", "rules")}
    return table


def search_table(runs):
    """Source -> way -> nats a row over the seeds."""
    table = {}
    for run in runs:
        table.setdefault(run["source"], {}).setdefault(run["way"], []).append(run["nats"])
    return {source: {way: interval(nats) for way, nats in ways.items()} for source, ways in table.items()}


def acceptance(sorts, searches):
    """The figures that were promised, as means over the seeds."""

    def accuracy(n, encoder, glimpses):
        return sorts[str(n)][str(encoder)][str(glimpses)]["free"]["mean"]

    found = {}
    if "5" in sorts:
        found["n=5: P=5 with a glimpse >= 0.90"] = accuracy(5, 5, 1)
        found["n=5: P=5 with a glimpse - P=0 without > 0.15"] = accuracy(5, 5, 1) - accuracy(5, 0, 0)
    if "10" in sorts:
        found["n=10: P=5 with a glimpse - without >= 0.15"] = accuracy(10, 5, 1) - accuracy(10, 5, 0)
    for n in sorts:
        if n in ("5", "10", "15"):
            best = max(accuracy(n, 5, 1), accuracy(n, 10, 1))
            found[f"n={n}: best read-process-write - LSTM encoder, both with a glimpse"] = best - accuracy(n, LSTM, 1)
    nats = {way: value["mean"] for way, value in searches["markov"].items()}
    found["order search: nats / natural order <= 1.02"] = nats["search"] / nats["natural"]
    found["order search: nats / random order < 0.95"] = nats["search"] / nats["random"]
    nats = {way: value["mean"] for way, value in searches["star"].items()}
    found["star: nats of the greedy search / head first"] = nats["search, greedy"] / nats["head first"]
    return found


def plot(record, path):
    """Draws accuracies of sorting over process steps, a panel a size, and nats of the order search."""
    import matplotlib.pyplot as plt

    sizes, sources = list(record["sorting"]), list(record["order_search"])
    figure, axes = plt.subplots(1, len(sizes) + len(sources), figsize=(3.1 * (len(sizes) + len(sources)), 3.2))
    for axis, n in zip(axes, sizes, strict=False):
        rows = record["sorting"][n]
        steps = [encoder for encoder in rows if encoder != LSTM]
        for color, glimpses in zip(("tab:orange", "tab:blue"), rows[LSTM], strict=False):
            name = f"glimpses: {glimpses}"
            cells = [rows[encoder][glimpses]["free"] for encoder in steps]
            means, widths = [cell["mean"] for cell in cells], [cell["half_width"] or 0 for cell in cells]
            axis.errorbar(range(len(steps)), means, widths, marker="o", capsize=3, color=color, label=f"set, {name}")
            lstm = rows[LSTM][glimpses]["free"]["mean"]
            axis.axhline(lstm, color=color, linestyle=":", label=f"LSTM encoder, {name}")
        axis.set_xticks(range(len(steps)), steps)
        axis.set(title=f"sorting {n} numbers", xlabel="process steps", ylim=(0, 1.02))
    axes[0].set_ylabel("share of sets sorted")
    axes[0].legend(fontsize=7)
    entropies = {run["source"]: run["source_entropy"] for run in record["search_runs"]}
    for axis, source in zip(axes[len(sizes) :], sources, strict=True):
        ways = record["order_search"][source]
        means, widths = [cell["mean"] for cell in ways.values()], [cell["half_width"] or 0 for cell in ways.values()]
        axis.errorbar(range(len(ways)), means, widths, fmt="o", capsize=3, color="tab:blue")
        axis.axhline(entropies[source], color="0.3", linestyle=":", label="entropy of the source")
        axis.set_xticks(range(len(ways)), [way.replace(" ", "\n") for way in ways], fontsize=7)
        axis.set(title=f"{source}: nats a row", xlim=(-0.5, len(ways) - 0.5))
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run_all(setting, device, jobs):
    searches = [(s, way, seed, setting) for s in SEARCHES for way in SEARCHES[s] for seed in range(setting.seeds)]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        if torch.device(device).type == "cuda":
            searched = [pool.submit(search_alone, *job) for job in searches]
            sorts, seconds = sort_side_by_side(setting, device)
        else:
            start = time.perf_counter()
            sorted_ = [pool.submit(sort_alone, job, setting) for job in sorting_jobs(setting)]
            searched = [pool.submit(search_alone, *job) for job in searches]
            sorts = [future.result() for future in sorted_]
            seconds = time.perf_counter() - start
        return {"sorting_runs": sorts, "sorting_seconds": seconds, "search_runs": [f.result() for f in searched]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="CPU processes")
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers to sort, instead of the setting's")
    parser.add_argument("--steps", type=int, help="training steps of the sorting models, instead of the setting's")
    parser.add_argument("--output", type=Path, help="where the record goes, or the picture with --plot")
    parser.add_argument("--plot", type=Path, metavar="RECORD", help="only draw a record that is there already")
    arguments = parser.parse_args()
    if arguments.plot:
        record = json.loads(arguments.plot.read_text(encoding="utf-8"))
        plot(record, arguments.output or arguments.plot.with_suffix(".svg"))
        return
    kind = torch.device(arguments.device).type
    setting = FAST if arguments.fast else GPU if kind == "cuda" else CPU
    if arguments.sizes:
        setting = replace(setting, sizes=tuple(arguments.sizes))
    if arguments.steps:
        setting = replace(setting, steps=arguments.steps)
    found = run_all(setting, arguments.device, arguments.jobs)
    tables = {"sorting": sorting_table(found["sorting_runs"]), "order_search": search_table(found["search_runs"])}
    print(json.dumps(tables, indent=1), flush=True)
    if not arguments.fast:
        tables["acceptance"] = acceptance(tables["sorting"], tables["order_search"])
        print(json.dumps(tables["acceptance"], indent=1), flush=True)
        record = harness.run_record("order_matters", arguments.device)
        record |= {"setting": asdict(setting), "jobs": arguments.jobs} | found | tables
        harness.write_json(arguments.output or RESULTS / f"order_matters_{kind}.json", record)


if __name__ == "__main__":
    main()
