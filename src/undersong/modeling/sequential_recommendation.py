"""What recommenders by item id share: positions of a padded history, and a head that scores items or makes the loss.

The loss sees only the positions that have a label, so the scores of all items for all positions are never built.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import ModelOutput

from .recommend import RecommendMixin, check_item_ids
from .recommendation_losses import recommendation_loss


@dataclass
class SequentialRecOutput(ModelOutput):
    """Output of a recommender.

    loss: scalar, if labels were given.
    logits: `[batch, kept, num_items]`, column i is the score of item i + 1; None if labels were given, since the loss
        makes none.
    hidden_states, attentions: of every layer, if asked for.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


def history_positions(mask, num_positions, anchor):
    """Positions `[batch, length]` of a padded history; padding gets any valid one.

    Args:
        mask: `[batch, length]` bool, True for items (and the mask).
        anchor: "right": the last of a row has position `num_positions - 1`, whatever is padded; "left": the first
            has position 0.

    >>> mask = torch.tensor([[False, True, True]])
    >>> history_positions(mask, 10, "right").tolist(), history_positions(mask, 10, "left").tolist()
    ([[8, 8, 9]], [[0, 0, 1]])
    """
    if anchor == "left":
        return (mask.long().cumsum(1) - 1).clamp(min=0)
    return (num_positions - mask.long().flip(1).cumsum(1).flip(1)).clamp(max=num_positions - 1)


def check_length(length, num_positions):
    if length > num_positions:
        raise ValueError(
            f"input_ids has {length} columns, but max_position_embeddings is {num_positions}; keep the most recent"
            f" {num_positions}, as collators and recommend() do."
        )


class SequentialRecMixin(RecommendMixin):
    """Head of a recommender by item id; the class gives `head_states`, `output_weights` and `item_parameters`."""

    def add_item_counts(self):
        """For `negative_sampler="popularity"`: a buffer that is saved with the weights."""
        if self.config.negative_sampler == "popularity":
            self.register_buffer("item_counts", torch.ones(self.config.num_items))

    def init_item_counts(self):
        if "item_counts" in self._buffers:
            init.ones_(self.item_counts)

    def set_item_counts(self, counts):
        """How often each item occurs, `[num_items]`: negatives are drawn in proportion, at least as if seen once."""
        if "item_counts" not in self._buffers:
            raise ValueError(
                f"negative_sampler ({self.config.negative_sampler!r}) draws without counts; use 'popularity'."
            )
        if counts.shape != self.item_counts.shape:
            raise ValueError(f"counts ({list(counts.shape)}) must be [num_items] = [{self.config.num_items}].")
        self.item_counts.copy_(counts.clamp(min=1))

    def item_table(self):
        """`(table [num_items, d], bias [num_items] or None)`: what the vector of a history is multiplied with."""
        weight, bias = self.output_weights()
        items = slice(1, self.config.num_items + 1)
        return weight[items], None if bias is None else bias[items]

    def score(self, outputs, labels, logits_to_keep, num_items_in_batch=None):
        """`SequentialRecOutput` of a trunk's outputs: logits, or with labels the loss."""
        items_only = getattr(self.config, "logits_over_items_only", True)
        table, bias = self.item_table() if items_only else self.output_weights()
        states, loss, logits = outputs.last_hidden_state, None, None
        if labels is None:
            logits = F.linear(self.head_states(slice_logits_to_keep(states, logits_to_keep)), table, bias)
        else:
            if labels.device.type == "cpu":
                check_item_ids("labels", labels.clamp(min=0), self.config.num_items, self.config.num_items)
            chosen = labels > 0
            loss = recommendation_loss(
                self.head_states(states[chosen]),
                labels[chosen] - int(items_only),
                table,
                bias,
                self.config,
                counts=self._buffers.get("item_counts"),
                num_items_in_batch=num_items_in_batch,
            )
        return SequentialRecOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = ["SequentialRecMixin", "SequentialRecOutput", "check_length", "history_positions"]
