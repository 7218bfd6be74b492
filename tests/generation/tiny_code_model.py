"""A tiny model that writes looping code, and a byte tokenizer for it: every decoding method has something to do."""

import functools

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LINES = ("a = 1\n", "b = 2\n", "if a:\n    b = 3\n", "for c in b:\n    a = 4\n", "c = a + b\n")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant: {% endif %}"
)


def byte_tokenizer():
    """One token per byte, as byte-level BPE writes them, and three special tokens."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im|>": 3}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def _t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=260,
            d_model=48,
            d_kv=12,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


_KINDS = {"llama": _llama, "t5": _t5}


@functools.cache
def _weights(kind, seed):
    """A few seconds of training on lines that repeat: greedy decoding loops, sampling has choices."""
    generator = torch.Generator().manual_seed(seed)
    text = ""
    while len(text) < 6000:
        line = LINES[torch.randint(len(LINES), (1,), generator=generator)]
        text += line * int(torch.randint(1, 5, (1,), generator=generator))
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _KINDS[kind]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(120 if kind == "llama" else 300):
            starts = torch.randint(len(ids) - 97, (12,), generator=generator)
            batch = torch.stack([ids[i : i + 48] for i in starts])
            labels = batch if kind == "llama" else torch.stack([ids[i + 48 : i + 96] for i in starts])
            model(input_ids=batch, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.set_num_threads(threads)
    return {name: value.detach() for name, value in model.state_dict().items()}


def tiny_code_model(kind="llama", seed=0):
    """The trained model, "llama" or "t5" (which continues what its encoder reads); each call gives a new copy."""
    model = _KINDS[kind]()
    model.load_state_dict(_weights(kind, seed))
    return model.eval()
