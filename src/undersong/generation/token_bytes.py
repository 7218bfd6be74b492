"""The bytes behind every token id, for methods that read the generated text as bytes while it grows.

Decoding ids anew at every step costs time in proportion to the text and breaks where a character is split over
tokens; bytes just add up. Covered are byte-level BPE (GPT-2 and its heirs) and SentencePiece vocabularies with byte
fallback (Llama, Gemma), both as fast tokenizers.
"""

from __future__ import annotations

import json
import re

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer) -> tuple[list[bytes], bool]:
    """What each token adds to the text.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Returns:
        A list from id to bytes, empty for special tokens and unused ids; and whether a space at the very beginning of
        a text belongs to the encoding only (SentencePiece's dummy prefix).

    Raises:
        ValueError: a slow tokenizer, or one whose tokens are not bytes of the text (WordPiece, for example).
    """
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer ({name}) must be a fast one because its decoder tells which bytes a token stands for; "
            "load it with AutoTokenizer and the package 'tokenizers'."
        )
    decoder = tokenizer.backend_tokenizer.decoder
    steps = json.loads(decoder.__getstate__()) if decoder is not None else {"type": None}
    steps = steps.get("decoders", [steps])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        alphabet = _byte_alphabet()
        dummy_prefix = False

        def to_bytes(token: str) -> bytes:
            return bytes(alphabet[character] for character in token)

    elif "ByteFallback" in kinds:
        dummy_prefix = "Strip" in kinds

        def to_bytes(token: str) -> bytes:
            if match := _BYTE_TOKEN.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace("\u2581", " ").encode()  # SentencePiece writes a space as U+2581

    else:
        raise ValueError(
            f"tokenizer ({name}) must be byte-level BPE or SentencePiece with byte fallback, but its decoder is "
            f"{'+'.join(map(str, kinds))}: its tokens do not stand for bytes of the text."
        )
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    for token, index in vocabulary.items():
        if index in added:  # added tokens are kept as plain text
            table[index] = b"" if added[index].special or index in special else token.encode()
        elif index not in special:
            table[index] = to_bytes(token)
    return table, dummy_prefix


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes a byte as the character of that number if printable, else as one from 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}
