"""RMoE against other routers on bytes, a recurrent router attached to a trained model, and the speed of both.

    python benchmarks/bench_rmoe.py --device cuda                  # about eight minutes on an H100
    python benchmarks/bench_rmoe.py --device cpu                   # smaller, a quarter of an hour on two cores
    python benchmarks/bench_rmoe.py --part router                  # lm, retrofit or router, into the same file
    python benchmarks/bench_rmoe.py --fast                         # smoke test, writes nothing
    python benchmarks/bench_rmoe.py --plot benchmarks/results/rmoe_cuda.json

lm: byte language models ("Layerwise Recurrent Router for Mixture-of-Experts", arXiv 2408.06793), alike but for their
routers: "rmoe"; "detach", whose layers train without the gradient from layers above; "linear", Mixtral's; "mlp", a
perceptron in every layer with as many router parameters in all. Order of data and steps are the same. The learning
rate of each is the best of three on validation text, from trainings of a quarter of the steps; then three seeds are
trained. Test text is used for nothing else. Differences are paired by seed, intervals are 95 % t intervals.

retrofit: OLMoEs with their own linear routers, then a further training of routers alone: "attached", a recurrent
router added to the trained one, which is frozen with the rest, against "gate", their own routers. Every learning rate
is trained with every seed, and validation text chooses.

On a GPU a step of 16 x 512 bytes at 3.8 M active weights is about 0.25 TFLOP and moves some 6 GB: 2 to 4 ms, and
80,000 of them, side by side, five minutes.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import harness
import rmoe_speed
import torch
from rmoe_training import Job, Size, text_of, train_all
from transformers.utils import logging

HERE = Path(__file__).parent
KINDS = ("rmoe", "detach", "linear", "mlp")
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of Student's t at 97.5 %, by the number of seeds


@dataclass(frozen=True)
class Setting:
    lm: Size
    retrofit: Size
    lm_steps: int = 4000
    base_steps: int = 3000
    retrofit_steps: int = 500
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    base_rate: float = 2e-3
    retrofit_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    search: float = 0.25  # of the steps
    seeds: int = 3
    tokens: tuple[int, ...] = rmoe_speed.TOKENS
    backward_tokens: tuple[int, ...] = (8192,)
    experts: tuple[int, ...] = (768, 1024, 16, 4)  # hidden, width, experts, experts of a token
    expert_tokens: tuple[int, ...] = (1, 64, 512)


GPU = Setting(lm=Size(256, 8, 128), retrofit=Size(192, 6, 48))
SMALL = Size(128, 4, 64, experts=8, router_size=32, length=128, batch=8, text=4_000_000, windows=256)
CPU = Setting(
    lm=SMALL,
    retrofit=replace(SMALL, layers=3),
    lm_steps=500,
    base_steps=500,
    retrofit_steps=120,
    rates=(2e-3, 4e-3, 8e-3),
    base_rate=4e-3,
    backward_tokens=(256,),
)
TINY = Size(64, 2, 16, experts=4, router_size=8, length=32, batch=2, text=1_000_000, windows=8)
FAST = Setting(
    lm=TINY,
    retrofit=TINY,
    lm_steps=8,
    base_steps=6,
    retrofit_steps=4,
    rates=(2e-3,),
    retrofit_rates=(3e-3,),
    seeds=1,
    tokens=(1, 16),
    backward_tokens=(16,),
    experts=(32, 16, 4, 2),
    expert_tokens=(1, 16),
)


def interval(values):
    """Mean and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return {"mean": values[0], "half_width": None}
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half_width": half}


def of(runs, **which):
    return [run for run in runs if all(run[name] == value for name, value in which.items())]


def versus(runs, ours, theirs, key="test"):
    """The difference of two kinds, paired by seed."""
    pairs = zip(of(runs, kind=ours), of(runs, kind=theirs), strict=True)
    return interval([a[key] - b[key] for a, b in pairs])


def best_rates(tried, rates):
    """Of every kind the rate with the lowest mean validation loss."""
    return {
        kind: min(rates, key=lambda rate: statistics.mean(r["validation"] for r in of(tried, kind=kind, rate=rate)))
        for kind in dict.fromkeys(run["kind"] for run in tried)
    }


def edge(chosen, rates):
    """Kinds whose best rate is the smallest or largest that was tried: another might be better."""
    return [kind for kind, rate in chosen.items() if rate in (min(rates), max(rates))]


def byte_models(setting, device):
    short = max(1, int(setting.search * setting.lm_steps))
    jobs = [Job(kind, 100, rate, short) for kind in KINDS for rate in setting.rates]  # a seed of its own
    tried = train_all(jobs, setting.lm, device)
    rates = best_rates(tried, setting.rates)
    jobs = [Job(kind, seed, rates[kind], setting.lm_steps) for kind in KINDS for seed in range(setting.seeds)]
    runs = train_all(jobs, setting.lm, device)
    return {
        "rates": rates,
        "at_the_edge": edge(rates, setting.rates),
        "tried": [{name: run[name] for name in ("kind", "rate", "steps", "validation")} for run in tried],
        "bits_per_byte": {kind: interval([run["test"] for run in of(runs, kind=kind)]) for kind in KINDS},
        "rmoe_minus": {kind: versus(runs, "rmoe", kind) for kind in KINDS if kind != "rmoe"},
        "runs": runs,
    }


