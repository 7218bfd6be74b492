"""Training that carries the recurrent state from step to step, so that a model meets the states of long texts.

A recurrence trained on short texts from zero has never seen what its state becomes later, and may fail there ("Stuffed
Mamba", arXiv 2410.07145, section 5). Here the final state of every row, detached, is where the next window of its
document begins: truncated backpropagation through time. Buitrago and Gu (arXiv 2507.02782) find that it is enough to
begin in other states than zero, final ones of other texts or noise like them; `initial_states` has both.
"""

from __future__ import annotations

import os

import torch
from transformers import Trainer
from transformers.cache_utils import Cache

from ..modeling.cache import RecurrentStateLayer
from ..modeling.state_file import load_state, save_state, state_metadata
from .ditto import EpochOfDraws
from .mamba import InitialState
from .streaming_documents import DocumentStreamSampler, DocumentWindows

_INITIAL = ("zero", "gaussian", "passed")
_LINEAR = ("ssm", "state")  # states in which a sum of two states is a state; a convolution's window stays zero
_MOMENTUM = 0.9  # of the running statistics


class StatePassingTrainerMixin:
    """Begins each window of a document in the state that the window before left, in a `Trainer`.

    Batches come from `DocumentWindows` through a `StreamingDocumentCollator`: a micro-batch continues the rows of the
    one before, and a row whose `doc_start` is True begins anew. Batches without `doc_start` hold a new text in every
    row, which is what `initial_states="passed"` and "gaussian" need no more than. Any model whose cache consists of
    `RecurrentStateLayer`s trains this way. Evaluation begins every row in the model's own initial state.

    States are local to a process. They are saved with a checkpoint's random states, and resuming goes on from them.

    Args:
        initial_states: where a document begins: "zero", the model's own initial state; "passed", the final state of
            another row of the step before; "gaussian", independent draws with the running mean and standard deviation
            of final states, per layer and head (per channel in Mamba).
        state_dropout: probability that a row begins in the model's own initial state, whatever it continues.
        save_states: False leaves them out of checkpoints; then rows resume in the model's own initial state.
        All other arguments are `Trainer`'s.

    Raises:
        ValueError: an argument out of range, or settings and models that cannot carry a state.

    >>> from undersong.training.streaming_documents import DocumentWindows, StreamingDocumentCollator
    >>> trainer = StatePassingTrainer(model, args, train_dataset=DocumentWindows(documents, window=2048),
    ...                               data_collator=StreamingDocumentCollator())  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, *args, initial_states="zero", state_dropout=0.0, save_states=True, **kwargs):
        if initial_states not in _INITIAL:
            raise ValueError(f"initial_states ({initial_states!r}) must be one of {', '.join(map(repr, _INITIAL))}.")
        if not 0.0 <= state_dropout <= 1.0:
            raise ValueError(f"state_dropout ({state_dropout}) must lie in [0, 1]; use 0.1, or 0 to keep every state.")
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu ({self.args.n_gpu}) must be 1, because DataParallel deals rows out anew at every step; start"
                " one process per GPU with torchrun."
            )
        if self.args.label_smoothing_factor > 0:
            raise ValueError(
                f"label_smoothing_factor ({self.args.label_smoothing_factor}) must be 0, because its loss leaves out"
                " the first token of every window."
            )
        if self.args.accelerator_config.split_batches:
            raise ValueError("split_batches (True) must be False, because it moves rows between processes.")
        if any(isinstance(module, InitialState) for module in self.model.modules()):
            raise ValueError(
                "model has learned initial states, which carried states would replace; train them with"
                " MambaTrainer, before or after."
            )
        self.initial_states, self.state_dropout, self.save_states = initial_states, state_dropout, save_states
        self._fresh: Cache | None = None  # one row before its first token
        self._carried: Cache | None = None  # the rows of the last micro-batch
        self._statistics: list[dict] = []  # per layer: name -> running mean and mean square, per head

    # data

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, DocumentWindows):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # batches go to the processes in turn, so a row of the whole is a row of one process throughout
        sampler = DocumentStreamSampler(dataset, self._train_batch_size * self.args.world_size, seed)
        self.add_callback(EpochOfDraws(sampler))  # resuming wraps the loader, which then passes no epoch on
        return sampler

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += ["shift_labels", "doc_start"]

    # the loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        doc_start = inputs.pop("doc_start", None)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if doc_start is None:
            if self.initial_states == "zero":
                raise ValueError(
                    "batches have no doc_start, so no row could continue another; use a StreamingDocumentCollator, or"
                    " initial_states='passed' to begin each text in the final state of another."
                )
            ids = inputs["input_ids"]
            doc_start = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if self._fresh is None:
            self._fresh = _fresh_row(model, inputs["input_ids"])
        cache = self._begin(doc_start)
        inputs |= {"past_key_values": cache, "use_cache": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._carry(cache)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _begin(self, doc_start) -> Cache:
        """The states that the rows of a micro-batch begin in."""
        rows, carried = len(doc_start), self._carried
        if carried is not None and (before := carried.layers[0].batch_size) != rows:
            if not doc_start.all():
                raise ValueError(
                    f"the batch has {rows} rows but the one before had {before}, so it is unclear what continues what;"
                    " train on DocumentWindows, or set dataloader_drop_last=True."
                )
            carried = None
        dropped = torch.rand(rows, device=doc_start.device) < self.state_dropout
        donors = _other_rows(rows, doc_start.device) if self.initial_states == "passed" else None
        cache = Cache(layers=[])
        for index, fresh in enumerate(self._fresh.layers):
            layer = RecurrentStateLayer()
            blank = {name: state.expand(rows, *state.shape[1:]) for name, state in fresh.states.items()}
            if carried is None:
                layer.write(**blank)
                layer.advance(0, torch.zeros(rows, dtype=torch.long, device=doc_start.device))
            else:
                states = {}
                for name, state in carried.layers[index].states.items():
                    begin = self._initial_state(index, name, state, blank[name], donors)
                    states[name] = _choose(dropped, blank[name], _choose(doc_start, begin, state))
                layer.write(**states)
                layer.advance(0, carried.layers[index].valid_tokens.masked_fill(doc_start, 0))
            cache.layers.append(layer)
        return cache

    def _initial_state(self, index, name, state, blank, donors):
        if self.initial_states == "passed":
            return state[donors]
        if self.initial_states == "gaussian" and name in _LINEAR and self._statistics:
            mean, square = (moment.view(1, -1, *(1,) * (state.dim() - 2)) for moment in self._statistics[index][name])
            return torch.randn_like(state) * (square - mean.square()).clamp(min=0).sqrt() + mean
        return blank

    @torch.no_grad()
    def _carry(self, cache):
        for layer in cache.layers:
            layer.write(**{name: state.detach() for name, state in layer.states.items()})
        self._carried = cache
        if self.initial_states == "gaussian":
            self._statistics = [
                {name: _running(before.get(name), layer.states[name]) for name in _linear_states(layer)}
                for layer, before in zip(cache.layers, self._statistics or [{}] * len(cache.layers), strict=True)
            ]

    # checkpoints: like random states, carried states are those of one process

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        if self.save_states and self._carried is not None:
            statistics = [
                {name: [moment.tolist() for moment in moments] for name, moments in layer.items()}
                for layer in self._statistics
            ]
            path, model = self._states_file(output_dir), self.accelerator.unwrap_model(self.model)
            save_state(self._carried, path, model=model, overwrite=True, statistics=statistics)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        path = None if checkpoint is None else self._states_file(checkpoint)
        if path is not None and os.path.isfile(path):
            model = self.accelerator.unwrap_model(self.model)
            self._carried = load_state(path, model=model)
            self._statistics = [
                {name: torch.tensor(moments, device=self.args.device).unbind() for name, moments in layer.items()}
                for layer in state_metadata(path)["statistics"]
            ]

    def _states_file(self, folder):
        number = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return os.path.join(folder, f"recurrent_states{number}.safetensors")


class StatePassingTrainer(StatePassingTrainerMixin, Trainer):
    """`Trainer` with `StatePassingTrainerMixin`; mix the latter into another Trainer yourself."""


@torch.no_grad()
def _fresh_row(model, input_ids) -> Cache:
    """The state of a row before its first token: what reading nothing but padding leaves, whatever the model."""
    cache = Cache(layers=[])
    token = input_ids[:1, :1]
    with torch.random.fork_rng([token.device] if token.is_cuda else []):  # resumed or not, dropout draws the same
        model(input_ids=token, attention_mask=torch.zeros_like(token), past_key_values=cache, use_cache=True)
    if not cache.layers or not all(isinstance(layer, RecurrentStateLayer) and layer.states for layer in cache.layers):
        raise ValueError(
            f"model ({type(model).__name__}) keeps no recurrent state that could be carried on: its cache must consist"
            " of RecurrentStateLayers; make a stock Mamba ours with undersong.enable_fast_mamba(model)."
        )
    return cache


def _linear_states(layer):
    names = [name for name in layer.states if name in _LINEAR]
    if not names:
        raise ValueError(
            f"initial_states ('gaussian') needs a state that is a sum, such as Mamba's, but the model's consists of"
            f" {', '.join(layer.states)}; use initial_states='passed'."
        )
    return names


def _running(before, state):
    """Running mean and mean square of a state, `[batch, heads, ...]`, per head."""
    state = state.transpose(0, 1).flatten(1)
    now = state.mean(1), state.square().mean(1)
    return now if before is None else tuple(a.lerp(b, 1 - _MOMENTUM) for a, b in zip(before, now, strict=True))


def _other_rows(rows, device):
    """For every row another one, at random; a single row is its own."""
    if rows == 1:
        return torch.zeros(1, dtype=torch.long, device=device)
    order = torch.randperm(rows, device=device)
    donors = torch.empty_like(order)
    donors[order] = order.roll(1)
    return donors


def _choose(rows, yes, no):
    return torch.where(rows.view(-1, *(1,) * (yes.dim() - 1)), yes, no)


__all__ = ["StatePassingTrainer", "StatePassingTrainerMixin"]
