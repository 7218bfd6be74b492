"""A tokenizer with one token per letter, small enough for the tiny models."""

from tokenizers import AddedToken, Tokenizer, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = " \nabcdefghijklmnopqrstuvwxyzABCDEFQ.?:-'▁"
CHAT_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def letter_tokenizer(*, bos=False, sentencepiece=False):
    """`bos`: texts begin with <s>. `sentencepiece`: spaces are ▁, and one is put before every text."""
    core = Tokenizer(BPE(vocab={s: i for i, s in enumerate([*SPECIAL, *LETTERS])}, merges=[], unk_token="<unk>"))
    if sentencepiece:
        core.pre_tokenizer = Metaspace(prepend_scheme="always")
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    core.add_special_tokens([AddedToken(token) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )
