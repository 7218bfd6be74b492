"""From a file of interactions to a saved recommender and a report: what `undersong recommend` does.

The report is one HTML file without scripts: test figures of the model and of popularity, the curves of the training,
and a few users' histories with what the model recommends them; the same facts are in `report.json`.
"""

from __future__ import annotations

import html
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import TrainerCallback

from ..data.interactions import Interactions
from ..metrics.ranking.measures import ranking_scores
from .full_rank_eval import full_ranks
from .recommenders import TrainedRecommender, popularity_ranks, train_recommender

FIGURE = "ndcg@10/full/unseen"


def recommend_run(
    data: Interactions,
    output: str | Path,
    kind: str = "bert4rec",
    *,
    examples: int = 5,
    k: int = 10,
    console: Console | None = None,
    **training,
) -> dict:
    """Trains, tests, saves and reports.

    Args:
        data: the interactions; each user's last item is the test, the one before validates.
        output: new or empty folder for the model (`from_pretrained` reads it), `report.html` and `report.json`.
        kind: "bert4rec", "gsasrec" or "sasrec".
        examples: how many users' recommendations the report shows. k: how many recommendations each.
        console: where progress and figures are printed.
        training: for `train_recommender`.

    Returns:
        What `report.json` holds.

    Raises:
        FileExistsError: `output` is a file, or holds something already.
        ValueError: nobody has three interactions, or options out of range.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"output ({output}) must be a new or empty folder; name another, or move what is there.")
    console, split = console or Console(), data.leave_one_out()
    console.print(f"{len(data):,} interactions of {len(data.user_ids):,} users with {data.num_items:,} items")
    columns = TextColumn("training {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        trained = train_recommender(split, data.vocab, kind, callbacks=[_Progress(progress)], **training)
    held = split.test
    figures = {
        kind: ranking_scores(full_ranks(trained.model, held.histories, held.targets)),
        "popularity": ranking_scores(popularity_ranks(split.train, held, data.num_items)),
    }
    report = {
        "model": kind,
        "users": len(data.user_ids),
        "items": data.num_items,
        "interactions": len(data),
        "protocol": "leave-one-out; the whole catalogue is ranked, items of the history left out; ties count against",
        "test": figures,
        "best_epoch": trained.best_epoch,
        "converged": trained.converged,
        "seconds": round(trained.seconds, 1),
        "curve": trained.curve,
        "examples": _examples(trained, data, held, examples, k),
    }
    trained.model.save_pretrained(output)
    (output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (output / "report.html").write_text(render(report), encoding="utf-8")
    _print(console, report, output)
    return report


def render(report: dict) -> str:
    """The HTML page of a report."""
    names = list(report["test"])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr><th>{key}</th>" + "".join(f"<td>{report['test'][name][key]:.4f}</td>" for name in names) + "</tr>"
        for key in report["test"][names[0]]
    )
    shown = "".join(
        f"<tr><td>{html.escape(row['user'])}</td><td>{_listed(row['history'])}</td>"
        f"<td>{_listed([row['next']])}</td><td>{_listed(row['recommended'])}</td></tr>"
        for row in report["examples"]
    )
    ended = "validation had stopped improving" if report["converged"] else "the epochs were used up: train longer"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report["model"])}: report</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; margin: 1rem 0 }} th, td {{ padding: .3rem .8rem; text-align: left }}
td {{ border-top: 1px solid #ddd; vertical-align: top }} svg {{ background: #fafafa; margin: .5rem 1rem .5rem 0 }}
</style></head><body><h1>{html.escape(report["model"])}</h1>
<p>{report["interactions"]:,} interactions of {report["users"]:,} users with {report["items"]:,} items. Protocol:
{report["protocol"]}. Trained for {report["seconds"]:.0f} s; best at epoch {report["best_epoch"]:g}; {ended}.</p>
<h2>Test</h2><table><tr><th></th>{head}</tr>{body}</table>
<h2>Training</h2>{_curve(report["curve"], "loss")}{_curve(report["curve"], FIGURE)}
<h2>Recommendations</h2><table><tr><th>user</th><th>history</th><th>next</th><th>recommended</th></tr>{shown}</table>
</body></html>
"""


class _Progress(TrainerCallback):
    def __init__(self, progress):
        self.progress, self.task = progress, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.progress.add_task("", total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and (value := logs.get(f"eval_{FIGURE}")) is not None:
            self.progress.update(self.task, description=f"(validation {FIGURE} {value:.4f})")


def _examples(trained: TrainedRecommender, data: Interactions, held, count, k):
    some = range(0, len(held), max(len(held) // max(count, 1), 1))[:count]

    def name(row):
        return data.titles.get(row) or str(data.vocab.decode([row])[0])

    rows = []
    for n in some:
        history = held.histories[n]
        readable = history[-trained.model.config.max_position_embeddings + 1 :]
        found = trained.model.recommend(
            [data.vocab.decode(readable)], k=k, exclude_ids=[data.vocab.decode(history)]
        ).item_ids[0]
        rows.append({
            "user": str(data.user_ids[held.users[n]]),
            "history": [name(row) for row in history[-10:]],
            "next": name(held.targets[n]),
            "recommended": [name(row) for row in data.vocab.encode(found)],
        })  # fmt: skip
    return rows


def _listed(names):
    return "<br>".join(html.escape(name) for name in names)


def _curve(rows, key, width=420, height=200):
    """A line over the epochs as SVG."""
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    if len(points) < 2:
        return ""
    (first, *_, last), values = [x for x, _ in points], [y for _, y in points]
    low, high = min(values), max(values)
    line = " ".join(
        f"{40 + (x - first) / (last - first) * (width - 60):.1f},"
        f"{height - 30 - (y - low) / ((high - low) or 1) * (height - 60):.1f}"
        for x, y in points
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{key} over epochs">'
        f'<polyline points="{line}" fill="none" stroke="#2463a8" stroke-width="2"/><g font-size="12">'
        f'<text x="40" y="16">{key}: {values[0]:.4g} to {values[-1]:.4g}, from {low:.4g} to {high:.4g}</text>'
        f'<text x="40" y="{height - 8}">epoch {first:g}</text>'
        f'<text x="{width - 20}" y="{height - 8}" text-anchor="end">{last:g}</text></g></svg>'
    )


def _print(console, report, output):
    table = Table("test", *report["test"])
    for key in report["test"][report["model"]]:
        table.add_row(key, *(f"{figures[key]:.4f}" for figures in report["test"].values()))
    console.print(table)
    if not report["converged"]:
        console.print("not converged: validation was still improving when the epochs ended; raise --epochs")
    for row in report["examples"]:
        history, found = ("; ".join(row[name][-3:] if name == "history" else row[name][:3]) for name in
                          ("history", "recommended"))  # fmt: skip
        console.print(f"user {row['user']}: ... {history} -> {found}", markup=False)
    console.print(f"model and report.html are in {output}", soft_wrap=True, markup=False)


__all__ = ["recommend_run", "render"]
