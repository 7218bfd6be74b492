"""Sentences are cut with care, labels undo the shuffle, parts share no document."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from undersong.data.human_text import human_documents, human_text
from undersong.data.pointer_collator import PointerDataCollator
from undersong.data.sentence_order import (
    SentenceOrderDataset,
    cut_passages,
    embed_sentences,
    split_sentences,
    text_passages,
)


def letters(texts):
    """An embedding in which a sentence can be recognised: its first letter's place in the alphabet."""
    return torch.tensor([[float(ord(text[0]) - ord("A")), 1.0] for text in texts])


ALPHABET = [["A.", "B.", "C.", "D."], ["E.", "F."], ["G.", "H.", "I."]]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("It rains. We wait! Why? Because.", ["It rains.", "We wait!", "Why?", "Because."]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
        ('He left. "No," he said. (Twice.) [Yes.]', ["He left.", '"No," he said.', "(Twice.)", "[Yes.]"]),
        ("Python 3.5 is out. Use os.Path. See a.B.", ["Python 3.5 is out.", "Use os.Path.", "See a.B."]),
        ("A codec, e.g. UTF-8, i.e. Unicode (cf. ASCII, etc. Others) vs. Latin.", None),
        ("A theorem of E. Noether is used. It is short.", ["A theorem of E. Noether is used.", "It is short."]),
        ("the end. lower case goes on", None),
        ("Line one\n  goes on.  Two\tspaces.", ["Line one goes on.", "Two spaces."]),
        ("No end", None),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(paragraph, expected):
    assert split_sentences(paragraph) == (expected or [paragraph])


def test_splitting_loses_no_character_of_real_text():
    for paragraph in human_text()[::7]:
        assert " ".join(split_sentences(paragraph)) == paragraph


@given(st.lists(st.integers(1, 30), max_size=6), st.integers(2, 4), st.integers(0, 5))
def test_passages_are_whole_documents_cut_evenly(lengths, least, extra):
    most = 2 * least - 1 + extra
    documents = [[f"S{index} {i}." for i in range(length)] for index, length in enumerate(lengths)]
    found = cut_passages(documents, min_sentences=least, max_sentences=most)
    assert sum(found, []) == [s for document in documents if len(document) >= least for s in document]
    for passage in found:
        assert least <= len(passage) <= most
        assert len({sentence.split()[0] for sentence in passage}) == 1  # of one document


def test_passages_hold_a_sentence_once():
    assert cut_passages([["One. Two.", "One. Three."]]) == [["One.", "Two.", "Three."]]


def test_documents_are_the_text_by_document():
    documents = human_documents()
    assert sum(documents, []) == human_text()
    assert all(documents)
    assert max(map(len, documents)) > 20  # a help topic
    documents[0].clear()
    assert human_documents()[0]  # a caller cannot spoil the next one's text


def test_parts_share_no_document_and_no_passage():
    parts = text_passages()
    origin = {}
    for index, document in enumerate(human_documents()):
        origin |= {split_sentences(paragraph)[0]: index for paragraph in document}
    of_part = {
        name: {origin[sentence] for passage in part for sentence in passage if sentence in origin}
        for name, part in parts.items()
    }
    sizes = {name: len(part) for name, part in parts.items()}
    assert sizes["train"] > 700
    assert min(sizes["validation"], sizes["test"]) > 70
    blocks = {name: {index // 8 for index in found} for name, found in of_part.items()}
    shared = sum(len(blocks[a] & blocks[b]) for a, b in [("train", "test"), ("train", "validation")])
    assert shared <= 0.02 * sum(map(len, blocks.values()))  # first sentences that occur in two documents
    keys = [tuple(passage) for part in parts.values() for passage in part]
    assert len(set(keys)) == len(keys)


def test_labels_undo_the_shuffle_and_end():
    data = SentenceOrderDataset(ALPHABET, letters, shuffles=5, seed=3)
    assert len(data) == 15
    for index in range(len(data)):
        row, passage = data[index], ALPHABET[index % 3]
        *order, end = row["labels"].tolist()
        assert end == 0
        assert [data.shuffled(index)[place - 1] for place in order] == passage
        assert torch.equal(row["inputs_embeds"][[place - 1 for place in order]], letters(passage))
        assert row["labels"].dtype == torch.int64
        assert row["inputs_embeds"].dtype == torch.float32


def test_orders_depend_on_row_and_seed_alone():
    data, again, other = (
        SentenceOrderDataset([["A.", "B.", "C.", "D."]], letters, shuffles=200, seed=s) for s in (0, 0, 1)
    )
    rows = [tuple(data[i]["labels"].tolist()) for i in range(200)]
    assert rows == [tuple(again[i]["labels"].tolist()) for i in range(200)]
    assert rows != [tuple(other[i]["labels"].tolist()) for i in range(200)]
    assert len(set(rows)) == 24  # all orders of four occur
    assert data[-1]["labels"].tolist() == data[199]["labels"].tolist()
    with pytest.raises(IndexError):
        data[200]


def test_each_sentence_is_embedded_once():
    seen = []
    SentenceOrderDataset([["A.", "B."], ["B.", "C."]], lambda texts: seen.extend(texts) or letters(texts), shuffles=9)
    assert sorted(seen) == ["A.", "B.", "C."]


def test_rows_become_batches():
    data = SentenceOrderDataset(ALPHABET, letters)
    batch = PointerDataCollator()([data[i] for i in range(3)])
    assert batch["inputs_embeds"].shape == (3, 4, 2)
    assert batch["attention_mask"].sum(1).tolist() == [4, 2, 3]
    assert (batch["labels"] == -100).sum(1).tolist() == [0, 2, 1]


def test_embeddings_do_not_depend_on_the_batch():
    words = ["[PAD]", "[CLS]", "one", "two", "three", "."]
    tokenizer = word_tokenizer(words)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = BertModel(config).train()
    texts = ["one two three one two .", "two .", "three one .", "one"]
    encode = partial(embed_sentences, model=model, tokenizer=tokenizer)
    whole = encode(texts, batch_size=4)
    assert model.training  # as it was
    torch.testing.assert_close(whole, torch.cat([encode([text]) for text in texts]))
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(4))
    hidden = model.eval()(**tokenizer([texts[1]], return_tensors="pt")).last_hidden_state[0].mean(0)
    torch.testing.assert_close(whole[1], hidden.detach() / hidden.norm().detach())


def word_tokenizer(words):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cut_passages([], min_sentences=1), r"min_sentences \(1\) must be at least 2"),
        (
            lambda: cut_passages([], min_sentences=4, max_sentences=6),
            r"max_sentences \(6\) must be at least 2 \* min_sentences - 1 \(7\)",
        ),
        (
            lambda: SentenceOrderDataset([["A.", "B."], ["C."]], letters),
            r"passages\[1\] \(\['C.'\]\) must hold at least 2",
        ),
        (
            lambda: SentenceOrderDataset([["A.", "B."]], lambda texts: torch.ones(3, 4)),
            r"encode gave a tensor of shape \[3, 4\] for 2 sentences; it must be \[2, size\]",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
