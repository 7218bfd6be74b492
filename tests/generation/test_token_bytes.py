"""Joined bytes of the ids are the text, whatever the tokenizer does to spaces, line ends and rare characters."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from undersong.generation.token_bytes import token_bytes

from .tiny_tokenizers import byte_fallback, byte_level

TEXTS = ["def f(x):\n    return 1\n", "\tx = 'é😀'\r\n", "  two  spaces", "", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [byte_level, byte_fallback, lambda: byte_fallback(dummy_prefix=False)])
def test_bytes_add_up_to_the_text(make, text):
    tokenizer = make()
    table, dummy_prefix = token_bytes(tokenizer)
    joined = b"".join(table[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"])
    assert joined.decode() == (" " + text if dummy_prefix and text else text)


def test_a_character_may_be_split_over_tokens():
    tokenizer = byte_level()
    table, _ = token_bytes(tokenizer)
    ids = tokenizer("😀")["input_ids"]
    assert len(ids) == 4  # no merges for it: one token per byte
    assert [table[index] for index in ids] == [bytes([byte]) for byte in "😀".encode()]


def test_special_tokens_have_no_bytes_and_added_ones_are_plain_text():
    tokenizer = byte_level()
    tokenizer.add_tokens(["    ", "é "])
    table, _ = token_bytes(tokenizer)
    assert all(table[index] == b"" for index in tokenizer.all_special_ids)
    assert table[tokenizer.convert_tokens_to_ids("    ")] == b"    "
    assert table[tokenizer.convert_tokens_to_ids("é ")] == "é ".encode()


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"tokenizer \(Slow\) must be a fast one"):
        token_bytes(Slow())


@pytest.mark.parametrize(("decoder", "name"), [(decoders.WordPiece(), "WordPiece"), (None, "None")])
def test_tokens_that_are_no_bytes_are_refused(decoder, name):
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ValueError, match=f"its decoder is {name}: its tokens do not stand for bytes"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
