"""Small fast tokenizers trained on a few lines: byte-level BPE, and BPE with byte fallback as SentencePiece has it."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SNIPPET = [
    "def f(x):\n    if x == 1:\n        return i\n    elif x == 2:\n        return 2\n    else:\n        pass\n",
    "import os\nresult.append('a')\nprint(x, y, z)\nassert f(1) == 2\nclass A:\n    def g(self):\n        return 3\n",
    "if (x == 1) { return i; } else { x = [1, 2, 3]; }\nswitch (x) { case 1: f(); break; }\n",
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def byte_level(vocab_size=400, snippet=SNIPPET, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(snippet, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, **options)


def byte_fallback(dummy_prefix=True):
    vocabulary = {token: index for index, token in enumerate([*SPECIAL.values(), "<unk>"])}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for character in "\u2581abcdefgxy=:()[],'\n0123":
        vocabulary[character] = len(vocabulary)
    merges = [("\u2581", "\u2581"), ("d", "e"), ("de", "f")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] * dummy_prefix + [normalizers.Replace(" ", "\u2581")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1, right=0)] * dummy_prefix
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
