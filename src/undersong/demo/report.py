"""The report: one HTML file that refers to nothing outside itself; plots are inline SVG in the page's own colours."""

import io
import re
from importlib.resources import files

__all__ = ["mark_repeats", "render"]

_INK = "#010203"  # stands for the page's text colour in the plots
_COLORS = {"aaren": "#2f7fd1", "transformer": "#d9822b"}
_TEN_LINES = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
import undersong

folder = undersong.data.smollm2()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("The best way to learn a new language is", return_tensors="pt")
cap = undersong.SelfReinforcementCapLogitsProcessor()
output = model.generate(**inputs, max_new_tokens=120, logits_processor=[cap])
print(tokenizer.decode(output[0]))"""


def render(result):
    """HTML text of a demo's result (the dict that `demo.json` holds)."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["mark_repeats"] = mark_repeats
    template = environment.from_string(files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        **result,
        curves=_curves(result["train"]["models"]),
        series=_series(result["train"]["example"]),
        bars=_bars(result["decode"]["methods"]),
        ten_lines=_TEN_LINES,
    )


def mark_repeats(text, n=4):
    """Splits a text into `(piece, repeated)`: repeated pieces are words of an n-gram that occurred before.

    >>> mark_repeats("to be or not to be or", n=2)
    [('to be or not ', False), ('to be or', True)]
    """
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    words = [text[start:end].strip(".,;:!?\"'()").lower() for start, end in spans]
    seen, repeated = set(), [False] * len(words)
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in seen:
            repeated[i : i + n] = [True] * n
        seen.add(gram)
    pieces, last = [], 0
    for i, (_, end) in enumerate(spans):
        if i + 1 == len(spans) or repeated[i + 1] != repeated[i]:
            stop = len(text) if i + 1 == len(spans) else spans[i + 1][0]
            stop = end if repeated[i] else stop  # the mark ends with its last word
            pieces.append((text[last:stop], repeated[i]))
            last = stop
    if last < len(text):
        pieces.append((text[last:], False))
    return pieces


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _axes(figure, *position):
    axes = figure.add_subplot(*position)
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _svg(draw, *size):
    """Inline SVG of a figure that `draw(figure)` fills; text stays text, ink becomes currentColor."""
    import matplotlib

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    settings = ink | {"svg.fonttype": "none", "svg.hashsalt": draw.__name__, "font.size": 10, "axes.linewidth": 0.8}
    with matplotlib.rc_context(settings):
        figure = _figure(*size)
        draw(figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )


def _curves(models):
    def curves(figure):
        axes = _axes(figure, 1, 1, 1)
        for kind, row in models.items():
            epochs = [entry["epoch"] for entry in row["history"]]
            axes.plot(epochs, [100 * entry["validation"] for entry in row["history"]], color=_COLORS[kind], label=kind)
        axes.set(xlabel="epoch", ylabel="validation accuracy, %")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.grid(True, color="#8888", linewidth=0.5)
        axes.legend(frameon=False, loc="lower right")

    return _svg(curves, 4.8, 2.8)


def _bars(methods):
    def bars(figure):
        axes = _axes(figure, 1, 1, 1)
        names = list(methods)[::-1]
        values = [100 * methods[name]["metrics"]["rep_4"] for name in names]
        drawn = axes.barh(names, values, color="#2f7fd1", height=0.55)
        axes.bar_label(drawn, fmt="%.0f %%", padding=4)
        axes.set(xlabel="4-grams that occurred before, %", xlim=(0, max(10, *values) * 1.15))

    return _svg(bars, 4.8, 1.8)


def _series(example):
    def series(figure):
        image, line = figure.add_gridspec(1, 2, width_ratios=(1, 3))
        axes = figure.add_subplot(image)
        values = example["values"]
        axes.imshow([values[i : i + 8] for i in range(0, 64, 8)], cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes = _axes(figure, line)
        axes.step(range(1, 65), values, where="mid", color="#2f7fd1", linewidth=1.2)
        axes.set(xlabel="step", ylabel="pixel", xticks=range(0, 65, 16), ylim=(-0.05, 1.05))

    return _svg(series, 4.8, 1.7)