def retrofit(setting, device, folder):
    """Models and routers stay in the folder."""
    size, seeds = setting.retrofit, range(setting.seeds)
    bases = train_all([Job("base", s, setting.base_rate, setting.base_steps, folder) for s in seeds], size, device)
    jobs = [
        Job(kind, seed, rate, setting.retrofit_steps, folder)
        for kind in ("attached", "gate")
        for rate in setting.retrofit_rates
        for seed in seeds
    ]
    tried = train_all(jobs, size, device)
    rates = best_rates(tried, setting.retrofit_rates)
    runs = bases + [run for run in tried if run["rate"] == rates[run["kind"]]]
    kinds = "base", "attached", "gate"
    return {
        "rates": rates,
        "at_the_edge": edge(rates, setting.retrofit_rates),
        "tried": [{name: run[name] for name in ("kind", "seed", "rate", "validation")} for run in tried],
        "bits_per_byte": {kind: interval([run["test"] for run in of(runs, kind=kind)]) for kind in kinds},
        "attached_minus": {kind: versus(runs, "attached", kind) for kind in ("base", "gate")},
        "runs": runs,
    }


def speed(setting, device):
    bench = harness.Benchmark("rmoe", device)
    found = {"router": rmoe_speed.routers(bench, setting.tokens, setting.backward_tokens)}
    found["steps"] = rmoe_speed.steps(bench, setting.lm)
    if not bench.on_gpu:
        found["experts"] = rmoe_speed.experts(bench, *setting.experts, setting.expert_tokens)
    print(bench.table(), flush=True)
    return {"yardsticks": bench.yardsticks, "cases": bench.cases, "acceptance": rmoe_speed.acceptance(found)}


def acceptance(record):
    """Signs are published whatever they are; `clear` says whether the interval leaves 0 out."""
    table = {}
    for part, ours, field in (("lm", "RMoE", "rmoe_minus"), ("retrofit", "attached router", "attached_minus")):
        for kind, difference in record.get(part, {}).get(field, {}).items():
            if kind != "detach":  # an ablation; nobody promised anything
                mean, half = difference["mean"], difference["half_width"]
                row = {"goal": "< 0", "measured": mean, "half_width": half, "met": mean < 0}
                table[f"{part}: {ours} minus {kind}, bits a byte"] = row | {
                    "clear": half is not None and abs(mean) > half
                }
    return table | record.get("speed", {}).get("acceptance", {})


def plot(record, path):
    """Training curves of the byte models, and router statistics before and after the retrofit; needs matplotlib."""
    import matplotlib.pyplot as plt

    from undersong.training.router_stats import NAMES, plot_router_stats

    if "lm" in record:
        figure, axes = plt.subplots(1, 1 + len(NAMES), figsize=(16, 3.6), layout="constrained")
        for index, kind in enumerate(KINDS):
            runs = of(record["lm"]["runs"], kind=kind)
            mean = record["lm"]["bits_per_byte"][kind]
            axes[0].errorbar(index, mean["mean"], yerr=mean["half_width"], fmt="o", capsize=4)
            axes[0].plot([index + 0.15] * len(runs), [run["test"] for run in runs], ".", color="0.5")
            for axis, name in zip(axes[1:], NAMES, strict=True):
                values = [
                    statistics.mean(layer) for layer in zip(*(r["router_stats"][name] for r in runs), strict=True)
                ]
                axis.plot(values, marker="o", label=kind)
                axis.set(title=name.replace("_", " "), xlabel="layer")
        axes[0].set_xticks(range(len(KINDS)), KINDS)
        axes[0].set_title("bits a byte on test text")
        axes[1].legend()
        figure.savefig(path.with_name(f"{path.stem}_lm.png"), dpi=130)
        plt.close(figure)
    if "retrofit" in record:
        before, after = (
            of(record["retrofit"]["runs"], kind=k, seed=0)[0]["router_stats"] for k in ("base", "attached")
        )
        plot_router_stats(before, after, path.with_name(f"{path.stem}_retrofit.png"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fast", action="store_true", help="tiny sizes, nothing is written")
    parser.add_argument("--part", choices=["lm", "retrofit", "router", "all"], default="all")
    parser.add_argument(
        "--write-checkpoints", nargs="?", const=HERE.parent / "hub_configs", type=Path, metavar="FOLDER"
    )
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--plot", type=Path, metavar="RECORD", help="only draw a record that is there already")
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(json.loads(arguments.plot.read_text(encoding="utf-8")), arguments.plot)
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, begin = arguments.device, time.perf_counter()
    on_gpu = torch.device(device).type == "cuda"
    setting = FAST if arguments.fast else GPU if on_gpu else CPU
    output = arguments.output or HERE / "results" / f"rmoe_{'cuda' if on_gpu else 'cpu'}.json"
    found = {}
    if arguments.part in ("router", "all"):  # first: nothing else runs yet
        found["speed"] = speed(setting, device)
    if arguments.part in ("lm", "all"):
        found["lm"] = byte_models(setting, device)
    if arguments.part in ("retrofit", "all"):
        with tempfile.TemporaryDirectory() as folder:
            found["retrofit"] = retrofit(setting, device, folder)
            if arguments.write_checkpoints is not None:
                from rmoe_checkpoints import write_checkpoints

                facts = harness.run_record("rmoe", device)
                found["retrofit"]["published"] = write_checkpoints(
                    arguments.write_checkpoints, folder, found["retrofit"], setting, facts, device
                )
    record = harness.run_record("rmoe", device) | {
        "setting": asdict(setting),
        "text": text_of(setting.lm.text, device)[1],
    }
    if output.exists() and arguments.part != "all" and not arguments.fast:  # the other parts stay
        record |= {
            part: old for part, old in json.loads(output.read_text(encoding="utf-8")).items() if part not in record
        }
    record |= found
    record["acceptance"] = acceptance(record)
    print(json.dumps(record["acceptance"], indent=1))
    print(f"{time.perf_counter() - begin:.0f} s")
    if not arguments.fast:
        harness.write_json(output, record)


if __name__ == "__main__":
    main()
