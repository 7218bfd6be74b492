"""What every recommender of the project can do beside `forward`: `recommend`, carry its item vocabulary, grow.

A model that takes the mixin gives two things: the vector of a history (`encode_histories`) and the table whose rows
it is multiplied with (`item_table`). Item ids are 1..N in a model, 0 is padding.
"""

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import cached_file

from ..ops.topk_items import topk_items
from ..tokenization.item_vocab import FILE_NAME, ItemVocab, left_pad

_HUB_ARGUMENTS = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download")
# None for a repository without the file, and for a cache without it when there is no network
_OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
_UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr", "revision", "max_shard_size")


class Recommendations(NamedTuple):
    """`item_ids` and `scores`, best first: tensors `[batch, k]`, or lists of lists where external ids came in."""

    item_ids: torch.Tensor | list
    scores: torch.Tensor | list


def rank_items(h, table, k, *, bias=None, exclude_ids=None, allow_ids=None):
    """The k best items of each row of `h`, by item id.

    Args:
        h: `[batch, d]`; table: `[N, d]`, the row of item id i is i - 1; bias: `[N]`.
        exclude_ids: `[batch, m]` int64 item ids that a row must not get, 0 for none.
        allow_ids: `[m]` int64, the only items that any row may get; None allows all.

    Returns:
        `Recommendations` of tensors. Where fewer than k items are left, the last ids are -1 and their scores -inf.
    """
    allow = None
    if allow_ids is not None:
        allow = torch.zeros(len(table) + 1, dtype=torch.bool, device=h.device).index_fill_(0, allow_ids, True)[1:]
    exclude = None if exclude_ids is None else exclude_ids - 1
    scores, rows = topk_items(h, table, k, bias=bias, exclude=exclude, allow=allow)
    return Recommendations(torch.where(rows < 0, -1, rows + 1), scores)


def check_item_ids(name, ids, highest, num_items):
    """Raises a ValueError that names the first id outside 0..highest."""
    if torch.compiler.is_compiling():
        return
    wrong = (ids < 0) | (ids > highest)
    if wrong.any():
        raise ValueError(
            f"{name} holds id {int(ids[wrong][0])}, but with num_items ({num_items}) ids are 1..{num_items} for items"
            f"{'' if highest == num_items else f', {highest} for the mask'} and 0 for padding; build ids with the"
            " model's ItemVocab, or call resize_item_embeddings for a larger catalogue."
        )


def cut_histories(ids, length):
    """The `length` most recent items of each row, wherever its padding is; warns if anything is left out."""
    if ids.shape[1] <= length:
        return ids
    ids = ids.gather(1, ids.ne(0).long().argsort(dim=1, stable=True))  # padding goes to the left
    if not torch.compiler.is_compiling() and ids[:, : ids.shape[1] - length].any():
        warnings.warn(
            f"histories are cut to the most recent {length} items, the longest that this model reads; cut them before,"
            " or train with a larger max_position_embeddings.",
            stacklevel=3,
        )
    return ids[:, -length:]


@contextmanager
def evaluating(model):
    """Evaluation mode inside the block; afterwards every module is in the mode that it was in."""
    active = [module for module in model.modules() if module.training] if model.training else []
    if active:
        model.eval()
    try:
        yield
    finally:
        for module in active:
            module.training = True


