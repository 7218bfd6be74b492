"""What the runs of `bench_stuffed_mamba.py` amount to: means, acceptance figures, the Hub repository, the figures."""

import statistics
from pathlib import Path

from undersong import FastMamba2ForCausalLM
from undersong.hub.cards import model_card
from undersong.metrics.passkey.measures import t_recall
from undersong.metrics.state_capacity import fit_recall_length, fit_train_length

CHECKPOINT = Path(__file__).parents[1] / "hub_configs" / "stuffed-mamba"
COLLAPSE = 1.5  # beyond / within
LEARNED = 2.08  # nats within the training length; half of what guessing one of 64 tokens costs


def summary(setting, runs, passkey):
    """Means over seeds of what the runs gave, and the acceptance figures."""
    grid = []
    for N in setting.state_sizes:
        for T in setting.lengths:
            of = [run for run in runs if (run["N"], run["T"]) == (N, T)]
            keys = ("state_size", "within", "beyond", "ratio")
            grid.append({"N": N, "T": T} | {key: statistics.mean(run[key] for run in of) for key in keys})
            # a model that has learned nothing has nothing to lose
            learned = grid[-1]["within"] < LEARNED
            grid[-1]["collapsed"] = grid[-1]["ratio"] > COLLAPSE if learned else None
    forget = {}  # the shortest T beyond those that collapse
    for N in setting.state_sizes:
        of = [one for one in grid if one["N"] == N and one["collapsed"] is not None]
        last = max((one["T"] for one in of if one["collapsed"]), default=0)
        forget[N] = min((one["T"] for one in of if one["T"] > last), default=None)
    cell = [run for run in runs if (run["N"], run["T"]) == setting.cell]
    within, beyond = (statistics.mean(run[key] for run in cell) for key in ("within", "beyond"))
    remedies = {}
    for name in cell[0]["remedies"]:
        rows = [(run, run["remedies"][name]) for run in cell]
        restored = [(run["beyond"] - one["beyond"]) / (run["beyond"] - run["within"]) for run, one in rows]
        remedies[name] = {
            "beyond": statistics.mean(one["beyond"] for _, one in rows),
            "restored": statistics.mean(restored),
            "restored_by_seed": restored,
            "ratio": statistics.mean(one["ratio"] for _, one in rows),
            "times_uncontrolled": statistics.mean(one["beyond"] / run["beyond"] for run, one in rows),
            "within_changed": max(abs(one["all within"] / run["all within"] - 1) for run, one in rows),
        }
    recall = {kind: recall_of([run for run in passkey if run["kind"] == kind]) for kind in ("noise", "pairs")}
    found = {"grid": grid, "forgets_from": forget, "remedies": remedies, "passkey": recall}
    found |= {"cell": {"N": setting.cell[0], "T": setting.cell[1], "within": within, "beyond": beyond}}
    sizes = {one["N"]: one["state_size"] for one in grid}
    known = [(sizes[N], T) for N, T in forget.items() if T is not None]
    if len(known) > 1:
        found["train_length_fit"] = fit_train_length(*zip(*known, strict=True))
    for kind, sizes in recall.items():
        known = [(one["state_size"], one["t_recall"]) for one in sizes.values() if one["t_recall"]]
        if len(known) > 1:
            found[f"recall_length_fit, {kind}"] = fit_recall_length(*zip(*known, strict=True))
    return found


def recall_of(runs):
    """N -> mean accuracy over seeds, and T_recall of that mean."""
    found = {}
    for N in sorted({run["N"] for run in runs}):
        of = [run for run in runs if run["N"] == N]
        accuracies = [statistics.mean(c) for c in zip(*(run["accuracy_by_length"] for run in of), strict=True)]
        found[N] = {key: of[0][key] for key in ("state_size", "lengths")} | {"accuracy_by_length": accuracies}
        found[N] |= {"t_recall": t_recall(of[0]["lengths"], accuracies)}
        found[N] |= {"t_recall_by_seed": [run["t_recall"] for run in of]}
    return found


def acceptance(setting, found):
    remedies, cell = found["remedies"], found["cell"]
    forget = [T or float("inf") for T in found["forgets_from"].values()]
    figures = {f"collapse: beyond / within at the cell > {COLLAPSE}": cell["beyond"] / cell["within"]}
    figures["shortest length that does not collapse is non-decreasing in N"] = forget == sorted(forget)
    for name in ("window", "normalize", "rescale"):
        figures[f"{name}: beyond over uncontrolled <= 0.7"] = remedies[name]["times_uncontrolled"]
        figures[f"{name}: loss within T changed by < 0.02"] = remedies[name]["within_changed"]
    for name, one in remedies.items():
        target = "about 0, it is the control" if name == "same windows" else "> 0.5"
        figures[f"{name}: share of the gap restored {target}"] = one["restored"]
    figures["state passing: beyond / within < 1.1"] = remedies["state passing"]["ratio"]
    for kind, sizes in found["passkey"].items():
        small, large = (sizes[N] for N in (min(sizes), max(sizes)))
        name = f"passkey, {kind}: T_recall of the largest over the smallest state >= 4"
        figures[name] = large["t_recall"] / (
            small["t_recall"] or small["lengths"][0]
        )  # at least, if it recalls nothing
    return figures


