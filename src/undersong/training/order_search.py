"""Training on targets that are sets, with a search for the order to write them in (Vinyals et al., "Order Matters:
Sequence to sequence for sets", ICLR 2016, arXiv 1511.06391, sec. 5.2).

The loss is the negative log-likelihood of one order of every set, -log p(y_pi | x), and the model itself chooses pi:
the most likely one, or one sampled from it. What it finds easy to write becomes the order it learns.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import Trainer

from .segment_orders import shuffled, split_target
from .set_decoding import decode_orders

_STRATEGIES = ("sample", "greedy", "exact", "random", "fixed")
_SEARCHES = ("sample", "greedy", "exact")
MAX_ORDERS = 24  # of a set, that "exact" compares


class ChosenOrders(NamedTuple):
    """A batch whose targets are in the chosen orders, and how undecided the choice was.

    Attributes:
        inputs: the batch; with `num_samples` above 1 every row comes that many times in a row.
        entropy: `[rows]` nats, of the distribution that the orders come from, given what was chosen so far.
        entropy_limit: `[rows]` nats, the logarithm of how many orders a set has.
    """

    inputs: dict
    entropy: torch.Tensor
    entropy_limit: torch.Tensor


class OrderSearchLoss:
    """Negative log-likelihood of target sets, in orders that the model chooses.

    Works with encoder-decoder models (`labels` hold the target) and with causal ones (`labels` are the `input_ids`
    with -100 on the prompt); everything goes through the model's own forward and `generate()`, so with its cache. A
    target is a stretch of segments between separators. The model's special ids at its two ends stay there, so the end
    of the sequence comes when the set is exhausted. Equal segments are the same element, as often as they occur.

    Strategies:
        "sample": ancestral sampling, in which every token is drawn from the model's distribution over those that
            continue segments not yet written. No gradient goes through it, and dropout is off.
        "greedy": the same with the most likely token.
        "exact": the most likely of all orders, as a whole, for sets with at most 24 of them.
        "random": uniformly random orders; "fixed": the order of the labels. These search nothing.

    Args:
        strategy: as above.
        warmup_steps: optimizer steps in which searches choose uniformly: before the model knows anything, a search
            settles on one order and keeps it.
        num_samples: orders of every set a step, for "sample" and "random"; the loss is their mean.
        separator_id: the token id between segments; None if every token is a segment, as in pointer networks.
        fixed_ids: ids that stay at the ends of a target beside the model's special ids, such as the line break that a
            chat template has behind a turn.
        orders: permutations of 0 to n - 1 to choose from, at most 24, for sets of n segments; None for all there are.
            They are compared by their likelihoods as wholes: "sample" draws in proportion, "greedy" takes the best.

    Raises:
        ValueError: an argument out of range, a model or batch that this does not apply to.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> config = T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    >>> model = T5ForConditionalGeneration(config)
    >>> labels = torch.tensor([[5, 9, 6, 7, 9, 8, 1]])  # the set {5, 6 7, 8}, separated by 9, then the end
    >>> loss = OrderSearchLoss("exact", warmup_steps=0, separator_id=9)
    >>> chosen = loss.choose(model, {"input_ids": torch.tensor([[3, 4]]), "labels": labels})
    >>> sorted(chosen.inputs["labels"][0].tolist()), round(chosen.entropy_limit.item(), 3)
    ([1, 5, 6, 7, 8, 9, 9], 1.792)
    """

    def __init__(
        self, strategy="sample", warmup_steps=1000, num_samples=1, separator_id=None, fixed_ids=(), orders=None
    ):
        if strategy not in _STRATEGIES:
            raise ValueError(f"strategy ({strategy!r}) must be one of {', '.join(map(repr, _STRATEGIES))}.")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps ({warmup_steps}) must be 0 or more; use 1000, or 0 for none.")
        if num_samples < 1 or (num_samples > 1 and strategy not in ("sample", "random")):
            raise ValueError(
                f"num_samples ({num_samples}) must be 1, or more with strategy 'sample' or 'random', but strategy is"
                f" {strategy!r}; use num_samples=1."
            )
        self.strategy = strategy
        self.warmup_steps = warmup_steps
        self.num_samples = num_samples
        self.separator_id = separator_id
        self.fixed_ids = frozenset(fixed_ids)
        self.orders = None if orders is None else [tuple(order) for order in orders]

    def __call__(self, model, inputs, step=None, **loss_arguments):
        """The loss of a batch, a scalar with a gradient.

        Args:
            model: in the mode that the loss is to be computed in.
            inputs: what its forward takes, `labels` included.
            step: optimizer steps done so far; None for a search without warm-up.
            loss_arguments: for the model's forward, such as `num_items_in_batch`.
        """
        return model(**self.choose(model, inputs, step).inputs, **loss_arguments).loss

    @torch.no_grad()
    def choose(self, model, inputs, step=None, num_samples=None, strategy=None) -> ChosenOrders:
        """Puts the targets of a batch into the chosen orders.

        `num_samples` and `strategy` replace those of the loss, for evaluation; other arguments as in `__call__`.
        """
        strategy = strategy or self.strategy
        inputs = _repeated(inputs, num_samples or self.num_samples)
        if not model.config.is_encoder_decoder:
            _check_causal(inputs)
        fixed = special_ids(model) | self.fixed_ids
        rows = inputs["labels"].tolist()
        targets = [split_target(row, self.separator_id, fixed, index) for index, row in enumerate(rows)]
        limit = torch.tensor([self._log_count(target, row) for row, target in enumerate(targets)])
        if strategy == "fixed":
            return ChosenOrders(inputs, torch.zeros_like(limit), limit)
        if strategy == "random" or (strategy in _SEARCHES and step is not None and step < self.warmup_steps):
            orders, entropy = [self._random(target) for target in targets], limit
        else:
            with _evaluating(model):
                if strategy == "exact" or self.orders is not None:
                    orders, entropy = self._compare(model, inputs, targets, sample=strategy == "sample")
                else:
                    orders, entropy = decode_orders(model, inputs, targets, sample=strategy == "sample")
        return ChosenOrders(_written(model, inputs, targets, orders), entropy, limit)

    def _log_count(self, target, row):
        """Logarithm of the number of orders: n! / (n_1! n_2! ...), or how many of the given ones differ."""
        count = len(target.segments)
        if self.orders is None:
            return math.lgamma(count + 1) - sum(math.lgamma(n + 1) for n in Counter(target.segments).values())
        if any(sorted(order) != list(range(count)) for order in self.orders):
            raise ValueError(
                f"orders ({self.orders}) must be permutations of 0 to {count - 1} because the set of row {row} has"
                f" {count} segments; leave orders out for sets of different sizes."
            )
        return math.log(len(self._candidates(target)))

    def _random(self, target):
        if self.orders is None:
            return shuffled(target.segments)
        return shuffled(self._candidates(target))[0]

    def _candidates(self, target):
        """All orders that differ, or those of the given ones that do."""
        if self.orders is None:
            return list(_orders(Counter(target.segments)))
        return list(dict.fromkeys(tuple(target.segments[place] for place in order) for order in self.orders))

    def _compare(self, model, inputs, targets, sample):
        """Candidates one after the other: each forward holds one order of every row."""
        for row, target in enumerate(targets):
            count = round(math.exp(self._log_count(target, row)))
            if count > MAX_ORDERS:
                raise ValueError(
                    f"labels of row {row} hold a set with {count} orders, but at most {MAX_ORDERS} are compared; use"
                    " strategy='greedy' or 'sample', sets of up to 4 segments, or orders to choose from."
                )
        candidates = [self._candidates(target) for target in targets]
        scores = []
        for index in range(max(map(len, candidates))):
            orders = [orders[min(index, len(orders) - 1)] for orders in candidates]
            scores.append(_log_likelihood(model, _written(model, inputs, targets, orders)))
        scores = torch.stack(scores, 1).cpu()
        counts = torch.tensor([len(orders) for orders in candidates])
        p = scores.masked_fill(torch.arange(scores.shape[1]) >= counts[:, None], -torch.inf).softmax(1)
        chosen = p.multinomial(1).squeeze(1) if sample else p.argmax(1)
        orders = [orders[index] for orders, index in zip(candidates, chosen.tolist(), strict=True)]
        return orders, torch.special.entr(p).sum(1)


def special_ids(model) -> set[int]:
    """Ids that begin or end a target of this model: they are no elements of a set."""
    names = ("bos_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id")
    ids = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in names:
            value = getattr(config, name, None)
            ids.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return ids


def _check_causal(inputs):
    labels, ids = inputs["labels"], inputs.get("input_ids")
    if ids is None or ids.shape != labels.shape or (ids != labels)[labels != -100].any():
        raise ValueError(
            "labels must be the input_ids with -100 on the prompt and the padding, because the model is causal; shift"
            " nothing, and pass input_ids."
        )
    there = torch.ones_like(labels) if inputs.get("attention_mask") is None else inputs["attention_mask"].long()
    target = labels != -100
    unread = (target & (target.cumsum(1) == 1) & (there.cumsum(1) == there)).any(1)  # nothing stands in front
    if unread.any():
        row = int(unread.nonzero()[0])
        raise ValueError(
            f"labels of row {row} begin with a target ({int(labels[row][target[row]][0])}), but a causal model does"
            " not predict a first token; put a prompt in front, or the beginning-of-sequence token, with label -100."
        )


def _repeated(inputs, times):
    if times == 1:
        return dict(inputs)
    return {
        name: value.repeat_interleave(times, 0) if isinstance(value, torch.Tensor) and value.dim() else value
        for name, value in inputs.items()
    }


def _written(model, inputs, targets, orders):
    """The batch with its targets in other orders; what was shifted before is shifted anew."""
    inputs = dict(inputs)
    names = ("labels",) if model.config.is_encoder_decoder else ("labels", "input_ids")
    for name in names:
        rows = inputs[name].tolist()
        for row, target, order in zip(rows, targets, orders, strict=True):
            target.write(row, order)
        inputs[name] = torch.tensor(rows, dtype=inputs[name].dtype, device=inputs[name].device)
    if inputs.pop("decoder_input_ids", None) is not None and hasattr(model, "prepare_decoder_input_ids_from_labels"):
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    return inputs


@contextmanager
def _evaluating(model):
    """Dropout off, and every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _orders(left):
    """All orders of a multiset that differ."""
    if not left:
        yield []
    for segment in left:
        for rest in _orders(left - Counter([segment])):
            yield [segment, *rest]