class RecommendMixin:
    """Goes before `PreTrainedModel` in the bases of a recommender."""

    _item_vocab = None

    @property
    def item_vocab(self):
        """The `ItemVocab` of the catalogue, or None; it is saved and loaded with the weights."""
        return self._item_vocab

    @item_vocab.setter
    def item_vocab(self, vocab):
        if vocab is not None and len(vocab) != self.config.num_items:
            raise ValueError(
                f"item_vocab has {len(vocab)} items, but num_items is {self.config.num_items}; use"
                " resize_item_embeddings to change the catalogue."
            )
        self._item_vocab = vocab

    def save_pretrained(self, save_directory, is_main_process=True, push_to_hub=False, **kwargs):
        upload = {name: kwargs.pop(name) for name in _UPLOAD_ARGUMENTS if name in kwargs} if push_to_hub else {}
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if self.item_vocab is not None and is_main_process:
            self.item_vocab.save_pretrained(save_directory)
        if push_to_hub:  # not left to super(), which would upload before the vocabulary is there
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **upload})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        hub = {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if pretrained_model_name_or_path is not None:
            path = cached_file(pretrained_model_name_or_path, FILE_NAME, **_OPTIONAL, **hub)
            model.item_vocab = None if path is None else ItemVocab.read(path)
        return loaded

    def recommend(self, histories, k=10, *, exclude_seen=True, exclude_ids=None, allow_ids=None):
        """The k items that a user is most likely to want next.

        Args:
            histories: int64 `[batch, length]` item ids, oldest first, 0 for padding; or a list of lists: of external
                ids if the model has an `item_vocab`, of item ids otherwise. An empty history is allowed. Of a long
                one the most recent items are read.
            k: how many.
            exclude_seen: leave out the items of the history, all of it.
            exclude_ids: what else a user must not get: a row (list) for each user, in the same kind of ids.
            allow_ids: one list (tensor `[m]`) of the only items to recommend, for all users.

        Returns:
            `Recommendations(item_ids, scores)`, best first. Tensors `[batch, k]`, where places that no item is left
            for hold -1 and -inf; for external ids lists, which are then shorter. Dropout is off.

        Raises:
            ValueError: an id that the model or its vocabulary does not have.
        """
        by_name = not isinstance(histories, torch.Tensor) and self.item_vocab is not None
        seen = self._to_ids("histories", histories)
        exclude = [seen] if exclude_seen else []
        if exclude_ids is not None:
            exclude.append(self._to_ids("exclude_ids", exclude_ids))
        if allow_ids is not None:
            allow_ids = self._to_ids("allow_ids", allow_ids[None] if torch.is_tensor(allow_ids) else [allow_ids])[0]
        with torch.no_grad(), evaluating(self):
            h = self.encode_histories(seen)
            table, bias = self.item_table()
            best = rank_items(
                h, table, k, bias=bias, exclude_ids=torch.cat(exclude, 1) if exclude else None, allow_ids=allow_ids
            )
        return self._to_names(best) if by_name else best

    def _to_ids(self, name, ids):
        if not isinstance(ids, torch.Tensor):
            if isinstance(ids, str) or any(isinstance(row, str | int) for row in ids):
                raise ValueError(f"{name} must hold a list of item ids for each user; use [{ids!r}] for one user.")
            rows = ids if self.item_vocab is None else [self.item_vocab.encode(row) for row in ids]
            ids = left_pad(rows)
        elif ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                f"{name} ({ids.dtype} {list(ids.shape)}) must be int64 [batch, length]; use {name}[None] for one user."
            )
        check_item_ids(name, ids, self.config.num_items, self.config.num_items)
        return ids.to(self.device)

    def _to_names(self, best):
        items, scores = [], []
        for row, values in zip(best.item_ids.tolist(), best.scores.tolist(), strict=True):
            found = [item for item in row if item > 0]
            items.append(self.item_vocab.decode(found))
            scores.append(values[: len(found)])
        return Recommendations(items, scores)

    def resize_item_embeddings(self, catalogue):
        """Changes the catalogue; items that stay keep their weights, new ones start at the mean of the old items.

        Args:
            catalogue: an `ItemVocab`, whose items are found by their external ids if the model has a vocabulary, by
                their rows otherwise; or a number of items, the first of which are the old ones: a vocabulary that the
                model had is dropped then.

        Returns:
            The model itself. An optimizer made before knows the old parameters; make a new one.
        """
        vocab = catalogue if isinstance(catalogue, ItemVocab) else None
        size = len(vocab) if vocab is not None else catalogue
        old = self.config.num_items
        if vocab is not None and self.item_vocab is not None:
            before = {item: row for row, item in enumerate(self.item_vocab.items, start=1)}
            source = [before.get(item, 0) for item in vocab.items]
        else:
            source = [row if row <= old else 0 for row in range(1, size + 1)]
        source = torch.tensor([0, *source, old + 1], device=self.device)  # padding and mask stay what they are
        fresh = source.eq(0).index_fill(0, torch.zeros(1, dtype=torch.long, device=self.device), False)
        with torch.no_grad():
            for module, name in self.item_parameters():
                weight = getattr(module, name)
                grown = weight[source]
                grown[fresh] = weight[1 : old + 1].mean(0)
                setattr(module, name, nn.Parameter(grown, requires_grad=weight.requires_grad))
                for count in ("num_embeddings", "out_features"):
                    if hasattr(module, count):
                        setattr(module, count, size + 2)
        counts = self._buffers.get("item_counts")
        if counts is not None:
            self.item_counts = nn.functional.pad(counts, (1, 1))[source].masked_fill(fresh, 1.0)[1:-1]
        self.config.num_items, self.config.vocab_size, self.config.mask_token_id = size, size + 2, size + 1
        self._item_vocab = vocab
        self.tie_weights()
        return self

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"new_num_tokens ({new_num_tokens}) would move the mask, the last of {self.config.vocab_size} rows;"
                f" use resize_item_embeddings({new_num_tokens - 2})."
            )
        return self.get_input_embeddings()


__all__ = ["RecommendMixin", "Recommendations", "check_item_ids", "cut_histories", "evaluating", "rank_items"]
