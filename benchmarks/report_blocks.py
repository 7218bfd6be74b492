"""What sections of a report are made of: tables, figures, texts, and plots in the page's own colours."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from undersong.demo.report import _axes, _svg

BLUE, ORANGE, GREEN, PURPLE, GREY = "#2f7fd1", "#d9822b", "#3a9d6a", "#b0579c", "#8a8f98"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
ERROR_BAR = {"ecolor": "#888888", "elinewidth": 1.2, "capsize": 2}
GRID = {"color": "#8888", "linewidth": 0.5}


@dataclass(frozen=True)
class Section:
    """`build(records)` gets the records of `files` that exist and returns `(blocks, what was found)`.

    `accept(record)` gives the record's acceptance in a form that the report reads; by default what the record states.
    """

    id: str
    title: str
    intro: str
    files: tuple[str, ...]
    build: Callable
    accept: Callable = lambda record: record.get("acceptance", {})  # noqa: E731


@dataclass
class Table:
    """Rows of text under column names; `source` is the name of the results file without `.json`."""

    headers: list[str]
    rows: list[list[str]]
    caption: str
    source: str
    kind: str = field(default="table", init=False)


@dataclass
class Figure:
    """An inline SVG, what a screen reader says of it, and what is to be seen."""

    svg: str
    alt: str
    caption: str
    source: str
    kind: str = field(default="figure", init=False)


@dataclass
class Texts:
    """One prompt and what several methods made of it."""

    prompt: str
    texts: dict[str, str]
    source: str
    kind: str = field(default="texts", init=False)


def number(value, digits=3, half_width=None):
    """A figure as text, with its interval if it has one.

    >>> number(0.12345), number(12.345, 1, 0.25), number(None)
    ('0.123', '12.3 ± 0.2', '–')
    """
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {half_width:.{digits}f}" if half_width is not None else "")


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def bars(rows, *, xlabel, alt, caption, source, errors=None, reference=None, limit=None, form="{:.3g}", log=False):
    """Horizontal bars, the first row on top.

    Args:
        rows: name -> value, or name -> {series: value} for grouped bars.
        errors: name -> half width of an interval.
        reference: `(label, value)` of a dashed line, e.g. human text.
        limit: right end of the axis.
        log: logarithmic axis.
    """
    groups = {name: value if isinstance(value, dict) else {"": value} for name, value in rows.items()}
    series = list(dict.fromkeys(key for values in groups.values() for key in values))

    def draw(figure):
        from matplotlib.patches import Patch

        axes = _axes(figure, 1, 1, 1)
        height = 0.72 / len(series)
        for index, key in enumerate(series):
            for row, (name, values) in enumerate(groups.items()):
                if values.get(key) is None:
                    continue
                y, value, half = row + (index - (len(series) - 1) / 2) * height, values[key], (errors or {}).get(name)
                axes.barh(y, value, height * 0.92, color=COLORS[index % 5], xerr=half, error_kw=ERROR_BAR)
                place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
                axes.annotate(form.format(value), (max(value, 0) + (half or 0), y), **place)
        axes.set_yticks(range(len(groups)), [textwrap.fill(name, 24) for name in groups])
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        ends = [reference[1]] if reference else []
        for name, values in groups.items():
            ends += [value + ((errors or {}).get(name) or 0) for value in values.values() if value is not None]
        if log:
            axes.set_xscale("log")
            axes.set_xlim(0.5 * min(ends), 3 * max(ends))
        else:
            axes.set_xlim(min(0, 1.2 * min(ends)), limit or 1.22 * max(*ends, 1e-9))
        legend = [Patch(color=COLORS[index % 5], label=key) for index, key in enumerate(series) if key]
        if reference:
            legend.append(axes.axvline(reference[1], color=GREEN, ls="--", lw=1.2, label=reference[0]))
        if legend:
            figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    draw.__name__ = alt
    height = 0.9 + 0.26 * len(groups) * max(1, 0.6 * len(series)) + 0.2 * ((len(series) + bool(reference)) // 2)
    return Figure(_svg(draw, 4.8, height), alt, caption, source)


def lines(curves, *, xlabel, ylabel, alt, caption, source, log=(), steps=False, ylim=None, reference=None):
    """Curves by name, each `(x, y)`; `log` names the logarithmic axes ("x", "y"); `reference`: (label, y)."""

    def draw(figure):
        axes = _axes(figure, 1, 1, 1)
        for index, (name, (x, y)) in enumerate(curves.items()):
            style = {
                "color": COLORS[index % 5],
                "linewidth": 1.5,
                "linestyle": "-" if index < 5 else "--",
                "label": name,
            }
            if steps:
                axes.stairs(y, x, **style)
            else:
                axes.plot(x, y, marker="o" if len(x) < 12 else None, markersize=3.5, **style)
        if reference:
            axes.axhline(reference[1], color=GREY, linestyle=":", linewidth=1.2, label=reference[0])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        for axis in log:
            getattr(axes, f"set_{axis}scale")("log")
        if ylim:
            axes.set_ylim(ylim)
        axes.yaxis.grid(True, **GRID)
        axes.legend(frameon=False, fontsize=9)

    draw.__name__ = alt
    return Figure(_svg(draw, 4.8, 3.0), alt, caption, source)
