"""A word tokenizer and a small catalogue for the tests of Recformer."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from undersong.tokenization.recformer_tokenizer import RecformerTokenizer

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
COLORS, KINDS, SIZES = ("red", "green", "blue", "black"), ("kettle", "lamp", "chair"), ("small", "large")
WORDS = ["color", "kind", "size", *COLORS, *KINDS, *SIZES]
ITEMS = {
    f"{color}-{kind}-{size}": {"color": color, "kind": kind, "size": size}
    for color in COLORS
    for kind in KINDS
    for size in SIZES
}


def words(vocabulary=WORDS):
    """One token for each word; words that it does not know are spelled, letter by letter."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    pieces = [*SPECIAL, *vocabulary, *(f"##{x}" for x in letters), *letters]
    tokenizer = Tokenizer(
        models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="<unk>", max_input_chars_per_word=50)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
    )


def recformer_tokenizer(**limits):
    return RecformerTokenizer(words(), **limits)
