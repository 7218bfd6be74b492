"""How much a recurrent state holds: passkey recall over length, and what grows with the size of the state.

Chen et al. ("Stuffed Mamba", arXiv 2410.07145, section 5) find that the shortest training length at which a model
learns to forget grows linearly with the size S of its state, and the length up to which it recalls a passkey
exponentially. Constants differ from model to model, so both laws are fitted here, never assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..data.passkey import PasskeyTask
from .passkey.measures import passkey_scores


@torch.no_grad()
def measure_state_capacity(
    model,
    tokenizer,
    lengths: Sequence[int],
    n: int = 20,
    *,
    task: PasskeyTask | None = None,
    seed: int = 0,
    batch_size: int = 8,
    prefill_chunk: int = 2048,
    threshold: float = 0.95,
) -> dict:
    """Passkey retrieval of a model over lengths and depths, decoded greedily.

    Args:
        model: a causal LM with `generate()`, in evaluation mode, on any device; under a state control it is measured
            with it. Stock Mamba models read long prompts in chunks wrongly: give them to `enable_fast_mamba` first.
        tokenizer: of the model.
        lengths: of the prompts, in tokens.
        n: prompts of each length, at evenly spread depths.
        task: a `PasskeyTask` with other words; by default its own.
        seed: of the numbers.
        batch_size: prompts decoded together.
        prefill_chunk: tokens of a prompt that are read at a time, which bounds the memory.
        threshold: the accuracy that counts as recall.

    Returns:
        What `passkey_scores` gives, and `state_size` of the model.

    Raises:
        ValueError: no lengths, or whatever the task and the scores raise.

    >>> scores = measure_state_capacity(model, tokenizer, lengths=[1024, 4096, 16384])  # doctest: +SKIP
    >>> scores["t_recall"]  # doctest: +SKIP
    4096
    """
    if not lengths:
        raise ValueError("lengths must hold at least one length in tokens.")
    task = PasskeyTask(tokenizer) if task is None else task
    prompts = [prompt for length in lengths for prompt in task.prompts(length, n, seed)]
    groups: dict = {}  # rows of a batch are equally long, so that there is no padding
    for prompt in prompts:
        groups.setdefault((len(prompt.input_ids), prompt.max_new_tokens), []).append(prompt)
    said = {}
    for (length, tokens), group in groups.items():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            ids = torch.tensor([prompt.input_ids for prompt in batch], device=model.device)
            options = {"prefill_chunk_size": prefill_chunk} if length > prefill_chunk else {}
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                **options,
            )
            texts = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            said |= {id(prompt): text for prompt, text in zip(batch, texts, strict=True)}
    scores = passkey_scores(
        [said[id(prompt)] for prompt in prompts],
        [prompt.key for prompt in prompts],
        [prompt.length for prompt in prompts],
        [prompt.depth for prompt in prompts],
        threshold=threshold,
        bins=min(n, 10),
    )
    return scores | {"state_size": state_size(model)}


@torch.no_grad()
def state_size(model) -> int:
    """Numbers in a model's recurrent state, over all layers: layers * heads * head_dim * state for Mamba-2.

    The few inputs that a convolution keeps are not counted.

    Raises:
        ValueError: the model keeps no recurrent state.

    >>> from transformers import Mamba2Config
    >>> from undersong import FastMamba2ForCausalLM
    >>> sizes = {"num_heads": 4, "head_dim": 4, "state_size": 16, "n_groups": 1, "num_hidden_layers": 2}
    >>> state_size(FastMamba2ForCausalLM(Mamba2Config(vocab_size=11, hidden_size=8, **sizes)))
    512
    """
    cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    layers = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "states", None)]
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) keeps no recurrent state to measure; make a stock Mamba ours with"
            " undersong.enable_fast_mamba(model)."
        )
    return sum(state.numel() for layer in layers for name, state in layer.states.items() if name != "conv")


def recommended_train_length(state_size: float, a: float, b: float) -> float:
    """The training length, in tokens, at which a model with this state learns to forget: a * state_size + b.

    a and b come from `fit_train_length` on models of the same family, trained on the same kind of text.

    Raises:
        ValueError: a state size that is not positive, or one for which the line gives no positive length.

    >>> recommended_train_length(4e6, a=1e-3, b=200)
    4200.0
    """
    if not state_size > 0:
        raise ValueError(f"state_size ({state_size}) must be above 0; state_size(model) measures it.")
    length = a * state_size + b
    if not length > 0:
        raise ValueError(
            f"state_size ({state_size}) with a ({a}) and b ({b}) gives a length of {length}; the fit does not reach"
            " down to states of this size."
        )
    return length


def fit_train_length(state_sizes: Sequence[float], lengths: Sequence[float]) -> dict:
    """Least squares line through the shortest training lengths that do not collapse.

    Args:
        state_sizes: of models that were trained, from `state_size`.
        lengths: for each the shortest training length, in tokens, after which it does not collapse.

    Returns:
        `a` and `b` of length = a * state_size + b, and `r2`, the share of the variance that the line explains.

    Raises:
        ValueError: fewer than two different state sizes, or lists of different lengths.

    >>> fit = fit_train_length([1024, 2048, 4096], [192, 320, 576])
    >>> fit, recommended_train_length(8192, fit["a"], fit["b"])
    ({'a': 0.125, 'b': 64.0, 'r2': 1.0}, 1088.0)
    """
    return _line(state_sizes, lengths)


def fit_recall_length(state_sizes: Sequence[float], lengths: Sequence[float]) -> dict:
    """Least squares line through the logarithm of recall lengths.

    Args:
        state_sizes: of models, from `state_size`.
        lengths: their T_recall, in tokens, above 0.

    Returns:
        `a` and `b` of length = exp(a * state_size + b), and `r2` of the logarithm.

    Raises:
        ValueError: a length that is not positive, or what `fit_train_length` refuses.

    >>> fit = fit_recall_length([100, 200, 300], [256, 1024, 4096])
    >>> round(math.exp(fit["a"] * 400 + fit["b"]))
    16384
    """
    if bad := [length for length in lengths if not length > 0]:
        raise ValueError(f"lengths must be above 0, but one is {bad[0]}; leave out models that recall nothing.")
    return _line(state_sizes, [math.log(length) for length in lengths])


def plot_recall(scores: dict, path=None, depth_bins: bool = True):
    """Draws accuracy over length, as a map over depth if the scores have a grid; needs matplotlib.

    Args:
        scores: of `measure_state_capacity` or `passkey_scores`, or several by name (one curve each).
        path: where to save the figure, if anywhere; the suffix chooses the format.
        depth_bins: False draws a curve even where there is a grid.

    Returns:
        The matplotlib `Figure`.
    """
    figure = _figure()
    axes = figure.subplots()
    if "lengths" in scores and depth_bins and "grid" in scores:
        grid = [[float("nan") if cell is None else cell for cell in row] for row in scores["grid"]]
        columns = list(zip(*grid, strict=True))  # depth downwards, as a text is read
        image = axes.imshow(
            columns, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn", extent=(-0.5, len(grid) - 0.5, 1, 0)
        )
        axes.set_xticks(range(len(grid)), scores["lengths"])
        axes.set(xlabel="prompt, tokens", ylabel="depth of the number", title=f"T_recall {scores['t_recall']}")
        figure.colorbar(image, label="accuracy")
    else:
        for label, one in ({"": scores} if "lengths" in scores else scores).items():
            axes.plot(one["lengths"], one["accuracy_by_length"], marker=".", label=str(label))
        axes.set_xscale("log", base=2)
        axes.set(xlabel="prompt, tokens", ylabel="passkey accuracy", ylim=(-0.03, 1.03))
        if "lengths" not in scores:
            axes.legend(fontsize="small")
    return _saved(figure, path)


def plot_capacity(state_sizes: Sequence[float], lengths: Sequence[float], fit: dict, path=None, *, exponential=False):
    """Draws measured lengths over the size of the state with their fit; needs matplotlib.

    Args:
        state_sizes, lengths, fit: what was fitted and what `fit_train_length` or `fit_recall_length` gave.
        path: where to save the figure, if anywhere.
        exponential: True for `fit_recall_length`; the length's axis is then logarithmic.

    Returns:
        The matplotlib `Figure`.
    """
    figure = _figure()
    axes = figure.subplots()
    axes.plot(state_sizes, lengths, "o")
    low, high = min(state_sizes), max(state_sizes)
    sizes = [low + (high - low) * i / 100 for i in range(101)]
    line = [fit["a"] * size + fit["b"] for size in sizes]
    axes.plot(sizes, [math.exp(value) for value in line] if exponential else line, linewidth=0.9)
    law = "exp(a S + b)" if exponential else "a S + b"
    title = f"{law}, a {fit['a']:.3g}, b {fit['b']:.3g}, R2 {fit['r2']:.2f}"
    axes.set(xlabel="numbers in the state, S", ylabel="tokens", title=title, yscale="log" if exponential else "linear")
    return _saved(figure, path)


def _line(x, y):
    if len(x) != len(y):
        raise ValueError(f"lengths ({len(y)}) must be as many as state_sizes ({len(x)}).")
    if len(set(x)) < 2:
        raise ValueError(f"state_sizes ({list(x)}) must hold at least two different sizes to fit a line.")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xx = sum((a - mean_x) ** 2 for a in x)
    yy = sum((b - mean_y) ** 2 for b in y)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    slope = xy / xx
    return {"a": slope, "b": mean_y - slope * mean_x, "r2": xy * xy / (xx * yy) if yy else 1.0}


def _figure():
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'undersong[demo]'.") from error
    return Figure(figsize=(6, 3.6), layout="constrained")


def _saved(figure, path):
    if path is not None:
        figure.savefig(path)
    return figure


__all__ = [
    "fit_recall_length",
    "fit_train_length",
    "measure_state_capacity",
    "plot_capacity",
    "plot_recall",
    "recommended_train_length",
    "state_size",
]
