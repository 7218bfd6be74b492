"""DITTO: fine-tuning that makes every repetition less likely than the one before (Xu et al., "Learning to Break the
Loop: Analyzing and Mitigating Repetitions for Neural Text Generation", NeurIPS 2022, arXiv 2206.02369, section 4).

On rows that repeat one sentence (`DittoDataCollator` makes them) the loss pulls the probability of each repeated token
towards lambda times what it was one copy earlier, P(copy n) = lambda * P(copy n-1); other rows train as usual.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import Trainer, TrainerCallback

_KINDS = ("nl", "nl_clip", "mse")
_CHUNK_BYTES = 64 << 20  # of float32 logits at once


class DittoTerms(NamedTuple):
    """Sums over the set M of repeated predictions: losses, |M|, probabilities P and baselines b (0-dim tensors)."""

    loss: torch.Tensor
    count: torch.Tensor
    probability: torch.Tensor
    baseline: torch.Tensor


class DittoLoss:
    """Mean distance of repeated tokens' probabilities to lambda times those of the copy before.

    With P_t the probability of the token that follows position t, l the prefix length and L the unit length,
    b_t = P_{t-L} without gradient, M = {t >= l + L}, d_t = P_t - lambda * b_t:

        nl: -log(1 - |d_t|)      nl_clip: -log(1 - max(d_t, 0))      mse: 3 * d_t^2       (mean over M)

    The prefix, the first copy and the first token of the second copy (whose counterpart followed the prefix, another
    context) carry no loss. nl_clip only punishes repetitions that are too likely.

    Args:
        lambda_: in [0, 1]. 0.5 for open-ended text in the paper; near 1 where copying is legitimate.
        kind: "nl", "nl_clip" or "mse".
        eps: 1 - |d| is not taken below it, nor below the resolution of the dtype.
        legacy_mse: for comparison with the authors' code, whose "mse" also pulls every prediction outside M towards 0.

    Raises:
        ValueError: an argument out of range; padding (labels below 0) in a row with a unit.

    >>> loss = DittoLoss(lambda_=0.5)
    >>> logits = torch.zeros(1, 6, 4)  # every probability is 1/4, the target 1/8
    >>> labels = torch.tensor([[3, 0, 1, 0, 1, 0]])  # a prefix of one token, copies of two
    >>> loss(logits, labels, prefix_len=torch.tensor([1]), unit_len=torch.tensor([2]))  # -log(1 - 1/8)
    tensor(0.1335)
    """

    def __init__(self, lambda_: float = 0.5, kind: str = "nl", eps: float = 1e-20, legacy_mse: bool = False):
        if not 0.0 <= lambda_ <= 1.0:
            raise ValueError(f"lambda_ ({lambda_}) must lie in [0, 1]; use 0.5 for open-ended text.")
        if kind not in _KINDS:
            raise ValueError(f"kind ({kind!r}) must be one of {', '.join(map(repr, _KINDS))}.")
        if not 0.0 < eps < 1.0:
            raise ValueError(f"eps ({eps}) must lie between 0 and 1; use 1e-20.")
        if legacy_mse and kind != "mse":
            raise ValueError(f"legacy_mse (True) needs kind='mse', but kind is {kind!r}.")
        self.lambda_ = lambda_
        self.kind = kind
        self.eps = eps
        self.legacy_mse = legacy_mse

    def __call__(self, logits, labels, prefix_len, unit_len) -> torch.Tensor:
        """Args:
            logits: `[rows, length, vocab]`, any float dtype; probabilities are computed in float32 at least.
            labels: `[rows, length]`, the tokens of the rows, not shifted, as transformers' models take them.
            prefix_len, unit_len: `[rows]`; rows with unit_len 0 carry no loss.

        Returns:
            The mean over M, 0 if M is empty.
        """
        terms = self.terms(logits, labels, prefix_len, unit_len)
        return terms.loss / terms.count.clamp(min=1)

    def terms(self, logits, labels, prefix_len, unit_len) -> DittoTerms:
        """The sums behind the mean, to be normalised over more than this batch."""
        pseudo = unit_len > 0
        if (labels.lt(0).any(1) & pseudo).any():
            bad = (labels.lt(0).any(1) & pseudo).nonzero().flatten().tolist()
            raise ValueError(
                f"labels must hold no padding in rows with a unit, but rows {bad} do; fill them with copies of the "
                "unit, as DittoDataCollator does."
            )
        time = torch.arange(labels.shape[1] - 1, device=labels.device)
        first = torch.zeros_like(prefix_len) if self.legacy_mse else prefix_len
        row, t = (pseudo[:, None] & (time >= first[:, None])).nonzero(as_tuple=True)
        p = _TokenLogProb.apply(logits, row, t, labels[row, t + 1]).exp()
        repeated = (t >= (prefix_len + unit_len)[row]).nonzero().squeeze(1)
        # positions of a row follow one another in p, so one unit earlier is unit_len places earlier
        now, before = p[repeated], p.detach()[repeated - unit_len[row[repeated]]]
        difference = now - self.lambda_ * before
        if self.kind == "mse":
            loss = 3 * difference.square().sum()
            if self.legacy_mse:
                loss = loss + 3 * (p.square().sum() - now.square().sum())
        else:
            excess = difference.abs() if self.kind == "nl" else difference.relu()
            # log1p keeps the digits of small distances; at 1, where a copy went from impossible to certain, the
            # gradient would be infinite
            limit = 1 - max(self.eps, torch.finfo(p.dtype).eps / 2)
            loss = -torch.log1p(-excess.clamp(max=limit)).sum()
        count = torch.tensor(repeated.numel(), device=p.device)
        return DittoTerms(loss, count, now.detach().sum(), before.sum())


class _TokenLogProb(torch.autograd.Function):
    """log p(token | row, t) at chosen positions in float32, without a softmax or a float32 copy of all logits."""

    @staticmethod
    def forward(ctx, logits, row, t, token):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = torch.empty(len(row), dtype=dtype, device=logits.device)
        for part in _chunks(logits, len(row)):
            lse[part] = logits[row[part], t[part]].to(dtype).logsumexp(-1)
        ctx.save_for_backward(logits, row, t, token, lse)
        return logits[row, t, token].to(dtype) - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, row, t, token, lse = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        carrying = grad.nonzero().squeeze(1)  # the first copies have none
        row, t, token, lse, grad = (x[carrying] for x in (row, t, token, lse, grad))
        for part in _chunks(logits, len(row)):
            # d log p(v) / d logits = onehot(v) - p
            p = (logits[row[part], t[part]].to(lse.dtype) - lse[part, None]).exp_()
            p[torch.arange(len(p), device=p.device), token[part]] -= 1
            grad_logits[row[part], t[part]] = (p * -grad[part, None]).to(logits.dtype)
        return grad_logits, None, None, None


def _chunks(logits: torch.Tensor, count: int) -> list[slice]:
    size = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    return [slice(i, i + size) for i in range(0, count, size)]


class DittoTrainerMixin:
    """Adds the DITTO loss to a `Trainer` whose batches come from `DittoDataCollator`.

    Plain rows get the model's own loss; pseudo-repetitive rows of the same forward pass add the DITTO loss, its sum
    divided by |M| of the whole optimizer step: all accumulated batches and, as `average_tokens_across_devices` says
    for the LM loss too, all processes. Evaluation uses plain rows only, so `eval_loss` is a language modelling loss.

    Logs `lm_loss`, `ditto_loss` (means over tokens) and `tp_ratio`, sum P / sum b: above 1 repetitions reinforce
    themselves, and training pulls it to lambda.

    Args:
        ditto_loss: a `DittoLoss`; with its defaults if left out. All other arguments are `Trainer`'s.

    >>> from undersong.training import DittoDataCollator, DittoLoss, DittoTrainer
    >>> trainer = DittoTrainer(model, args, train_dataset=rows, data_collator=DittoDataCollator(tokenizer),
    ...                        ditto_loss=DittoLoss(lambda_=0.5))  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, *args, ditto_loss: DittoLoss | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.ditto_loss = ditto_loss or DittoLoss()
        self._ditto_count = None  # |M| of the current optimizer step
        self._ditto_sums: dict[str, torch.Tensor] = {}
        if hasattr(self.data_collator, "set_epoch"):
            self.add_callback(EpochOfDraws(self.data_collator))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        prefix_len, unit_len = inputs.pop("ditto_prefix_len", None), inputs.pop("ditto_unit_len", None)
        labels = inputs["labels"]
        if (labels != -100).any():
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            tokens = labels[:, 1:].ne(-100).sum()
            items = tokens if num_items_in_batch is None else num_items_in_batch / self._ditto_processes()
            if model.training:
                self._ditto_add(lm_loss=loss.detach().mean() * items, lm_tokens=tokens)
        else:  # the mean of no tokens would be nan
            outputs, loss = model(**{k: v for k, v in inputs.items() if k != "labels"}), 0.0
        if unit_len is not None and model.training:
            tokens = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            terms = self.ditto_loss.terms(outputs["logits"], tokens, prefix_len, unit_len)
            count = terms.count if self._ditto_count is None else self._ditto_count
            scale = self._ditto_processes() / count.clamp(min=1)
            if num_items_in_batch is None and self.compute_loss_func is None:
                scale = scale * self.current_gradient_accumulation_steps  # training_step will divide by it
            loss = loss + terms.loss * scale
            self._ditto_add(**{f"ditto_{name}": term.detach() for name, term in terms._asdict().items()})
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        if batch_samples and "ditto_unit_len" in batch_samples[0]:
            count = sum(_repeated(batch).sum() for batch in batch_samples).to(device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                count = self.accelerator.gather(count).sum() / self.get_tp_size()
            self._ditto_count = count
        return super()._get_num_items_in_batch(batch_samples, device)

    def _ditto_processes(self) -> int:
        """What a loss that is normalised over all processes is multiplied by, because their gradients are averaged."""
        return self.accelerator.num_processes // self.get_tp_size() if self.args.average_tokens_across_devices else 1

    def _ditto_add(self, **sums):
        for name, value in sums.items():
            self._ditto_sums[name] = self._ditto_sums.get(name, 0.0) + value

    def log(self, logs, start_time=None):
        if "loss" in logs and self._ditto_sums:
            names = ("lm_loss", "lm_tokens", *(f"ditto_{name}" for name in DittoTerms._fields))
            sums = torch.stack(
                [torch.as_tensor(self._ditto_sums.get(name, 0.0), device=self.args.device).float() for name in names]
            )
            sums = dict(zip(names, self.accelerator.reduce(sums).tolist(), strict=True))
            self._ditto_sums = {}
            ratios = {
                "lm_loss": ("lm_loss", "lm_tokens"),
                "ditto_loss": ("ditto_loss", "ditto_count"),
                "tp_ratio": ("ditto_probability", "ditto_baseline"),
            }
            logs = logs | {name: sums[a] / sums[b] for name, (a, b) in ratios.items() if sums[b]}
        super().log(logs, start_time)

    def get_eval_dataloader(self, *args, **kwargs):
        with self._plain_rows():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs):
        with self._plain_rows():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _plain_rows(self):
        collator = self.data_collator
        self.data_collator = collator.plain() if hasattr(collator, "plain") else collator
        try:
            yield
        finally:
            self.data_collator = collator

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns.append("assistant_masks")  # the collator reads it


class DittoTrainer(DittoTrainerMixin, Trainer):
    """`Trainer` with `DittoTrainerMixin`; mix the latter into another Trainer (e.g. one with adapters) yourself."""


class EpochOfDraws(TrainerCallback):
    """Tells whatever draws by epoch (a collator, a sampler with `set_epoch`) which epoch begins."""

    def __init__(self, collator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(math.floor(state.epoch or 0))


def _repeated(batch) -> torch.Tensor:
    """|M| of every row."""
    last = batch["input_ids"].shape[1] - 1
    count = last - batch["ditto_prefix_len"] - batch["ditto_unit_len"]
    return count.clamp(min=0) * batch["ditto_unit_len"].gt(0)
