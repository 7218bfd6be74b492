"""Item texts become tokens exactly as the paper's section 2.1 says."""

import pytest
import torch
from transformers import AutoTokenizer

from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.histories import find_items
from undersong.tokenization.recformer_tokenizer import EncodedItem, RecformerTokenizer

from ..modeling.recformer_catalogue import ITEMS, recformer_tokenizer, words

ID = words().get_vocab()


def tokens(text):
    return [ID[word] for word in text.split()]


def read(batch, row=0):
    """The tokens of a row as text, its padding left out."""
    keep = batch["attention_mask"][row].bool()
    return " ".join(words().convert_ids_to_tokens(batch["input_ids"][row][keep].tolist()))


def test_the_newest_item_comes_first_behind_one_first_token():
    batch = recformer_tokenizer()([[{"color": "red"}, {"color": "blue", "kind": "lamp"}]])
    assert batch["input_ids"].tolist() == [tokens("<s> color blue kind lamp color red")]
    assert batch["token_type_ids"].tolist() == [[0, 1, 2, 1, 2, 1, 2]]
    assert batch["item_position_ids"].tolist() == [[0, 1, 1, 1, 1, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1] * 7]


def test_padding_stands_on_the_right_with_the_last_item_position():
    batch = recformer_tokenizer()([[{"color": "red"}], []])
    assert batch["input_ids"].tolist()[1] == tokens("<s> <pad> <pad>")
    assert batch["token_type_ids"].tolist()[1] == [0, 3, 3]
    assert batch["item_position_ids"].tolist()[1] == [0, 50, 50]
    assert batch["attention_mask"].tolist()[1] == [1, 0, 0]


def test_an_attribute_is_cut_with_its_name():
    tokenizer = recformer_tokenizer(max_attr_length=3)
    item = tokenizer.encode_item({"color": "red green blue", "color red size small": "black", "kind": "lamp"})
    assert list(item.input_ids) == tokens("color red green color red size kind lamp")
    assert item.token_type_ids == (1, 2, 2, 1, 1, 1, 1, 2)


def test_only_the_first_attributes_are_read_and_a_missing_one_does_not_count():
    tokenizer = recformer_tokenizer(max_attr_num=2)
    assert read(tokenizer([[{"color": None, "kind": "lamp", "size": "small", "more": "red"}]])) == (
        "<s> kind lamp size small"
    )


def test_empty_values_keep_the_name_and_other_values_are_written_out():
    assert read(recformer_tokenizer()([[{"color": "", "kind": 12}]])) == "<s> color kind 1 ##2"
    assert read(recformer_tokenizer()([[{"color": 1.5}]])) == "<s> color 1 <unk> 5"
    assert read(recformer_tokenizer()([[{}, {"color": "red"}]])) == "<s> color red"


def test_the_51st_item_is_dropped():
    history = [{"color": "red"}] + [{"kind": "lamp"}] * 50
    batch = recformer_tokenizer()([history])
    assert ID["red"] not in batch["input_ids"]
    assert batch["item_position_ids"].max() == 50
    assert batch["input_ids"].shape[1] == 1 + 2 * 50
    assert recformer_tokenizer(max_item_embeddings=3)([history])["input_ids"].shape[1] == 1 + 2 * 2


def test_a_history_is_cut_to_the_most_recent_tokens():
    history = [[{"color": "red"}, {"color": "blue"}]]
    assert read(recformer_tokenizer(max_token_num=4)(history)) == "<s> color blue color"
    assert read(recformer_tokenizer()(history, max_token_num=3)) == "<s> color blue"


def test_words_are_numbered_through_a_history():
    batch = recformer_tokenizer()([[{"kind": "kettles lamp"}, {"size": "small"}], []], words=True)
    assert read(batch) == "<s> size small kind kettle ##s lamp"
    numbers = batch["word_ids"][0].tolist()
    assert numbers[0] == -1
    assert numbers[4] == numbers[5]
    assert len(set(numbers)) == 1 + 2 + 3
    assert (batch["word_ids"][1] == -1).all()