def write_checkpoint(folder, record):
    """The collapsed model of the first seed with its card, as a Hub repository."""
    model = FastMamba2ForCausalLM.from_pretrained(folder)
    model.save_pretrained(CHECKPOINT)
    N, T = record["setting"]["cell"]
    one = next(run for run in record["runs"] if (run["N"], run["T"], run["seed"]) == (N, T, 0))
    setting = record["setting"]
    motifs = f"motifs of {setting['motif']} tokens, a new one every {setting['stretch']}"
    number = {
        "task_type": "text-generation",
        "dataset_type": "repeated-motifs",
        "dataset_name": motifs,
        "metric_type": "loss",
    }
    results = [("within", f"tokens {T // 2} to {T}"), ("beyond", f"tokens {4 * T} to {8 * T}")]
    results = [number | {"metric_name": f"loss, {name}", "metric_value": round(one[key], 4)} for key, name in results]
    hardware, versions = record["hardware"]["device"], record["versions"]
    hardware = f"{hardware} (python {versions['python']}, torch {versions['torch']})"
    card = model_card(
        model,
        repo_id="undersong/stuffed-mamba",
        results={"hardware": hardware, "command": record["command"], "results": results},
        training_data=(
            f"{setting['vocabulary']} kinds of tokens in {motifs} (`undersong.data.motifs`), {T} of them from an empty"
            f" state, and in {setting['beginnings']:.0%} of the rows the first of a text, where nothing has to be"
            f" forgotten; {setting['steps']} steps of AdamW without weight decay at a peak learning rate of"
            f" {setting['learning_rate']}, seed 0."
        ),
        limitations=(
            f"Made to fail: past the {T} tokens of its training the state collapses, as in arXiv 2410.07145, and the"
            " loss grows. It is there to try remedies on: `undersong.state_control`, or training with"
            " `undersong.training.StatePassingTrainer`. It knows no language."
        ),
    )
    card.save(CHECKPOINT / "README.md")


def plot(record, folder):
    """Loss over the position for every model and remedy, norms of states, and passkey accuracy."""
    from matplotlib.figure import Figure

    from undersong.metrics.state_capacity import plot_capacity, plot_recall

    folder.mkdir(parents=True, exist_ok=True)
    found, (N, T) = record["summary"], record["setting"]["cell"]
    cell = [run for run in record["runs"] if (run["N"], run["T"]) == (N, T)]

    def save(figure, name):
        figure.savefig(folder / name, dpi=120)

    def mean(curves):
        return [statistics.mean(column) for column in zip(*curves, strict=True)]

    def draw(axes, curve, T, **style):
        axes.plot([(i + 0.5) * T / 2 for i in range(len(curve))], curve, linewidth=1, **style)

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run in record["runs"]:
        if run["N"] == N and run["seed"] == 0:
            draw(left, run["curve"], run["T"], label=f"trained at {run['T']}")
    left.set(xlabel="position, tokens", ylabel="loss, nats", xscale="log", title=f"state size {N}")
    draw(right, mean([run["curve"] for run in cell]), T, label="as trained", color="black")
    for name in cell[0]["remedies"]:
        draw(right, mean([run["remedies"][name]["curve"] for run in cell]), T, label=name)
    right.axvline(T, color="0.5", linestyle=":")
    right.set(xlabel="position, tokens", title=f"trained at {T}, mean of {len(cell)} seeds")
    for axes in (left, right):
        axes.legend(fontsize="small")
    save(figure, "stuffed_mamba_loss.png")

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for layer, curve in enumerate(cell[0]["norms"]):
        axes.plot([(i + 1) * T / 2 for i in range(len(curve))], curve, label=f"layer {layer}")
    axes.axvline(T, color="0.5", linestyle=":")
    axes.set(xlabel="position, tokens", ylabel="largest norm of a head's state", yscale="log")
    axes.legend(fontsize="small")
    save(figure, "stuffed_mamba_norms.png")

    for kind, sizes in found["passkey"].items():
        plot_recall({f"N {N}": one for N, one in sizes.items()}, folder / f"stuffed_mamba_{kind}.png")
        if fit := found.get(f"recall_length_fit, {kind}"):
            known = [(one["state_size"], one["t_recall"]) for one in sizes.values() if one["t_recall"]]
            path = folder / f"stuffed_mamba_{kind}_capacity.png"
            plot_capacity(*zip(*known, strict=True), fit, path, exponential=True)