def _log_likelihood(model, inputs):
    """log p(target | rest) of every row, in float32 at least."""
    labels, logits = inputs["labels"], model(**inputs).logits
    if not model.config.is_encoder_decoder:
        labels, logits = labels[:, 1:], logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != -100
    chosen = logits.gather(-1, labels.masked_fill(~counted, 0).unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
    return chosen.masked_fill(~counted, 0.0).sum(-1)


class OrderSearchTrainerMixin:
    """Trains a `Trainer`'s model on target sets in orders that it chooses itself.

    Every batch's labels are put into the orders of `order_search` before the loss; what the labels were shifted to
    before is made anew. Evaluation measures the model's own best order: "sample" becomes "greedy" there. Batches must
    be whole on every process (one device, or DDP): sampling runs `generate()` on the bare model.

    Logs `order_entropy`, nats of the distribution the orders came from, and `order_entropy_limit`, those of a uniform
    one. If the first falls to 0 in the first steps of the search, it has settled early: prolong the warm-up.

    Args:
        order_search: an `OrderSearchLoss`; with its defaults if left out. All other arguments are `Trainer`'s.

    >>> class SetTrainer(OrderSearchTrainerMixin, Trainer): ...
    >>> trainer = SetTrainer(model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
    ...                      order_search=OrderSearchLoss(separator_id=5))  # doctest: +SKIP
    """

    def __init__(self, *args, order_search: OrderSearchLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.order_search = order_search or OrderSearchLoss()
        self._order_sums = torch.zeros(3, dtype=torch.float64)  # entropies, their limits, rows

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        search, bare = self.order_search, self.accelerator.unwrap_model(model)
        if model.training:
            chosen = search.choose(bare, inputs, self.state.global_step)
            self._order_sums += torch.stack(
                [chosen.entropy.double().sum(), chosen.entropy_limit.double().sum(), torch.tensor(len(chosen.entropy))]
            )
            if num_items_in_batch is not None:
                num_items_in_batch = num_items_in_batch * search.num_samples
        else:
            strategy = "greedy" if search.strategy == "sample" else search.strategy
            chosen = search.choose(bare, inputs, num_samples=1, strategy=strategy)
        return super().compute_loss(model, chosen.inputs, return_outputs, num_items_in_batch)

    def log(self, logs, start_time=None):
        if "loss" in logs and self._order_sums[2]:
            sums = self.accelerator.reduce(self._order_sums.float().to(self.args.device)).tolist()
            self._order_sums.zero_()
            logs = logs | {"order_entropy": sums[0] / sums[2], "order_entropy_limit": sums[1] / sums[2]}
        super().log(logs, start_time)


class OrderSearchTrainer(OrderSearchTrainerMixin, Trainer):
    """`Trainer` with `OrderSearchTrainerMixin`; mix the latter into another Trainer, such as `Seq2SeqTrainer`."""


__all__ = ["ChosenOrders", "OrderSearchLoss", "OrderSearchTrainer", "OrderSearchTrainerMixin"]