def test_one_item_alone_is_a_history_of_one_and_encoded_items_pass_through():
    tokenizer = recformer_tokenizer()
    item = tokenizer.encode_item({"color": "red"})
    assert isinstance(item, EncodedItem)
    got, want = tokenizer([[item]]), tokenizer([[{"color": "red"}]])
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_text_is_tokenized_once():
    tokenizer, calls = recformer_tokenizer(), []
    inner = tokenizer.tokenizer

    class Counting:
        def __call__(self, texts, **kwargs):
            calls.append(list(texts))
            return inner(texts, **kwargs)

    tokenizer.tokenizer = Counting()
    tokenizer([[{"color": "red"}, {"color": "blue"}], [{"color": "red"}]])
    tokenizer([[{"color": "blue"}]])
    assert calls == [["color", "red", "blue"]]


def test_histories_of_rows_are_histories_of_texts():
    tokenizer = recformer_tokenizer(max_token_num=16, max_item_embeddings=4)
    items = list(ITEMS.values())
    histories = torch.tensor([[0, 3, 9, 4, 24], [1, 2, 0, 0, 7], [0, 0, 0, 0, 0]])
    got = tokenizer.lay_out(histories, tokenizer.encode_items(items))
    want = tokenizer([[items[n - 1] for n in row if n] for row in histories.tolist()])
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_items_are_found_again_by_their_tokens():
    tokenizer = recformer_tokenizer()
    items = [*ITEMS.values(), {"color": "red", "kind": "kettle", "size": "small"}, {"color": "red"}]
    table = tokenizer.encode_items(items)
    found = find_items(tokenizer([[items[0], items[7]], [{"color": "black"}], []]), table.tokens, table.token_types)
    assert [sorted(n for n in row if n) for row in found.tolist()] == [[1, 8, 25], [], []]


def test_saving_keeps_the_limits_and_the_vocabulary(tmp_path):
    tokenizer = recformer_tokenizer(max_attr_num=2, max_attr_length=5, max_item_embeddings=7, max_token_num=33)
    tokenizer.save_pretrained(tmp_path)
    again = RecformerTokenizer.from_pretrained(tmp_path)
    assert (again.max_attr_num, again.max_attr_length) == (2, 5)
    assert (again.max_item_embeddings, again.max_token_num) == (7, 33)
    history = [list(ITEMS.values())]
    assert torch.equal(again(history)["input_ids"], tokenizer(history)["input_ids"])
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == ID


@pytest.mark.parametrize(
    ("histories", "message"),
    [
        (["red kettle"], r'a history \(str\) must be a list of dictionaries; use \[\{"title": "Blue kettle"'),
        ([{"color": "red"}], r"a history \(dict\) must be a list of dictionaries"),
        ("red kettle", r"histories \(str\) must be a list of histories"),
        ([["red kettle"]], r"an item \('red kettle'\) must be a dictionary of attributes; use \{\"title\""),
    ],
)
def test_other_types_are_refused_with_an_example(histories, message):
    with pytest.raises(TypeError, match=message):
        recformer_tokenizer()(histories)


def test_a_tokenizer_that_does_not_fit_is_refused():
    config = RecformerConfig(vocab_size=200, hidden_size=8, num_attention_heads=2, max_attr_length=9)
    assert RecformerTokenizer.from_config(words(), config).max_attr_length == 9
    config.pad_token_id = 5
    with pytest.raises(ValueError, match=r"pad_token_id of the tokenizer \(1\) must be the configuration's \(5\)"):
        RecformerTokenizer.from_config(words(), config)
    config.pad_token_id, config.vocab_size = 1, 50
    with pytest.raises(ValueError, match=r"tokenizer \(\d+ tokens\) must fit into vocab_size \(50\)"):
        RecformerTokenizer.from_config(words(), config)
    bare = words()
    bare.pad_token = None
    with pytest.raises(ValueError, match="tokenizer has no padding token; set"):
        RecformerTokenizer(bare)
    with pytest.raises(ValueError, match=r"tokenizer \(str\) must be a fast one"):
        RecformerTokenizer("longformer")
