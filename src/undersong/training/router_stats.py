"""How a mixture of experts spreads its tokens, and how much the choice of one layer tells about the next.

Balance of the experts' load, and the mutual information of neighbouring layers' choices, by which "Layerwise Recurrent
Router for Mixture-of-Experts" (Qiu et al., arXiv 2408.06793) compares routers: from the router logits of any model of
transformers' kind, ours or not. `RouterStatsCallback` follows them through a training.
"""

from __future__ import annotations

import torch
from transformers import TrainerCallback

NAMES = ("load_entropy", "max_over_mean_load", "mutual_information")


def router_stats(router_logits, top_k, attention_mask=None):
    """How evenly experts are used in every layer, and what neighbouring layers' choices share.

    With c_e the number of tokens that have expert e among their top_k, and q_e = c_e / sum(c):
        load entropy H = -sum_e q_e log q_e,   max over mean load = max_e q_e * experts
    With p(a, b) the share of tokens whose first choice is a in a layer and b in the next layer that has experts:
        mutual information I = sum_ab p(a, b) log(p(a, b) / (p(a) p(b)))
    The last is the plug-in estimate: choices that are independent give about (experts - 1)^2 / (2 tokens), not 0.

    Args:
        router_logits: tuple of `[batch * length, experts]`, a layer each, as models return with
            `output_router_logits=True`.
        top_k: experts of a token.
        attention_mask: `[batch, keys]`, 0 for padding, which does not count; the last `length` columns matter. A mask
            of another form says nothing about padding: all tokens count.

    Returns:
        A dict of lists of floats, in nats where they are entropies: `load` (q, layers x experts), `load_entropy`,
        `max_over_mean_load` (a value for each layer), and `mutual_information` (a value for each pair of neighbours).

    Raises:
        ValueError: there are no logits or no tokens, layers disagree in shape, top_k is not among the experts, or the
            mask does not fit.

    >>> logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]])
    >>> stats = router_stats((logits, logits.flip(1)), top_k=1)
    >>> stats["max_over_mean_load"], [round(i, 4) for i in stats["mutual_information"]]  # log 2: one tells the other
    ([1.0, 1.0], [0.6931])
    """
    counts = RouterCounts()
    counts.add(router_logits, top_k, attention_mask)
    return counts.stats()


