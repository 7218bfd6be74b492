"""Sentence ordering: put the shuffled sentences of a paragraph back into the order its author wrote.

The task of Logeswaran et al., "Sentence Ordering and Coherence Modeling using Recurrent Neural Networks" (arXiv
1611.02654), for a pointer network: items are sentences, embedded once by any encoder of transformers, and labels are
the ids 1..n of the shuffled sentences in the right order, then 0. Texts are `undersong.data.human_text`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from .human_text import human_documents, split

__all__ = ["SentenceOrderDataset", "cut_passages", "embed_sentences", "split_sentences", "text_passages"]

# A mark that ends a sentence (with closing quotes and brackets) stands before a space and a capital; not behind an
# abbreviation or the initial of a name.
_SENTENCE_END = re.compile(
    r"(?<![\s(]e\.g)(?<![\s(]i\.e)(?<![\s(]eg)(?<![\s(]ie)(?<![\s(]cf)(?<![\s(]vs)(?<!\betc)(?<!\b[A-Z])"
    r"([.!?][\"'”’)\]]*)\s+(?=[\"'“‘(\[]*[A-Z])"
)


def split_sentences(paragraph: str) -> list[str]:
    """Splits English prose at . ! ? before a capital letter.

    >>> split_sentences('It has two forms (e.g. "Yes." and "No."). Is it 3.5 long? See E. Noether.')
    ['It has two forms (e.g. "Yes." and "No.").', 'Is it 3.5 long?', 'See E. Noether.']
    """
    return _SENTENCE_END.sub(r"\1\n", " ".join(paragraph.split())).split("\n")


def cut_passages(
    documents: Iterable[Sequence[str]], *, min_sentences: int = 3, max_sentences: int = 8
) -> list[list[str]]:
    """Runs of neighbouring sentences, each of one document and without repetitions.

    Args:
        documents: each a list of paragraphs.
        min_sentences: shorter documents give nothing.
        max_sentences: longer documents give several passages of nearly equal length.

    Raises:
        ValueError: `min_sentences` below 2, or `max_sentences` below `2 * min_sentences - 1`, which would lose text.

    >>> cut_passages([["One came. Two left.", "Three stayed."], ["Alone."]])
    [['One came.', 'Two left.', 'Three stayed.']]
    """
    if min_sentences < 2:
        raise ValueError(f"min_sentences ({min_sentences}) must be at least 2: one sentence has no order.")
    if max_sentences < 2 * min_sentences - 1:
        raise ValueError(
            f"max_sentences ({max_sentences}) must be at least 2 * min_sentences - 1 ({2 * min_sentences - 1}), so"
            " that a long document can be cut into passages that are not too short."
        )
    found = []
    for document in documents:
        # equal sentences could not be told apart, so that there would be several right orders
        text = list(dict.fromkeys(sentence for paragraph in document for sentence in split_sentences(paragraph)))
        parts = -(-len(text) // max_sentences)
        cuts = [part * len(text) // parts for part in range(parts + 1)] if parts else [0]
        pieces = [text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False)]
        found += [piece for piece in pieces if len(piece) >= min_sentences]
    return found


def text_passages(*, min_sentences: int = 3, max_sentences: int = 8) -> dict[str, list[list[str]]]:
    """About a thousand passages of `human_documents`, in parts "train", "validation" and "test" (80, 10 and 10 %).

    A document is in one part only, and so are its neighbours, blocks of 8: docstrings of a class are alike.

    Raises:
        ValueError: as `cut_passages`.

    >>> parts = text_passages()
    >>> len(parts["train"]) > 5 * len(parts["test"]) > 0
    True
    """
    train, rest = split(human_documents())
    validation, test = split(rest, held_out=2)
    parts = {"train": train, "validation": validation, "test": test}
    return {
        name: cut_passages(part, min_sentences=min_sentences, max_sentences=max_sentences)
        for name, part in parts.items()
    }


class SentenceOrderDataset(Dataset):
    """Passages with their sentences shuffled, as `Trainer` and `PointerDataCollator` take them.

    Args:
        passages: lists of sentences in the right order, each of at least 2.
        encode: turns a list of sentences into a float tensor `[sentences, size]`; called once, here, with every
            sentence once. For a model of transformers: `functools.partial(embed_sentences, model=..., tokenizer=...)`.
        shuffles: how often each passage occurs, every time in another random order.
        seed: of the orders.

    Raises:
        ValueError: a passage of fewer than 2 sentences, or `encode` gave another shape.

    >>> data = SentenceOrderDataset([["One.", "Two.", "Three."]], lambda texts: torch.ones(len(texts), 4))
    >>> row = data[0]
    >>> row["inputs_embeds"].shape, row["labels"]
    (torch.Size([3, 4]), tensor([...]))
    >>> shuffled = data.shuffled(0)
    >>> [shuffled[place - 1] for place in row["labels"][:-1]]
    ['One.', 'Two.', 'Three.']
    """

    def __init__(
        self,
        passages: Sequence[Sequence[str]],
        encode: Callable[[list[str]], torch.Tensor],
        *,
        shuffles: int = 1,
        seed: int = 0,
    ):
        for index, passage in enumerate(passages):
            if len(passage) < 2:
                raise ValueError(f"passages[{index}] ({list(passage)}) must hold at least 2 sentences; drop it.")
        self.passages, self.shuffles, self.seed = passages, shuffles, seed
        distinct = list(dict.fromkeys(sentence for passage in passages for sentence in passage))
        embeddings = encode(distinct)
        if embeddings.ndim != 2 or len(embeddings) != len(distinct):
            raise ValueError(
                f"encode gave a tensor of shape {list(embeddings.shape)} for {len(distinct)} sentences; it must be"
                f" [{len(distinct)}, size]."
            )
        place = {sentence: index for index, sentence in enumerate(distinct)}
        self._embeddings = [embeddings[[place[sentence] for sentence in passage]] for passage in passages]

    def __len__(self):
        return len(self.passages) * self.shuffles

    def order(self, index: int) -> np.ndarray:
        """Row `index` shows sentence `order[i]` of its passage at place i, both counted from 0."""
        generator = np.random.default_rng([self.seed, range(len(self))[index]])
        return generator.permutation(len(self.passages[index % len(self.passages)]))

    def shuffled(self, index: int) -> list[str]:
        """The sentences of a row as the model sees them."""
        passage = self.passages[index % len(self.passages)]
        return [passage[place] for place in self.order(index)]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`{"inputs_embeds": [n, size] float32, "labels": [n + 1] int64}`."""
        order = self.order(index)
        labels = np.append(np.argsort(order) + 1, 0)  # where each sentence went, in the right order
        embeddings = self._embeddings[index % len(self.passages)][torch.from_numpy(order)]
        return {"inputs_embeds": embeddings, "labels": torch.from_numpy(labels)}


@torch.no_grad()
def embed_sentences(texts: Sequence[str], model, tokenizer, *, batch_size: int = 64) -> torch.Tensor:
    """Mean of an encoder's last hidden states over each sentence's tokens, as sentence-transformers pools them.

    Args:
        texts: sentences; longer ones are cut at the tokenizer's `model_max_length`.
        model: any encoder that gives `last_hidden_state`, such as `AutoModel.from_pretrained(minilm())`.
        tokenizer: its tokenizer.
        batch_size: sentences at once; neighbours in length, so that little is padding.

    Returns:
        float32 `[texts, hidden_size]` on the CPU, every row scaled to length 1.
    """
    by_length = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    training = model.training
    model.eval()
    found = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(texts), batch_size):
        chosen = by_length[begin : begin + batch_size]
        batch = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch.to(model.device)).last_hidden_state.float()  # [texts, tokens, size]
        weight = batch["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        found[chosen] = torch.nn.functional.normalize(mean, dim=-1).cpu()
    model.train(training)
    return found
