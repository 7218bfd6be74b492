"""From texts and chats to model inputs, through the methods that change the prompt.

Reading several times acts on the text or the messages first; the chat template renders the result; sets are found in
the rendered text, so that the template's control tokens stay intact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .read_twice import JustReadTwice
from .set_prompt import SetPrompt


def encode(
    tokenizer, prompt: str | Sequence, read_times: int = 1, sets: bool = False, padding_side: str = "left"
) -> dict[str, torch.Tensor]:
    """Model inputs of one prompt or several.

    Args:
        prompt: a text, a chat (list of messages), or a list of texts or of chats.
        read_times: copies of every prompt's document.
        sets: whether `<|start_2d|>`, `<|split_2d|>` and `<|end_2d|>` delimit sets.

    Returns:
        `input_ids` and `attention_mask`; with sets also `position_ids` and `set_segment_ids`.

    Raises:
        ValueError: texts and chats mixed, no prompt, no document to read again, or several prompts without a padding
            token.
    """
    prompts = [prompt] if isinstance(prompt, str) or is_chat(prompt) else list(prompt)
    if not prompts:
        raise ValueError("prompt must hold at least one text or chat, got an empty list.")
    chats = [is_chat(p) for p in prompts]
    if any(chats) != all(chats) or not all(isinstance(p, str) or is_chat(p) for p in prompts):
        kinds = sorted({"chat" if is_chat(p) else type(p).__name__ for p in prompts})
        raise ValueError(
            f"prompt must be texts or chats (lists of messages), got {' and '.join(kinds)}; split the batch."
        )
    if len(prompts) > 1 and tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer has no pad_token for {len(prompts)} prompts; set tokenizer.pad_token = tokenizer.eos_token."
        )
    texts = [read(p, read_times) for p in prompts]
    special = not chats[0]  # a chat template writes its own special tokens
    if chats[0]:
        texts = [_render(tokenizer, chat) for chat in texts]
    if sets:
        return SetPrompt.encode(tokenizer, texts).generate_kwargs()
    batch = tokenizer(
        texts, add_special_tokens=special, padding=len(texts) > 1, padding_side=padding_side, return_tensors="pt"
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def read(prompt: str | Sequence[dict], times: int):
    """A text or a chat with its document `times` times; as it is for 1."""
    if times == 1:
        return prompt
    method = JustReadTwice(times=times)
    return method.apply_to_chat(prompt) if is_chat(prompt) else method.apply_to_text(prompt)


def is_chat(prompt) -> bool:
    """Whether a prompt is one chat, a list of messages."""
    return isinstance(prompt, list | tuple) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _render(tokenizer, messages: Sequence[dict]) -> str:
    unfinished = messages[-1]["role"] == "assistant"  # then the model goes on with that message, as pipelines do
    return tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished
    )