class RouterCounts:
    """What `router_stats` needs to know of a text, added up batch by batch: `add` and `stats` are its two halves."""

    def __init__(self):
        self.chosen = self.pairs = 0  # [layers, experts]; [layers - 1, experts, experts], of first choices

    @torch.no_grad()
    def add(self, router_logits, top_k, attention_mask=None):
        """Counts the tokens of a batch; arguments as of `router_stats`."""
        _check(router_logits, top_k)
        rows, experts = router_logits[0].shape
        real = None
        if attention_mask is not None and attention_mask.dim() == 2:
            batch = attention_mask.shape[0]
            if rows % batch or rows // batch > attention_mask.shape[1]:
                raise ValueError(
                    f"attention_mask ({list(attention_mask.shape)}) does not fit router_logits of {rows} tokens;"
                    " pass the mask of the same forward pass."
                )
            real = attention_mask[:, attention_mask.shape[1] - rows // batch :].reshape(-1).bool()
        choices = []
        for logits in router_logits:
            logits = logits if real is None else logits[real.to(logits.device)]
            choices.append(logits.topk(top_k, -1).indices.cpu())  # the softmax keeps the order
        self.chosen = self.chosen + torch.stack([c.flatten().bincount(minlength=experts) for c in choices])
        first = [c[:, 0] for c in choices]
        pairs = [(a * experts + b).bincount(minlength=experts**2) for a, b in zip(first[:-1], first[1:], strict=True)]
        if pairs:
            self.pairs = self.pairs + torch.stack(pairs).view(-1, experts, experts)

    def stats(self):
        """The dict that `router_stats` returns.

        Raises:
            ValueError: no token was counted.
        """
        if isinstance(self.chosen, int) or not self.chosen.any():
            raise ValueError("no token was counted; router statistics need at least one that is not padding.")
        load = self.chosen / self.chosen.sum(1, keepdim=True).double()
        information = []
        if not isinstance(self.pairs, int):
            joint = self.pairs / self.pairs.sum((1, 2), keepdim=True).double()
            below, above = _entropy(joint.sum(2)), _entropy(joint.sum(1))
            # rounding may leave it a little below 0
            information = (below + above - _entropy(joint.flatten(1))).clamp(min=0).tolist()
        return {
            "load": load.tolist(),
            "load_entropy": _entropy(load).tolist(),
            "max_over_mean_load": (load.amax(1) * load.shape[1]).tolist(),
            "mutual_information": information,
        }


class RouterStatsCallback(TrainerCallback):
    """Logs `router_stats` of the evaluation set at every evaluation, and of training batches if wished.

    The model need not be told to return router logits: they are asked for where they are needed and given to nobody
    else. Values appear in the logs, and in what `evaluate` returns, as `eval_router_load_entropy` (the mean over the
    layers) and `eval_router_load_entropy_0` (of a layer), and so on; those of training batches without "eval_". Among
    several processes each counts its own share of the batches, and the main one's values are logged.

    Args:
        trainer: the `Trainer`, whose model is a mixture of experts of transformers' kind, under PEFT or not.
        steps: also log the batches of every so many training steps; None does not.

    Attributes:
        last: what `router_stats` gives for the last evaluation; None before.

    Raises:
        ValueError: `steps` is below 1, or the model's configuration has no `num_experts_per_tok`; at the first
            batch, a model that returns no router logits.

    >>> import tempfile
    >>> from transformers import Trainer, TrainingArguments
    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=11, hidden_size=8, intermediate_size=8,
    ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4))
    >>> data = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer = Trainer(model, TrainingArguments(folder, use_cpu=True, disable_tqdm=True), eval_dataset=data)
    ...     trainer.add_callback(RouterStatsCallback(trainer))
    ...     metrics = trainer.evaluate()  # doctest: +ELLIPSIS
    {'eval_...
    >>> sorted(name for name in metrics if "entropy" in name)
    ['eval_router_load_entropy', 'eval_router_load_entropy_0', 'eval_router_load_entropy_1']
    """

    def __init__(self, trainer, steps=None):
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps ({steps!r}) must be an integer of at least 1, or None.")
        self.trainer, self.steps, self.last = trainer, steps, None
        self._model, self._hooks = None, ()
        self._watch(trainer.model)

    def _watch(self, model):
        """Puts hooks around the trunk of a model, and takes off those of the one before."""
        if model is self._model:
            return
        for hook in self._hooks:
            hook.remove()
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._top_k = getattr(inner.config, "num_experts_per_tok", None)
        if self._top_k is None:
            raise ValueError(
                f"model ({type(inner).__name__}) has no num_experts_per_tok in its configuration; take a mixture of"
                " experts such as Mixtral, OLMoE, Qwen3-MoE or RMoE."
            )
        trunk = inner.base_model
        self._hooks = (
            trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            # before those of another trainer of this model, which may take away what was asked for on its behalf
            trunk.register_forward_hook(self._after, with_kwargs=True, prepend=True),
        )
        self._model, self._seen, self._asked = model, None, False
        self._evaluated, self._trained = RouterCounts(), RouterCounts()

    def _before(self, trunk, args, kwargs):
        state = self.trainer.state
        wanted = not trunk.training or (self.steps is not None and (state.global_step + 1) % self.steps == 0)
        self._asked = wanted and not kwargs.get("output_router_logits")
        self._wanted = wanted
        return args, kwargs | {"output_router_logits": True} if wanted else kwargs

    def _after(self, trunk, args, kwargs, output):
        if not self._wanted:
            return None
        logits = getattr(output, "router_logits", None)
        if not logits:
            raise ValueError(
                f"model ({type(trunk).__name__}) returns no router_logits; RouterStatsCallback needs a model that does"
                " with output_router_logits=True."
            )
        self._seen = tuple(layer.detach() for layer in logits), kwargs.get("attention_mask")
        # what the caller did not ask for would be gathered with the predictions
        return type(output)(**{k: v for k, v in output.items() if k != "router_logits"}) if self._asked else None

    def _count(self, counts):
        """Adds the forward pass that has just been; others, such as those of a generation, are forgotten."""
        if self._seen is not None:
            logits, mask = self._seen
            counts.add(logits, self._top_k, mask if isinstance(mask, torch.Tensor) else None)
        self._seen = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._watch(self.trainer.model)  # `model_init` makes a new one for every training

    def on_substep_end(self, args, state, control, **kwargs):
        self._count(self._trained)

    def on_step_end(self, args, state, control, **kwargs):
        if self.steps is not None and state.global_step % self.steps == 0:
            self._count(self._trained)
            self.trainer.log(_flat(self._trained.stats(), ""))
            self._trained = RouterCounts()
        self._seen = None

    def on_prediction_step(self, args, state, control, **kwargs):
        self._count(self._evaluated)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.last, self._evaluated = self._evaluated.stats(), RouterCounts()
        metrics = {} if metrics is None else metrics
        # of several evaluation sets each has a prefix of its own
        prefix = next((name.removesuffix("runtime") for name in metrics if name.endswith("_runtime")), "eval_")
        values = _flat(self.last, prefix)
        metrics.update(values)
        self.trainer.log(values)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        self._evaluated = RouterCounts()


def plot_router_stats(before, after, path=None):
    """Draws load entropy, largest load and mutual information over the layers, before and after; needs matplotlib.

    Args:
        before, after: of `router_stats`, for models of the same size.
        path: where to save the figure, if anywhere; the suffix chooses the format.

    Returns:
        The matplotlib `Figure`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_router_stats needs matplotlib; pip install 'undersong[demo]'.") from error
    titles = {
        "load_entropy": "entropy of expert load (nats)",
        "max_over_mean_load": "largest over mean load",
        "mutual_information": "mutual information with the next layer (nats)",
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(NAMES)), NAMES, strict=True):
        for label, stats in (("before", before), ("after", after)):
            axes.plot(range(len(stats[name])), stats[name], marker="o", label=label)
        axes.set(xlabel="layer with experts", title=titles[name])
        axes.xaxis.get_major_locator().set_params(integer=True)
    even = torch.tensor(float(len(before["load"][0]))).log().item()
    figure.axes[0].axhline(even, color="0.5", linestyle=":", label="even load")
    figure.axes[0].legend()
    if path is not None:
        figure.savefig(path)
    return figure


def _flat(stats, prefix):
    """Names and numbers for a log: the mean over the layers, then every layer."""
    values = {}
    for name in NAMES:
        if stats[name]:
            values[f"{prefix}router_{name}"] = sum(stats[name]) / len(stats[name])
            values |= {f"{prefix}router_{name}_{layer}": value for layer, value in enumerate(stats[name])}
    return values


def _entropy(probabilities):
    return torch.special.entr(probabilities).sum(-1)


def _check(router_logits, top_k):
    if not router_logits:
        raise ValueError("router_logits is empty; call the model with output_router_logits=True.")
    shapes = [list(logits.shape) for logits in router_logits]
    if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"router_logits (shapes {shapes}) must be [batch * length, experts], alike for all layers.")
    if not isinstance(top_k, int) or not 1 <= top_k <= shapes[0][1]:
        raise ValueError(f"top_k ({top_k!r}) must lie between 1 and the number of experts ({shapes[0][1]}).")


__all__ = ["RouterCounts", "RouterStatsCallback", "plot_router_stats", "router_stats"]
