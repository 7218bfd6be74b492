"""Reading a document twice before answering: a prompt-side method for models that must choose what to remember.

Arora et al., "Just read twice" (arXiv 2407.05483), section 3: [intro(Q)] D sep D Q instead of D Q. A model with a
state of fixed size meets the document the second time knowing what it is about. This module works on text and chats
and keeps no state; `repeat_tokens` does the same to token ids inside `generate()`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence


class JustReadTwice:
    """Repeats the document of a prompt, as text.

    Args:
        times: copies of the document; 1 leaves every prompt as it is.
        separator: what stands between two copies.
        intro: what comes before the first copy: None (nothing depends on the question, so the copies can be cached),
            a text in which `{question}` is replaced, such as the paper's `"Information about {question}. "`, or a
            callable from the question to a text.
        document_key: name of the tag around documents in prompts and chats, `<document>...</document>` by default.
        max_tokens: budget of the whole prompt in tokens; None sets no limit. Needs `tokenizer`.
        tokenizer: a transformers tokenizer; chats are counted with its chat template.
        over_budget: "once" (keep the prompt as it was and warn) or "error".

    Raises:
        ValueError: times below 1, an unknown `over_budget`, or a budget without a tokenizer.

    >>> JustReadTwice().apply("Fruit: plum.", "Fruit:")
    'Fruit: plum.\\nFruit: plum. Fruit:'
    >>> JustReadTwice(intro="Information about {question}. ").apply("It is a plum.", "fruit")
    'Information about fruit. It is a plum.\\nIt is a plum. fruit'
    >>> print(JustReadTwice().apply_to_text("<document>A plum.</document> What is it?"))
    <document>A plum.</document>
    <document>A plum.</document> What is it?
    """

    def __init__(
        self,
        times: int = 2,
        separator: str = "\n",
        intro: str | Callable[[str], str] | None = None,
        document_key: str = "document",
        *,
        max_tokens: int | None = None,
        tokenizer=None,
        over_budget: str = "once",
    ):
        check_times(times)
        if over_budget not in ("once", "error"):
            raise ValueError(f"over_budget ({over_budget!r}) must be 'once' or 'error'.")
        if max_tokens is not None and tokenizer is None:
            raise ValueError(f"max_tokens ({max_tokens}) needs a tokenizer to count with; pass tokenizer=.")
        self.times, self.separator, self.intro, self.document_key = times, separator, intro, document_key
        self.max_tokens, self.tokenizer, self.over_budget = max_tokens, tokenizer, over_budget
        tag = re.escape(document_key)
        # from the first opening tag to the last closing one: several documents are read as one
        self._block = re.compile(rf"<{tag}(?:\s[^<>]*)?>.*</{tag}>", re.DOTALL)

    def apply(self, document: str, question: str) -> str:
        """The prompt `[intro] document (separator document)* question`, with a space before the question.

        >>> JustReadTwice(times=1).apply("Fruit: plum.", "Fruit:")
        'Fruit: plum. Fruit:'
        """
        once = f"{document} {question}"
        repeated = f"{self._intro(question)}{self._copies(document)} {question}"
        return self._within_budget(once, repeated if self.times > 1 else once)

    def apply_to_text(self, prompt: str) -> str:
        """Repeats the `<document>...</document>` block of a prompt, tags included.

        The block reaches from the first opening to the last closing tag. The question handed to `intro` is the text
        after the block, or before it if nothing follows. A prompt whose block is there `times` times already is
        returned as it is.

        Raises:
            ValueError: no block, or the budget is exceeded under `over_budget="error"`.
        """
        span = self._find(prompt)
        if span is None:
            raise ValueError(
                f"prompt must hold a {self._tags}; put the tags around the text to read {self._how_often}."
            )
        return self._within_budget(prompt, self._repeat(prompt, span))

    def apply_to_chat(self, messages: Sequence[dict], span: tuple[int, int] | None = None) -> list[dict]:
        """Repeats the document in the last user message; render the result with `apply_chat_template`.

        Every other message stays, whatever its role, and so do images and other parts that are not text.

        Args:
            messages: chat messages with string contents or lists of parts. They are not changed.
            span: first and one-past-last character of the document in the message's text, instead of tags.

        Returns:
            A new list; unchanged messages are the caller's.

        Raises:
            ValueError: no user message, no block in it, documents in several parts, a span outside the text, or the
                budget is exceeded under `over_budget="error"`.

        >>> chat = [{"role": "user", "content": "<document>A plum.</document> What is it?"}]
        >>> print(JustReadTwice().apply_to_chat(chat)[0]["content"])
        <document>A plum.</document>
        <document>A plum.</document> What is it?
        """
        index = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if index is None:
            raise ValueError("messages must hold a user message, because only the last one's document is repeated.")
        content = messages[index]["content"]
        if isinstance(content, str):
            repeated = self._repeat(content, self._locate([content], span)[1])
        else:
            texts = [part.get("text", "") if part.get("type") == "text" else "" for part in content]
            where, found = self._locate(texts, span)
            repeated = [dict(part) for part in content]
            repeated[where]["text"] = self._repeat(texts[where], found)
        result = [*messages[:index], {**messages[index], "content": repeated}, *messages[index + 1 :]]
        return self._within_budget(list(messages), result)

    @property
    def _tags(self):
        return f"<{self.document_key}>...</{self.document_key}> block"

    @property
    def _how_often(self):
        return "twice" if self.times == 2 else f"{self.times} times"

    def _find(self, text):
        match = self._block.search(text)
        return match and match.span()

    def _locate(self, texts, span):
        """Which text holds the document, and where."""
        if span is not None:
            full = [i for i, text in enumerate(texts) if text]
            length = len(texts[full[0]]) if full else 0
            if len(full) != 1:
                raise ValueError(
                    f"span ({span}) needs exactly one text part in the message, got {len(full)}; use tags."
                )
            if not 0 <= span[0] < span[1] <= length:
                raise ValueError(f"span ({span}) must satisfy 0 <= start < end <= {length}, the length of the text.")
            return full[0], tuple(span)
        found = [(i, self._find(text)) for i, text in enumerate(texts)]
        found = [(i, place) for i, place in found if place]
        if len(found) != 1:
            raise ValueError(
                f"the last user message must hold its {self._tags} in one text part, found {len(found)}; put the tags"
                f" around the text to read {self._how_often}, or pass span=(start, end)."
            )
        return found[0]

    def _copies(self, document):
        return self.separator.join([document] * self.times)

    def _repeat(self, text, span):
        start, end = span
        document, sep = text[start:end], self.separator
        # a tagged block may be the copies themselves; a span is the first of them
        size = (len(document) + len(sep)) // self.times - len(sep)
        block_is_copies = document == self._copies(document[:size])
        copies = self._copies(document)
        if self.times == 1 or block_is_copies or text.startswith(copies, start):
            return text
        question = text[end:].strip() or text[:start].strip()
        return text[:start] + self._intro(question) + copies + text[end:]

    def _intro(self, question):
        if self.intro is None:
            return ""
        return self.intro(question) if callable(self.intro) else self.intro.replace("{question}", question)

    def _within_budget(self, once, repeated):
        if self.max_tokens is None or repeated == once:
            return repeated
        length = self._count(repeated)
        if length <= self.max_tokens:
            return repeated
        problem = f"read {self._how_often}, the prompt has {length} tokens, more than max_tokens ({self.max_tokens})"
        if self.over_budget == "error":
            raise ValueError(f"{problem}; shorten the document, raise max_tokens or use over_budget='once'.")
        warnings.warn(f"{problem}; the document is read once.", stacklevel=3)
        return once

    def _count(self, prompt):
        if isinstance(prompt, str):
            return len(self.tokenizer(prompt)["input_ids"])
        text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_times(times):
    if times < 1:
        raise ValueError(f"times ({times}) must be at least 1; 1 reads the document once, 2 twice.")
