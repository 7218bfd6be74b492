"""Batches for recommenders: what is masked, what follows, and where the randomness comes from."""

import pytest
import torch
from torch.utils.data import DataLoader

from undersong.training.recommendation_data import DataCollatorForCloze, DataCollatorForNextItem

HISTORIES = [list(range(1, 31)), [7], [5, 6, 7, 8], list(range(40, 10, -1))]
MASK = 51


def cloze(**options):
    return DataCollatorForCloze(50, **{"window": 20, "seed": 0} | options)


@pytest.mark.parametrize(("mask_prob", "max_predictions"), [(0.0, 20), (0.2, 20), (0.9, 20), (1.0, 3)])
def test_masks_are_as_many_as_the_rule_says_and_never_padding(mask_prob, max_predictions):
    collator = cloze(mask_prob=mask_prob, max_predictions=max_predictions, last_item_prob=0.0)
    for _ in range(20):
        batch = collator(HISTORIES)
        masked = batch["input_ids"] == MASK
        assert torch.equal(masked, batch["labels"] != -100)
        assert not (masked & (batch["attention_mask"] == 0)).any()
        for row, history in zip(masked, HISTORIES, strict=True):
            length = min(len(history), 20)
            assert row.sum() == min(max(round(mask_prob * length), 1), max_predictions)


def test_labels_are_the_items_that_were_masked():
    batch = cloze(mask_prob=0.5)([HISTORIES[0]])
    ids = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])[0]
    assert torch.equal(ids, torch.arange(ids[0], ids[0] + 20))


def test_the_share_of_rows_with_only_the_last_item_masked():
    collator = cloze(mask_prob=0.5, last_item_prob=0.25)
    batch = collator([HISTORIES[0]] * 2000)
    only_last = (batch["labels"] != -100).sum(1).eq(1)
    assert (batch["labels"][only_last, -1] != -100).all()
    assert abs(only_last.float().mean() - 0.25) < 0.04


def test_windows_end_anywhere_but_are_full_where_the_history_is():
    batch = cloze(last_item_prob=1.0)([HISTORIES[0]] * 500)
    ends = batch["labels"][:, -1]
    assert set(ends.tolist()) == set(range(20, 31))
    assert batch["attention_mask"].all()
    batch = DataCollatorForNextItem(50, window=20, seed=0)([HISTORIES[0]] * 500)
    assert set(batch["labels"][:, -1].tolist()) == set(range(21, 31))
    assert torch.equal(batch["labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize("make", [cloze, lambda **options: DataCollatorForNextItem(50, window=20, **options)])
def test_the_same_seed_gives_the_same_batches_and_every_epoch_others(make):
    first, second = make(seed=3), make(seed=3)
    batches = [(first(HISTORIES[::3]), second(HISTORIES[::3])) for _ in range(3)]
    for one, other in batches:
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(batches[0][0]["input_ids"], batches[1][0]["input_ids"])
    torch.manual_seed(5)
    one = make(seed=None)(HISTORIES[::3])
    torch.manual_seed(5)
    other = make(seed=None)(HISTORIES[::3])
    assert torch.equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("seed", [None, 3])
def test_workers_draw_anew_in_every_epoch(seed):
    collator = cloze(seed=seed)
    collator(HISTORIES)  # the main process has drawn already
    torch.manual_seed(0)
    loader = DataLoader(HISTORIES * 4, batch_size=4, collate_fn=collator, num_workers=2)
    epochs = [torch.cat([batch["labels"].flatten() for batch in loader]) for _ in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    workers = epochs[0].view(4, -1)
    assert not torch.equal(workers[0], workers[1])


def test_a_target_is_masked_behind_the_end_of_its_history():
    examples = [{"input_ids": list(range(1, 31)), "target": 45}, {"input_ids": [], "target": 9}]
    batch = cloze(window=4)(examples)
    assert batch["input_ids"].tolist() == [[28, 29, 30, MASK], [0, 0, 0, MASK]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 45], [-100, -100, -100, 9]]
    batch = DataCollatorForNextItem(50, window=4)([examples[0], {"input_ids": [3], "target": 9}])
    assert batch["input_ids"].tolist() == [[27, 28, 29, 30], [0, 0, 0, 3]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 45], [-100, -100, -100, 9]]


def test_the_next_item_of_every_position():
    batch = DataCollatorForNextItem(50, window=3)([[4, 5], [1, 2, 3, 4]])
    assert batch["input_ids"].tolist() == [[0, 0, 4], [1, 2, 3]]
    assert batch["labels"].tolist() == [[-100, -100, 5], [2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]


def test_what_cannot_be_trained_on_is_named():
    with pytest.raises(ValueError, match="a history of 0 items has nothing to train on; leave out .* shorter than 1"):
        cloze()([[]])
    with pytest.raises(ValueError, match="a history of 1 items .* shorter than 2"):
        DataCollatorForNextItem(50)([[3]])
    with pytest.raises(ValueError, match="an empty history has no position that could predict target"):
        DataCollatorForNextItem(50)([{"input_ids": [], "target": 3}])
    with pytest.raises(ValueError, match=r"a history holds id 51, but with num_items \(50\)"):
        cloze()([[1, 51]])
    with pytest.raises(ValueError, match=r"a history holds id 70, but with num_items \(50\)"):
        cloze()([{"input_ids": [1], "target": 70}])
    with pytest.raises(ValueError, match="a history holds id 0, which is padding"):
        cloze()([[0, 1]])


def test_options_out_of_range_are_named():
    for name in ("mask_prob", "last_item_prob"):
        with pytest.raises(ValueError, match=rf"{name} \(1.5\) must lie in \[0, 1\]"):
            cloze(**{name: 1.5})
    with pytest.raises(ValueError, match=r"max_predictions \(0\) must be at least 1"):
        cloze(max_predictions=0)
    with pytest.raises(ValueError, match=r"window \(0\) must be at least 1"):
        DataCollatorForNextItem(50, window=0)
