"""Writing a set in an order that a model likes: decoding restricted to the segments that are not yet written.

Every row follows a walk through what is left of its set. A token may come next if a remaining segment goes on with it,
or if it is the separator behind one that is complete; equal segments may come as often as they occur. The walk ends
when only one order is left. All decoding is `generate()`, so it uses the model's own cache, padding and inputs.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

_LABELS = ("labels", "decoder_input_ids", "decoder_attention_mask")
_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


def decode_orders(model, inputs, targets, sample):
    """Orders of target sets by the model's own distribution, token by token, among what is left of each set.

    Args:
        model: in evaluation mode.
        inputs: the batch that the targets belong to.
        targets: a `SegmentedTarget` a row.
        sample: draw from the distribution; False takes the most likely token.

    Returns:
        A list of segments a row, and `[rows]` entropies in nats: the sums of those of every choice.
    """
    causal = not model.config.is_encoder_decoder
    walks = [_Walk(target, with_prefix=not causal) for target in targets]
    entropy = torch.zeros(len(walks))
    rows = [row for row, walk in enumerate(walks) if not walk.done]  # the others have only one order
    if rows:
        inputs = {
            name: value[rows] if isinstance(value, torch.Tensor) and value.dim() else value
            for name, value in inputs.items()
        }
        given = {name: value for name, value in inputs.items() if name not in _LABELS}
        if causal:
            given = {name: value for name, value in given.items() if name not in _PER_TOKEN}
            given |= _left_padded_prompts(inputs, [targets[row] for row in rows])
        with _plain_generation(model) as ids:
            guide = _Guide([walks[row] for row in rows], ids["pad_token_id"], inputs["labels"].device)
            model.generate(
                **given,
                generation_config=GenerationConfig(
                    max_new_tokens=max(walk.length for walk in walks),
                    num_beams=1,
                    use_cache=True,
                    **({"do_sample": True, "top_k": 0} if sample else {"do_sample": False}),
                    **ids,
                ),
                logits_processor=LogitsProcessorList([guide]),
                stopping_criteria=StoppingCriteriaList([_Stop(guide)]),
            )
        entropy[rows] = guide.entropy.cpu()
    return [walk.order for walk in walks], entropy


def _left_padded_prompts(inputs, targets):
    """What stands in front of the targets, so that all rows continue at the same place."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    prompts = []
    for row, target in enumerate(targets):
        end = target.start + len(target.prefix)
        prompts.append(ids[row, :end][mask[row, :end].bool()])
    width = max(map(len, prompts))
    padded, there = ids.new_zeros(len(prompts), width), mask.new_zeros(len(prompts), width)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :] = prompt
        there[row, width - len(prompt) :] = 1
    return {"input_ids": padded, "attention_mask": there}


@contextmanager
def _plain_generation(model):
    """Hides generation settings that models carry with them, which would bend the distribution; yields special ids."""
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    kept = [module.generation_config for module in holders]
    names = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
    ids = {name: getattr(model.generation_config, name, None) for name in names}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = 0  # what rows get that are done; nobody reads it
    ids["eos_token_id"] = None  # rows end when their set does
    for module in holders:
        module.generation_config = GenerationConfig(**ids)
    try:
        yield ids
    finally:
        for module, config in zip(holders, kept, strict=True):
            module.generation_config = config


class _Walk:
    """One row on its way through its set: which tokens may come next, until only one order is left."""

    def __init__(self, target, with_prefix):
        self.separator_id = target.separator_id
        self.forced = list(target.prefix) if with_prefix else []
        self.left = Counter(target.segments)
        self.order = []
        self.written = ()  # of the current segment
        self.length = len(self.forced) + len(target.ids(target.segments)) - len(target.prefix) - len(target.suffix)
        self._finish()

    @property
    def done(self):
        return not self.left

    def allowed(self):
        if self.forced:
            return {self.forced[0]}
        here = len(self.written)
        fitting = [segment for segment in self.left if segment[:here] == self.written]
        return {self.separator_id if len(segment) == here else segment[here] for segment in fitting}

    def advance(self, token):
        if self.done:
            return
        if self.forced:
            self.forced.pop(0)
            return
        if token == self.separator_id:
            self._complete()
        else:
            self.written += (token,)
            if self.separator_id is None:
                self._complete()
        self._finish()

    def _complete(self):
        self.order.append(self.written)
        self.left -= Counter([self.written])
        self.written = ()

    def _finish(self):
        if len(self.left) <= 1:  # all that is left is equal
            self.order.extend(self.left.elements())
            self.left = Counter()


class _Guide(LogitsProcessor):
    """Keeps generation on the walks, and adds up the entropies of its choices."""

    def __init__(self, walks, filler, device):
        self.walks = walks
        self.filler = filler  # what rows get that are done
        self.seen = None  # columns of input_ids
        self.entropy = torch.zeros(len(walks), device=device)

    def follow(self, input_ids):
        if self.seen is not None:
            for column in input_ids[:, self.seen :].T.tolist():
                for walk, token in zip(self.walks, column, strict=True):
                    walk.advance(token)
        self.seen = input_ids.shape[1]

    def __call__(self, input_ids, scores):
        self.follow(input_ids)
        allowed = [[self.filler] if walk.done else sorted(walk.allowed()) for walk in self.walks]
        places = torch.tensor([(row, token) for row, tokens in enumerate(allowed) for token in tokens])
        rows, tokens = places.to(scores.device).unbind(1)
        done = torch.tensor([walk.done for walk in self.walks], device=scores.device)
        kept = torch.full_like(scores, -torch.inf)
        kept[rows, tokens] = scores[rows, tokens].masked_fill(done[rows], 0.0)
        self.entropy += torch.special.entr(kept.softmax(-1)).sum(-1)
        return kept


class _Stop(StoppingCriteria):
    def __init__(self, guide):
        self.guide = guide

    def __call__(self, input_ids, scores, **kwargs):
        self.guide.follow(input_ids)
        return torch.tensor([walk.done for walk in self.guide.walks], device=input_ids.device)
