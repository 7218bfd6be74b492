"""From item texts to a history: most recent item first, behind one first token (arXiv 2305.13731, section 2.1)."""

import torch


def lay_out_histories(
    histories,
    item_tokens,
    item_token_types,
    item_words=None,
    *,
    bos_token_id,
    pad_token_id,
    max_item_embeddings,
    max_token_num,
):
    """The encoder's inputs for histories of items whose tokens are known.

    input_ids          = [<s>] + tokens of the newest item + tokens of the one before + ...
    token_type_ids     = [ 0 ] + 1 for tokens of attribute names, 2 for those of values, ...         3 for padding
    item_position_ids  = [ 0 ] + 1 for every token of the newest item + 2 for the one before + ...

    At most `max_item_embeddings - 1` items are kept, and the first `max_token_num` tokens of what they give. Padding
    stands on the right, with the last item position.

    Args:
        histories: `[batch, length]` int64, item n as n (1 is the first row of `item_tokens`), oldest first, 0 for
            none, anywhere.
        item_tokens: `[N, width]` integer, padded on the right with `pad_token_id`.
        item_token_types: `[N, width]` integer, 1 or 2, and 0 for padding.
        item_words: `[N, width]` integer, the number of each token's word in its item, from 0; or None.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids`, `item_position_ids`, each `[batch, tokens]` int64; with
        `item_words`, `word_ids` likewise, which number the words of a history, and are -1 for `<s>` and padding.

    >>> tokens, types = torch.tensor([[5, 6, 7], [8, 9, 1]]), torch.tensor([[1, 2, 2], [1, 2, 0]])
    >>> batch = lay_out_histories(torch.tensor([[1, 2]]), tokens, types, bos_token_id=0, pad_token_id=1,
    ...                           max_item_embeddings=51, max_token_num=5)
    >>> batch["input_ids"].tolist(), batch["token_type_ids"].tolist(), batch["item_position_ids"].tolist()
    ([[0, 8, 9, 5, 6]], [[0, 1, 2, 1, 2]], [[0, 1, 1, 2, 2]])
    """
    device = histories.device
    newest_first = histories.flip(1)
    order = newest_first.eq(0).long().argsort(dim=1, stable=True)[:, : max_item_embeddings - 1]
    items = newest_first.gather(1, order)  # [batch, kept], then zeros
    index = (items - 1).clamp(min=0)
    ids, types = item_tokens[index].long(), item_token_types[index].long()  # [batch, kept, width]
    types = types.masked_fill(items.eq(0)[:, :, None], 0)
    place = torch.arange(1, items.shape[1] + 1, device=device)[:, None].expand_as(ids)
    words = place * ids.shape[-1] + (0 if item_words is None else item_words[index].long())
    ids, types, place, words = (x.flatten(1) for x in (ids, types, place, words))

    counts = types.ne(0).sum(1)
    width = min(int(counts.max()) if counts.numel() else 0, max_token_num - 1)
    real_first = types.eq(0).long().argsort(dim=1, stable=True)[:, :width]
    ids, types, place, words = (x.gather(1, real_first) for x in (ids, types, place, words))
    padding = types.eq(0)
    columns = {
        "input_ids": (bos_token_id, ids.masked_fill(padding, pad_token_id)),
        "attention_mask": (1, (~padding).long()),
        "token_type_ids": (0, types.masked_fill(padding, 3)),
        "item_position_ids": (0, place.masked_fill(padding, max_item_embeddings - 1)),
    }
    if item_words is not None:
        columns["word_ids"] = (-1, words.masked_fill(padding, -1))
    return {name: torch.cat([x.new_full((len(x), 1), first), x], 1) for name, (first, x) in columns.items()}


def find_items(batch, item_tokens, item_token_types):
    """Which items of a catalogue a tokenized history holds, told by their tokens.

    Args:
        batch: what `lay_out_histories` gives. An item that `max_token_num` cut is not found.
        item_tokens, item_token_types: `[N, width]`, of the catalogue.

    Returns:
        `[batch, m]` int64 item ids 1..N, 0 for none; all items that read the same are found.
    """
    ids, place = batch["input_ids"], batch["item_position_ids"] * batch["attention_mask"]
    rows, items = len(ids), int(place.max()) + 1
    column = torch.arange(ids.shape[1], device=ids.device)
    begins = torch.full((rows, items), ids.shape[1], device=ids.device).scatter_reduce(
        1, place, column.expand_as(place), "amin"
    )

    # A number for each item: the sum of its tokens, each mixed with its place, mod 2^64. That two items of a catalogue
    # of N share it by chance has a probability of about N^2 / 2^64.
    def numbers(tokens, place_in_item):
        x = tokens.long() * -7046029254386353131 + place_in_item * -4658895280553007687
        x = (x ^ (x >> 31)) * -7723592293110705685
        return x ^ (x >> 29)

    in_item = column - begins.gather(1, place)
    given = torch.zeros(rows, items, dtype=torch.int64, device=ids.device)
    given = given.scatter_add(1, place, numbers(ids, in_item) * batch["attention_mask"])[:, 1:]
    known = numbers(item_tokens, torch.arange(item_tokens.shape[1], device=ids.device)) * item_token_types.ne(0)
    same = given[:, :, None] == known.sum(1)  # [batch, items, N]
    found = same.any(1) if items > 1 else same.new_zeros(rows, item_tokens.shape[0])
    most = int(found.sum(1).max())
    order = found.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    return torch.where(found.gather(1, order), order + 1, 0)
