"""Batches for Recformer: pairs of history and next item with masks (pretraining), or histories with labels.

Pretraining (arXiv 2305.13731, section 2.3) takes the next item from the second half of a sequence and masks whole
words of both; finetuning (section 2.4) takes it from anywhere. Draws come from torch's generator, which Trainer seeds.
"""

from __future__ import annotations

import torch

from ..modeling.recommend import check_item_ids
from ..tokenization.item_vocab import left_pad

MLM_PROBABILITY = 0.15


class DataCollatorForRecformerPretraining:
    """Makes batches for `RecformerForPreTraining`.

    Of a sequence of n items, t is uniform in (n - 1) // 2 .. n - 1 (but at least 1): items before t are the history,
    item t is the target. Words of both are masked until `mlm_probability` of the tokens are, `<s>` counted but never
    masked; of the tokens of masked words 80 % become the mask, 10 % another token, 10 % stay.

    Args:
        tokenizer: a `RecformerTokenizer` around a tokenizer with a mask token.
        mlm_probability: share of tokens to predict.
        max_predictions: most tokens to predict in a row.

    Examples are lists of items (attribute dictionaries), oldest first, at least two; or dicts with those as `items`.

    Returns:
        `input_ids`, `masked_input_ids`, `labels`, `attention_mask`, `token_type_ids`, `item_position_ids`, and the
        same for the target behind `target_`.

    Raises:
        ValueError: no mask token, a share outside (0, 1), or a sequence of fewer than two items.
    """

    def __init__(self, tokenizer, mlm_probability=MLM_PROBABILITY, max_predictions=512):
        if tokenizer.tokenizer.mask_token_id is None:
            raise ValueError("tokenizer has no mask token; set tokenizer.tokenizer.mask_token.")
        if not 0 < mlm_probability < 1:
            raise ValueError(f"mlm_probability ({mlm_probability}) must lie in (0, 1); use {MLM_PROBABILITY}.")
        if max_predictions < 1:
            raise ValueError(f"max_predictions ({max_predictions}) must be at least 1; use 512.")
        self.tokenizer, self.mlm_probability, self.max_predictions = tokenizer, mlm_probability, max_predictions
        special = set(tokenizer.tokenizer.all_special_ids)
        self.words = torch.tensor([token for token in range(len(tokenizer.tokenizer)) if token not in special])

    def __call__(self, examples):
        histories, targets = [], []
        for example in examples:
            items = example["items"] if isinstance(example, dict) else example
            if len(items) < 2:
                raise ValueError(f"a sequence of {len(items)} items has no history and next item; leave it out.")
            t = int(torch.randint(max(1, (len(items) - 1) // 2), len(items), ()))
            histories.append(items[:t])
            targets.append([items[t]])
        batch = self._masked(histories)
        return batch | {f"target_{name}": value for name, value in self._masked(targets).items()}

    def _masked(self, histories):
        batch = self.tokenizer(histories, words=True)
        chosen = choose_words(
            batch.pop("word_ids"), batch["attention_mask"], self.mlm_probability, self.max_predictions
        )
        ids, draw = batch["input_ids"], torch.rand(chosen.shape)
        masked = torch.where(chosen & (draw < 0.8), self.tokenizer.tokenizer.mask_token_id, ids)
        other = self.words[torch.randint(len(self.words), ids.shape)]
        masked = torch.where(chosen & (draw >= 0.9), other, masked)
        return {**batch, "masked_input_ids": masked, "labels": torch.where(chosen, ids, -100)}


def choose_words(word_ids, attention_mask, probability, most):
    """Whole words, drawn until their tokens are `probability` of the row's; `[batch, length]` bool.

    The number of tokens is max(1, round(probability x tokens)), at most `most`; a word that would exceed it is passed
    over, unless nothing is chosen yet and no word fits.

    Args:
        word_ids: `[batch, length]`, equal for tokens of one word, -1 where nothing may be chosen.
        attention_mask: `[batch, length]`, what counts as a token.
    """
    chosen = torch.zeros(word_ids.shape, dtype=torch.bool)
    for row, words, tokens in zip(chosen, word_ids, attention_mask.sum(1).tolist(), strict=True):
        names, counts = words[words >= 0].unique(return_counts=True)
        left = min(most, max(1, round(probability * tokens)))
        order = torch.randperm(len(names))
        picked = []
        for name, count in zip(names[order].tolist(), counts[order].tolist(), strict=True):
            if count <= left:
                picked.append(name)
                left -= count
            if not left:
                break
        if not picked and len(names):
            picked = [names[counts.argmin()].item()]
        row |= torch.isin(words, torch.tensor(picked, dtype=words.dtype))
    return chosen


class DataCollatorForRecformerFinetuning:
    """Makes batches for `RecformerForSequentialRecommendation`: a history and the item that follows.

    Args:
        tokenizer: a `RecformerTokenizer`.
        items: the catalogue, in the order of its ids 1..N: attribute dictionaries, or the `ItemTable` of them.
        min_history: fewest items before the target.
        random_target: draw the target's place; False takes the last item, for evaluation.
        max_token_num: tokens of a history, instead of the tokenizer's own number.

    Examples are lists of item ids, oldest first; or dicts with those as `input_ids` and, optionally, the item to
    predict behind them as `target` (a number, or a list of one).

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids`, `item_position_ids` `[batch, tokens]`, `labels` `[batch]`.

    Raises:
        ValueError: a sequence without a history and a target, or an id outside 1..N.
    """

    def __init__(self, tokenizer, items, min_history=1, random_target=True, max_token_num=None):
        if min_history < 0:
            raise ValueError(f"min_history ({min_history}) must not be negative; use 1.")
        self.tokenizer, self.min_history, self.random_target = tokenizer, min_history, random_target
        self.table = items if hasattr(items, "token_types") else tokenizer.encode_items(items)
        self.max_token_num = max_token_num

    def __call__(self, examples):
        histories, labels = [], []
        for example in examples:
            items = list(example["input_ids"] if isinstance(example, dict) else example)
            target = example.get("target") if isinstance(example, dict) else None
            if target is None:
                if len(items) <= self.min_history:
                    raise ValueError(
                        f"a sequence of {len(items)} items has no item behind a history of {self.min_history}; leave"
                        f" out sequences shorter than {self.min_history + 1}."
                    )
                place = int(torch.randint(self.min_history, len(items), ())) if self.random_target else len(items) - 1
                items, target = items[:place], items[place]
            histories.append(items)
            labels.append(int(torch.as_tensor(target).reshape(())))
        ids, labels = left_pad(histories), torch.tensor(labels)
        for name, given in (("a history", ids), ("a target", labels)):
            check_item_ids(name, given, len(self.table.tokens), len(self.table.tokens))
        batch = self.tokenizer.lay_out(ids, self.table, max_token_num=self.max_token_num)
        return {**batch, "labels": labels}


__all__ = ["DataCollatorForRecformerFinetuning", "DataCollatorForRecformerPretraining", "choose_words"]
