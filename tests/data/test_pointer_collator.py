"""Batches of rows with different numbers of items: what is padded with what, and what is refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from undersong.data.geometry import ConvexHullDataset
from undersong.data.pointer_collator import PointerDataCollator


def test_inputs_get_zeros_and_labels_get_minus_100():
    rows = [
        {"input_values": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]), "labels": torch.tensor([2, 3, 1, 2, 0])},
        {"input_values": torch.tensor([[0.7, 0.8]]), "labels": torch.tensor([1, 1, 0])},
    ]
    batch = PointerDataCollator()(rows)
    assert batch.keys() == {"input_values", "attention_mask", "labels"}
    assert torch.equal(batch["input_values"][0], rows[0]["input_values"])
    assert batch["input_values"][1].tolist() == [[pytest.approx(0.7), pytest.approx(0.8)], [0, 0], [0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[2, 3, 1, 2, 0], [1, 1, 0, -100, -100]]
    assert batch["attention_mask"].dtype == batch["labels"].dtype == torch.long


@pytest.mark.parametrize(
    ("name", "short", "long", "padded"),
    [
        ("input_ids", [5], [6, 7], [[5, 0], [6, 7]]),
        ("inputs_embeds", [[1.0, 2.0, 3.0]], [[1.0] * 3, [2.0] * 3], [[[1, 2, 3], [0] * 3], [[1] * 3, [2] * 3]]),
    ],
)
@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_text_items_come_as_ids_or_embeddings(name, short, long, padded, form):
    batch = PointerDataCollator()([{name: form(short)}, {name: form(long)}])
    assert batch[name].tolist() == padded
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert "labels" not in batch


def test_the_number_of_items_can_be_rounded_up():
    rows = [{"input_values": torch.ones(n, 2), "labels": [1, 0]} for n in (3, 5)]
    batch = PointerDataCollator(pad_to_multiple_of=4)(rows)
    assert batch["input_values"].shape == (2, 8, 2)
    assert batch["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch["labels"].shape == (2, 2)


def test_a_data_loader_gives_back_the_rows():
    data = ConvexHullDataset(3, 8, size=20)
    batches = list(DataLoader(data, batch_size=6, collate_fn=PointerDataCollator()))
    rows = [
        (b["input_values"][i], b["attention_mask"][i].bool(), b["labels"][i])
        for b in batches
        for i in range(len(b["labels"]))
    ]
    for row, (values, mask, labels) in zip(data, rows, strict=True):
        assert torch.equal(values[mask], row["input_values"])
        assert torch.equal(labels[labels != -100], row["labels"])


ROW = {"input_values": [[0.0, 0.0], [1.0, 1.0]], "labels": [2, 1, 0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"points": [[0.0]]}], "rows hold points, but a row holds one of input_values, inputs_embeds, input_ids"),
        ([ROW | {"input_ids": [1, 2]}], "rows hold input_ids, input_values, labels, but a row holds one of"),
        ([ROW, {"input_values": [[0.0, 0.0]]}], r"rows\[1\] holds input_values but rows\[0\] input_values, labels"),
        ([ROW, {"input_values": [], "labels": [0]}], r"rows\[1\]: input_values \[0\] must hold at least one item"),
        (
            [ROW, {"input_values": [[0.0, 0.0, 0.0]], "labels": [1, 0]}],
            r"rows\[1\]: items of input_values have shape \[3\] but those of rows\[0\] \[2\]",
        ),
        ([ROW, ROW | {"labels": [2, 1]}], r"rows\[1\]: labels \(\[2, 1\]\) must end in 0"),
        ([ROW, ROW | {"labels": []}], r"rows\[1\]: labels \(\[\]\) must end in 0"),
        (
            [ROW, {"input_values": [[0.0, 0.0]], "labels": [2, 1, 0]}],
            r"rows\[1\]: labels point at item 2 but the row has 1 items; ids count from 1",
        ),
    ],
)
def test_refusals(rows, message):
    with pytest.raises(ValueError, match=message):
        PointerDataCollator()(rows)


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ValueError, match=r"pad_to_multiple_of \(0\) must be at least 1"):
        PointerDataCollator(pad_to_multiple_of=0)
