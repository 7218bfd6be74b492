import json

import numpy as np
import pytest
import torch

from undersong.tokenization.item_vocab import ItemVocab, left_pad


def test_rows_begin_behind_padding_and_end_before_the_mask():
    vocab = ItemVocab(["kiwi", "lime", "plum"])
    assert vocab.encode(["plum", "kiwi", "plum"]) == [3, 1, 3]
    assert vocab.decode(torch.tensor([3, 1])) == ["plum", "kiwi"]
    assert (vocab.pad_token_id, vocab.mask_token_id, vocab.vocab_size, len(vocab)) == (0, 4, 5, 3)
    assert "kiwi" in vocab
    assert "pear" not in vocab


def test_integers_and_strings_are_different_ids_and_survive_the_file(tmp_path):
    vocab = ItemVocab([10, "10", 7], unknown="drop")
    vocab.save_pretrained(tmp_path)
    loaded = ItemVocab.from_pretrained(tmp_path)
    assert loaded == vocab
    assert loaded.encode(["10", 10, "7"]) == [2, 1]
    assert json.loads((tmp_path / "item_vocab.json").read_text()) == {"unknown": "drop", "items": [10, "10", 7]}


def test_numpy_scalars_count_as_what_they_hold():
    vocab = ItemVocab(np.array([5, 3]))
    assert vocab.items == [5, 3]
    assert vocab.encode(np.array([3, 5, 3])) == [2, 1, 2]


def test_from_histories_orders_by_id_and_never_by_frequency():
    vocab = ItemVocab.from_histories([["b", 9], ["b", "a"], ["b", 10]])
    assert vocab.items == [9, 10, "a", "b"]


def test_extended_keeps_rows():
    vocab = ItemVocab(["a", "b"], unknown="drop").extended(["c"])
    assert vocab.encode(["a", "b", "c", "d"]) == [1, 2, 3]


def test_a_batch_is_left_padded_and_keeps_the_most_recent():
    batch = ItemVocab(["a", "b", "c"])([["a", "b", "c"], [], ["b"]], max_length=2)
    assert batch["input_ids"].tolist() == [[2, 3], [0, 0], [0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 0], [0, 1]]


def test_left_pad_takes_empty_sequences():
    assert left_pad([[], []]).tolist() == [[0], [0]]
    assert left_pad([torch.tensor([1, 2, 3])], length=2, value=-1).tolist() == [[2, 3]]


def test_unknown_items_raise_or_are_left_out():
    vocab = ItemVocab(["a", "b"])
    with pytest.raises(ValueError, match="item id 'c' is not among the 2 items of the vocabulary; .* unknown='drop'"):
        vocab.encode(["a", "c"])
    assert vocab.encode(["a", "c"], unknown="drop") == [1]


def test_an_id_of_the_other_type_is_named():
    with pytest.raises(ValueError, match="item id '7' is a str, but the vocabulary holds 7; convert it"):
        ItemVocab([7]).encode(["7"])
    with (
        pytest.warns(UserWarning, match="no item of a history is known; .*item id 7 is a int.* holds '7'"),
    ):
        assert ItemVocab(["7"], unknown="drop").encode([7]) == []


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="items holds 'b' more than once"):
        ItemVocab(["a", "b", "b"])
    with pytest.raises(ValueError, match=r"item id 1.5 \(float\) must be a string or an integer"):
        ItemVocab([1.5])
    with pytest.raises(ValueError, match=r"item id True \(bool\)"):
        ItemVocab([True])
    with pytest.raises(ValueError, match=r"unknown \('skip'\) must be 'error' or 'drop'"):
        ItemVocab(["a"], unknown="skip")
    with pytest.raises(TypeError, match=r"history \('ab'\) must be a list of item ids; use \['ab'\]"):
        ItemVocab(["a", "b"]).encode("ab")
    for row in (0, 3, -1):
        with pytest.raises(ValueError, match=rf"row {row} is no item: items have rows 1..2, 0 is padding, 3 the mask"):
            ItemVocab(["a", "b"]).decode([row])


def test_a_folder_without_vocabulary_or_with_another_file_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"item_vocab\.json"):
        ItemVocab.from_pretrained(tmp_path)
    (tmp_path / "item_vocab.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold 'unknown' and 'items'"):
        ItemVocab.from_pretrained(tmp_path)
