"""Watching the state of a Mamba-2 model as a text grows, and where it stops coping.

"Stuffed Mamba" (arXiv 2410.07145): past the training length some heads hardly forget, their states explode, and the
loss with them. `StateMonitor` measures the states, `per_token_loss` the loss in bounded memory, `find_collapse` says
from where on it is lost. Everything here only reads the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import Mamba2Model

from ..ops._ssd_chunks import step_sizes
from .borrow_mamba import give_back, make_fast, matrix_mixers
from .precision import wide

SENTENCE = "The river runs past the old mill and on to the sea."
FACTOR = 2.0  # how far a norm may exceed what it was within the training length


class StateMonitor:
    """Records every head's state while the model reads, inside a `with` block.

    `read` feeds a text in chunks; forwards with a cache and `generate()` are recorded too, at the end of the first
    forward that completes a chunk. One monitor takes one text after the other, in batches of one size whose rows stay
    in place (no beams), and none inside `decode_graph`, which runs no Python.

    Attributes:
        records: what was measured, tensors `[boundaries, rows, layers, heads]` (float32, CPU) by name:
            `mean`, `variance`, `rms`, `norm` (Frobenius) of the state h `[head_dim, state]` after the chunk;
            `peak_channel` the row of h, of head_dim, with the largest norm;
            `delta`, `B_norm` averages over the chunk of the step size and of |B|, as the recurrence takes them;
            `log_retention_chunk`, `log_retention` the logarithm of prod exp(delta A), the part that is left of what
            was known before the chunk, and since the first token that was monitored; and `position` `[boundaries,
            rows]` int64, how many tokens each row has read, padding not counted.

    Args:
        model: as for `apply_state_control`; a control that is applied, before or inside the block, is monitored.
        chunk: tokens between two records; the paper's 128 to 512.

    Raises:
        ValueError: the model has no layers with a matrix state, or chunk is below 1.

    >>> from transformers import Mamba2Config, Mamba2ForCausalLM
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> with StateMonitor(Mamba2ForCausalLM(config), chunk=4) as monitor:
    ...     cache = monitor.read(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]))
    >>> monitor.records["position"].tolist(), list(monitor.records["norm"].shape)
    ([[4], [8]], [2, 1, 1, 4])
    """

    def __init__(self, model, chunk=128):
        _check_count("chunk", chunk)
        matrix_mixers(model)
        self.model, self.chunk = model, chunk
        self._boundaries, self._changes = [], None

    def __enter__(self):
        if self._changes is not None:
            raise RuntimeError("this StateMonitor is in use already; make one for each block.")
        self._changes = make_fast(self.model)
        self._layers = [_WatchedLayer(mixer) for mixer in matrix_mixers(self.model)]
        self._hook = self._backbone.register_forward_hook(self._after)
        return self

    def __exit__(self, *error):
        self._hook.remove()
        for layer in self._layers:
            layer.release()
        control = next((vars(layer.mixer).get("state_control") for layer in self._layers), None)
        if control is None:
            give_back(self._changes)
        else:  # applied inside the block and still on: who leaves last gives the model back
            control.record.changes.extend(self._changes)
        self._changes = None

    @property
    def _backbone(self):
        return next(part for part in self.model.modules() if isinstance(part, Mamba2Model))

    @torch.no_grad()
    def read(self, input_ids, attention_mask=None):
        """Feeds `[batch, length]` token ids in chunks and returns the cache; no logits are made."""
        if self._changes is None:
            raise RuntimeError("read() needs the monitor's block; write `with StateMonitor(model) as monitor:`.")
        cache = None
        for start in range(0, input_ids.shape[1], self.chunk):
            stop = start + self.chunk
            mask = None if attention_mask is None else attention_mask[:, :stop]
            ids = input_ids[:, start:stop]
            cache = self._backbone(ids, attention_mask=mask, past_key_values=cache, use_cache=True).cache_params
        return cache

    @property
    def records(self):
        if not self._boundaries:
            raise RuntimeError(f"nothing is recorded; read at least {self.chunk} tokens with a cache in the block.")
        return {
            name: torch.stack([boundary[name] for boundary in self._boundaries]).cpu() for name in self._boundaries[0]
        }

    def to_json(self, path=None):
        """The records as JSON, nested lists by name; written to `path` if one is given.

        Returns:
            The text.
        """
        values = {"chunk": self.chunk} | {name: tensor.tolist() for name, tensor in self.records.items()}
        text = json.dumps(values)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def first_collapsing(self, train_length, factor=FACTOR):
        """The head whose state first outgrows what it was within the training length.

        Args:
            train_length: in tokens; records up to there say what is normal, for each head by itself.
            factor: how many times the largest of those norms is too large.

        Returns:
            `{"position", "layer", "head", "channel", "norm", "normal"}` of the first boundary where a norm is, and
            there of the head that exceeds by the largest factor; None if none does.

        Raises:
            ValueError: there is no record up to train_length, or none beyond.
        """
        records = self.records
        position = records["position"].amax(1)
        within = position <= train_length
        if within.all() or not within.any():
            raise ValueError(
                f"train_length ({train_length}) must lie inside what was recorded, {int(position.min())} to"
                f" {int(position.max())} tokens; read a longer text, or in smaller chunks."
            )
        norm, row = records["norm"].max(1)  # [boundaries, layers, heads], of the worst row
        normal = norm[within].amax(0)
        excess = norm / normal.clamp(min=torch.finfo(norm.dtype).tiny)
        late = (~within & (excess.flatten(1) > factor).any(1)).nonzero()
        if not len(late):
            return None
        first = int(late[0])
        layer, head = divmod(int(excess[first].argmax()), norm.shape[2])
        return {
            "position": int(position[first]),
            "layer": layer,
            "head": head,
            "channel": int(records["peak_channel"][first, row[first, layer, head], layer, head]),
            "norm": norm[first, layer, head].item(),
            "normal": normal[layer, head].item(),
        }

    def plot(self, path=None, train_length=None):
        """Draws norms, retention and step sizes of every layer over the position; needs matplotlib.

        Args:
            path: where to save the figure, if anywhere; the suffix chooses the format.
            train_length: marked by a line.

        Returns:
            The matplotlib `Figure`.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib; pip install 'undersong[demo]'.") from error
        records = self.records
        position = records["position"].amax(1)
        curves = {
            "largest norm of a head's state": records["norm"].amax((1, 3)),
            "most that a head keeps of token 1": records["log_retention"].amax((1, 3)).exp(),
            "mean step size": records["delta"].mean((1, 3)),
        }
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        for axes, (title, layers) in zip(figure.subplots(1, len(curves)), curves.items(), strict=True):
            for layer, curve in enumerate(layers.T):
                axes.plot(position, curve, color=f"C{layer % 10}", linewidth=0.9, label=f"layer {layer}")
            if train_length is not None:
                axes.axvline(train_length, color="0.5", linestyle=":")
            axes.set(xlabel="tokens", title=title, yscale="log" if "norm" in title else "linear")
        axes.legend(fontsize="small", ncols=1 + len(layers) // 12)
        if path is not None:
            figure.savefig(path)
        return figure

    @torch.no_grad()
    def _after(self, backbone, args, output):
        """Behind a forward: the cache is filled and its tokens are counted."""
        cache = getattr(output, "cache_params", None)
        if cache is None or self._layers[0].seen < self.chunk:
            return
        values = [layer.take(cache.layers[layer.mixer.layer_idx].read("ssm")) for layer in self._layers]
        boundary = {name: torch.stack([value[name] for value in values], 1).cpu() for name in values[0]}
        boundary["position"] = cache.layers[self._layers[0].mixer.layer_idx].valid_tokens.cpu()
        if self._boundaries and len(self._boundaries[0]["position"]) != len(boundary["position"]):
            raise ValueError(
                f"the batch has {len(boundary['position'])} rows, but the records of this monitor have"
                f" {len(self._boundaries[0]['position'])}; use one monitor for each."
            )
        self._boundaries.append(boundary)


class _WatchedLayer:
    """What one mixer has done since the last record."""

    def __init__(self, mixer):
        self.mixer, self.inputs, self.seen = mixer, None, 0
        self.total = self.chunk = None
        mixer.recurrence_inputs = self.tap  # on the object: a control may exchange its class meanwhile
        self.hook = mixer.register_forward_hook(self.after, with_kwargs=True)

    def release(self):
        del self.mixer.recurrence_inputs
        self.hook.remove()

    def tap(self, xBC, dt):
        self.inputs = type(self.mixer).recurrence_inputs(self.mixer, xBC, dt)
        return self.inputs

    @torch.no_grad()
    def after(self, mixer, args, kwargs, output):
        """Adds up what the segment did; the cache's count of tokens is still the one before it."""
        (_, dt, A, B, _, _, _, dt_bias, dt_softplus, dt_limit), self.inputs = self.inputs, None
        if kwargs.get("cache_params") is None:
            return
        if dt.dim() == 2:  # a step
            dt, B = dt[:, None], B[:, None]
        mask = kwargs.get("attention_mask")
        valid = torch.ones(dt.shape[:2], dtype=torch.bool, device=dt.device) if mask is None else mask.bool()
        delta = step_sizes(dt, dt_bias, dt_softplus, dt_limit, valid, wide(dt).dtype)
        B_norm = wide(B).norm(dim=-1).masked_fill(~valid[..., None], 0.0)
        B_norm = B_norm.sum(1).repeat_interleave(A.shape[0] // B.shape[2], 1)
        segment = {"tokens": valid.sum(1)[:, None], "delta": delta.sum(1), "B_norm": B_norm}
        segment["log_retention"] = (delta * A).sum(1)
        fresh = kwargs["cache_params"].layers[mixer.layer_idx].valid_tokens is None
        if fresh:
            self.seen, self.chunk = 0, None
        self.seen += dt.shape[1]
        self.chunk = segment if self.chunk is None else {name: self.chunk[name] + segment[name] for name in segment}
        retained = segment["log_retention"]
        self.total = retained if fresh or self.total is None else self.total + retained

    def take(self, state):
        """The record of `[rows, heads]` values at a boundary, whose state is given; begins the next chunk."""
        chunk, tokens = self.chunk, self.chunk["tokens"].clamp(min=1)
        self.seen, self.chunk = 0, None
        flat, channels = state.flatten(-2), state.norm(dim=-1)
        return {
            "mean": flat.mean(-1),
            "variance": flat.var(-1, correction=0),
            "rms": flat.square().mean(-1).sqrt(),
            "norm": flat.norm(dim=-1),
            "peak_channel": channels.argmax(-1),
            "delta": chunk["delta"] / tokens,
            "B_norm": chunk["B_norm"] / tokens,
            "log_retention_chunk": chunk["log_retention"],
            "log_retention": self.total,
        }


def monitor_prompts(tokenizer, length, text=None, sentence=SENTENCE):
    """The paper's three prompts: monotonous ones, on which states collapse soonest, and natural text.

    Args:
        tokenizer: any tokenizer of transformers.
        length: in tokens.
        text: natural text of at least that length; None leaves the prompt "text" out.
        sentence: what the second prompt repeats.

    Returns:
        Token ids `[1, length]` by name: "newlines", "sentence" and "text".

    Raises:
        ValueError: `text` is too short.
    """
    _check_count("length", length)

    def ids(text):
        return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.long)

    prompts = {"newlines": ids("\n"), "sentence": ids(sentence + " ")}
    prompts = {name: prompt.repeat(1, -(-length // prompt.shape[1])) for name, prompt in prompts.items()}
    if text is not None:
        prompts["text"] = ids(text)
        if prompts["text"].shape[1] < length:
            raise ValueError(
                f"text has {prompts['text'].shape[1]} tokens, but length is {length}; give a longer text."
            )
    return {name: prompt[:, :length] for name, prompt in prompts.items()}


@torch.no_grad()
def per_token_loss(model, input_ids, chunk=512):
    """The loss of every token but the first, over a text of any length: only one chunk's logits exist at a time.

    The first token of a chunk is scored by the last logits of the chunk before, so nothing depends on `chunk`.

    Args:
        model: a causal language model; a stock Mamba-2 runs our forward meanwhile, which is right for chunks.
        input_ids: `[batch, length]`, no padding.
        chunk: tokens of one forward.

    Returns:
        `[batch, length - 1]` float32 on the CPU, in nats; entry t is the loss of token t + 1.

    Raises:
        ValueError: chunk is below 1, or there are not two tokens.

    >>> from transformers import Mamba2Config, Mamba2ForCausalLM
    >>> config = Mamba2Config(vocab_size=11, hidden_size=8, num_heads=4, head_dim=4, n_groups=1, num_hidden_layers=1)
    >>> per_token_loss(Mamba2ForCausalLM(config), torch.tensor([[1, 2, 3, 4, 5]]), chunk=2).shape
    torch.Size([1, 4])
    """
    _check_count("chunk", chunk)
    if input_ids.dim() != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids ({list(input_ids.shape)}) must be [batch, length] with a length of at least 2.")
    changes, cache, losses = make_fast(model), None, []
    try:
        for start in range(0, input_ids.shape[1] - 1, chunk):
            ids = input_ids[:, start : start + chunk]
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            targets = input_ids[:, start + 1 : start + 1 + chunk]
            logits = outputs.logits[:, : targets.shape[1]].float()
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets))
    finally:
        give_back(changes)
    return torch.cat([loss.float().cpu() for loss in losses], 1)


@dataclass(frozen=True)
class Collapse:
    """Where a model stops coping with the length of a text.

    Attributes:
        collapsed: whether the mean loss of a bucket beyond the training length exceeds every one within it by more
            than the margin.
        position: the first token of the first such bucket; None if there is none.
        within, beyond: the largest mean loss of a bucket within and beyond the training length, in nats.
    """

    collapsed: bool
    position: int | None
    within: float
    beyond: float


def find_collapse(losses, train_length, bucket=8192, margin=0.5):
    """Applies the criterion of state collapse to the losses of a long text.

    Losses are averaged over buckets; the first one, where there is no context yet, and the last one do not count.

    Args:
        losses: `[length]` or `[batch, length]`, in nats, from `per_token_loss`; rows are averaged.
        train_length: in tokens.
        bucket: tokens of one average.
        margin: in nats; 0.69 is a doubled perplexity.

    Returns:
        A `Collapse`.

    Raises:
        ValueError: no bucket that counts lies within the training length, or none beyond.

    >>> losses = torch.tensor([3.0] * 4 + [2.0] * 6 + [5.0] * 6)
    >>> find_collapse(losses, train_length=8, bucket=2)
    Collapse(collapsed=True, position=10, within=3.0, beyond=5.0)
    """
    _check_count("bucket", bucket)
    losses = losses.detach().float().reshape(-1, losses.shape[-1]).mean(0)
    means = {start: losses[start : start + bucket].mean().item() for start in range(0, len(losses), bucket)}
    counted = dict(list(means.items())[1:-1])
    within = [mean for start, mean in counted.items() if start + bucket <= train_length]
    beyond = {start: mean for start, mean in counted.items() if start >= train_length}
    if not within:
        raise ValueError(
            f"bucket ({bucket}) leaves none but the first within train_length ({train_length}); use at most"
            f" {train_length // 2}."
        )
    if not beyond:
        raise ValueError(
            f"losses cover {len(losses)} tokens, which leaves no bucket of {bucket} but the last beyond train_length"
            f" ({train_length}); measure a longer text, or use smaller buckets."
        )
    late = [start for start, mean in beyond.items() if not mean <= max(within) + margin]  # NaN is a collapse, too
    return Collapse(bool(late), late[0] if late else None, max(within), torch.tensor([*beyond.values()]).max().item())


def _check_count(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least 1, in tokens.")


__all__ = ["Collapse", "StateMonitor", "find_collapse", "monitor_prompts", "per_token_loss"]
