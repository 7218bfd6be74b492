"""The tensors of prompts with sets: positions that restart in every member, and who may see whom.

Set-based prompting (McIlroy-Young et al., "Order-Independence Without Fine Tuning", NeurIPS 2024, arXiv 2406.06581,
section 3): members of a set start at the same position and do not see each other; text after the set sees them all
and goes on behind the longest. Attention does not know in which order its keys lie in memory, so neither does the
model's output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .masks import to_model_mask


def set_attention(segment_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.BoolTensor:
    """Which key each query may see: those before it, except those in another member of a set that holds both.

    Args:
        segment_ids: `[batch, length, 2 * levels]` integers: pairs (set, member), outermost set first, -1 outside sets.
            A set has one number in its row.
        attention_mask: `[batch, length]`, 0 on padding, which sees itself only and is seen by nothing else.

    Returns:
        `[batch, length, length]` bool, queries first.

    >>> set_attention(torch.tensor([[[-1, -1], [0, 0], [0, 1], [-1, -1]]]), torch.ones(1, 4)).int()
    tensor([[[1, 0, 0, 0],
             [1, 1, 0, 0],
             [1, 0, 1, 0],
             [1, 1, 1, 1]]], dtype=torch.int32)
    """
    length, device = segment_ids.shape[1], segment_ids.device
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    allowed = allowed & attention_mask.to(device, torch.bool)[:, None, :]
    for of_set, member in segment_ids.unflatten(-1, (-1, 2)).permute(2, 3, 0, 1):  # each [batch, length]
        same_set = (of_set[:, :, None] == of_set[:, None, :]) & (of_set >= 0)[:, :, None]
        allowed &= ~(same_set & (member[:, :, None] != member[:, None, :]))
    return allowed | torch.eye(length, dtype=torch.bool, device=device)


@dataclass(frozen=True)
class SetPromptEncoding:
    """Prompts with sets as tensors; made by `SetPrompt.encode`.

    Attributes:
        input_ids: `[batch, length]` int64, the members of a set one after another, left-padded.
        attention_mask: `[batch, length]` int64, 0 on padding.
        position_ids: `[batch, length]` int64, 0 on padding.
        segment_ids: `[batch, length, 2 * levels]` int16: pairs (set, member), outermost set first, -1 outside sets.
            Sets and members are numbered as they are laid out.
        permutation: per row and set number, the caller's index of each member as laid out.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    position_ids: torch.LongTensor
    segment_ids: torch.Tensor
    permutation: list[list[tuple[int, ...]]]

    def to(self, device: torch.device | str) -> SetPromptEncoding:
        """The same on another device."""
        names = ("input_ids", "attention_mask", "position_ids", "segment_ids")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def generate_kwargs(self) -> dict[str, torch.Tensor]:
        """Arguments of `model.generate(..., custom_generate=SetBasedGenerate())`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "set_segment_ids": self.segment_ids,
        }

    def to_forward_kwargs(self, model, labels: bool = False) -> dict:
        """Arguments of `model(...)`: scoring or training in one pass, on the encoding's device.

        Args:
            labels: also give labels: the text after the last set (the whole text of a row without sets), without its
                first token, because what lies before that in memory is one member like any other.

        Raises:
            ValueError: the model cannot run with sets; see `to_model_mask`.
        """
        positions = (self.position_ids, self.position_ids)
        allowed = set_attention(self.segment_ids, self.attention_mask)
        arguments = {
            "input_ids": self.input_ids,
            "attention_mask": to_model_mask(allowed, model, positions=positions),
            "position_ids": self.position_ids,
            "use_cache": False,
        }
        if labels:
            outside = self.segment_ids[:, :, 0] < 0
            suffix = outside.flip(1).cumprod(1).flip(1).bool() & self.attention_mask.bool()
            first = suffix & ~suffix.roll(1, dims=1)
            first[:, 0] = suffix[:, 0]
            arguments["labels"] = self.input_ids.masked_fill(~suffix | first, -100)
        return arguments

    def member_spans(self, row: int, set_number: int = 0) -> list[tuple[int, int]]:
        """Where the members of a set lie in the row, `(start, end)` each, in the caller's order."""
        order = self.permutation[row][set_number]
        pairs = self.segment_ids[row].unflatten(-1, (-1, 2))  # [length, levels, 2]
        spans = [(0, 0)] * len(order)
        for member, index in enumerate(order):
            own = (pairs[..., 0] == set_number) & (pairs[..., 1] == member)
            places = own.any(-1).nonzero().flatten().tolist()
            spans[index] = (places[0], places[-1] + 1)
        return spans
