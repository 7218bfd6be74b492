"""Key-value documents as token ids: a recall task whose difficulty is a number of pairs, for models of any small size.

A document holds `pairs` distinct keys, each followed by its value; a question names one key. How often a model with a
state of fixed size answers right, as the number of pairs grows past what the state can hold, is the recall experiment
of Arora et al., "Just read twice" (arXiv 2407.05483), without language around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FORMS", "KeyValueTask"]

# D: the document. E: another document, no key in common. Q: the question.
FORMS = {
    "once": "DQ",
    "twice": "DDQ",
    "question, twice": "QDDQ",
    "prompt twice": "DQDQ",
    "question, once": "QDQ",
    "different document, once": "EDQ",
    "question, different document, once": "QEDQ",
}


@dataclass(frozen=True)
class KeyValueTask:
    """A distribution of documents and questions.

    Token ids: 0 separates parts, 1 asks, then `keys` keys, then `values` values.

    Args:
        pairs: pairs in a document.
        keys, values: how many there are to draw from.

    Raises:
        ValueError: two documents without a common key need more keys than there are.

    >>> task = KeyValueTask(pairs=2, keys=4, values=3)
    >>> ids, labels = task.sample("QDQ", batch=1, generator=torch.Generator().manual_seed(0))
    >>> ids.shape, int((labels != -100).sum())  # ask k, 0, k v k v, 0, ask k v
    (torch.Size([1, 11]), 1)
    """

    pairs: int
    keys: int = 64
    values: int = 64

    def __post_init__(self):
        if self.keys < 2 * self.pairs:
            raise ValueError(
                f"keys ({self.keys}) must be at least {2 * self.pairs}, twice the pairs, because the control reads two"
                f" documents without a common key; use keys={2 * self.pairs}."
            )

    @property
    def vocab_size(self) -> int:
        return 2 + self.keys + self.values

    def sample(
        self, form: str, *, batch: int, questions: int = 1, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random documents and questions, laid out as `form` says.

        Args:
            form: letters of D (document), E (a document without a common key) and Q (question), ending in Q. A Q
                before the end asks without an answer and names the key of the first question at the end.
            questions: how many questions, each with its answer, the last Q stands for.
            generator: source of randomness; its device is where the tensors are made.

        Returns:
            `input_ids` `[batch, length]` and `labels`, which are -100 except at the answers.

        Raises:
            ValueError: unknown letters, no Q at the end, or more questions than pairs.
        """
        if set(form) - set("DEQ") or not form.endswith("Q"):
            raise ValueError(f"form ({form!r}) must consist of D, E and Q and end with Q, like 'DDQ'.")
        if not 1 <= questions <= self.pairs:
            raise ValueError(f"questions ({questions}) must lie in 1..{self.pairs}, the pairs of a document.")
        device = generator.device if generator is not None else "cpu"
        random = {"generator": generator, "device": device}
        keys = torch.rand(batch, self.keys, **random).argsort(1)[:, : 2 * self.pairs] + 2
        values = torch.randint(self.values, (batch, 2 * self.pairs), **random) + 2 + self.keys
        both = torch.stack([keys, values], 2)
        asked = torch.rand(batch, self.pairs, **random).argsort(1)[:, :questions, None].expand(-1, -1, 2)
        answered = both.gather(1, asked)  # [batch, questions, (key, value)]
        asks = torch.cat([torch.ones_like(answered[..., :1]), answered], 2)  # [batch, questions, (1, key, value)]
        parts = {"D": both[:, : self.pairs].flatten(1), "E": both[:, self.pairs :].flatten(1), "Q": asks[:, 0, :2]}
        separator = torch.zeros(batch, 1, dtype=torch.long, device=device)
        pieces = [piece for letter in form[:-1] for piece in (parts[letter], separator)]
        ids = torch.cat([*pieces, asks.flatten(1)], 1)
        labels = torch.full_like(ids, -100)
        labels[:, ids.shape[1] - 3 * questions + 2 :: 3] = asks[..., 2]
        return ids, labels
