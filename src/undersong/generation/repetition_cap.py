"""Breaks loops while decoding: the n-th copy of a stretch is at most `penalty` times as likely as the copy before.

DITTO (Xu et al., "Learning to Break the Loop", NeurIPS 2022, arXiv 2206.02369) finds that each repetition makes a
model more certain of the next one, and fine-tunes on pseudo-repetitions so that P(copy n) = lambda * P(copy n-1).
This processor imposes the same recurrence on a model as it is; it is ours, the paper has no decode-time method.

State, per row: the tokens, the log probability q of every generated token *after* this processor's own caps (with the
model's own probability there is no geometric decay), and an index from each context to the position that followed it.
For a single row also the latest distributions, so that drafted tokens can be taken back.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

_LONGEST_DRAFT = 128  # tokens that can be taken back; each costs one row of float32 probabilities


class SelfReinforcementCapLogitsProcessor(LogitsProcessor):
    """Caps the probability of continuing a repetition at `penalty` times what the earlier copy's token had.

    When the last `min_match` tokens occurred before, and their latest occurrence was followed by token v with
    probability q, then p(v) becomes min(p(v), penalty * q) and the mass taken from v goes to all other tokens in
    proportion. Rows without a match are untouched; no probability of a repeated token is ever raised.

    Args:
        penalty: lambda in [0, 1]. 0 forbids to continue a repetition, 1 only forbids to become more certain of it.
        min_match: how many tokens must repeat before the cap acts. Longer names and set phrases are repetitions too
            and wear out after a few uses; raise it, or use unit="sentence", where they matter.
        unit: "any" acts inside every repeated stretch; "sentence" only where a sentence began like an earlier one,
            i.e. all its tokens so far agree, `min_match` at least. Phrases may then recur in other sentences.
        sentence_end_token_ids: tokens after which a sentence begins, for unit="sentence" (BPE vocabularies have
            several: ".", "?", those with a line break, ...; add the BOS token if prompts start with it).
        score_prompt: a causal LM. The prompt's text is not capped, because the probability of its tokens is unknown;
            given the model, each prompt is scored by one more forward pass and counts like generated text.
        pad_token_id: leading tokens of this id are padding. Needed for left-padded batches with unit="sentence" or
            `score_prompt`; otherwise padding cannot match anyway.

    One instance serves any number of `generate()` calls, greedy, sampling or assisted: if `input_ids` are not the last
    ones plus one token, nor shorter by a draft that was (partly) rejected, it starts afresh. An assistant must share
    the tokenizer and the device, and drafts end after 128 tokens. Histories cannot move between rows: beam search
    raises as soon as it reorders them, and continuous batching is declared unsupported.

    Raises:
        ValueError: an argument out of range, unit="sentence" without sentence ends, or rows reordered by beam search.

    >>> cap = SelfReinforcementCapLogitsProcessor(penalty=0.5, min_match=1)
    >>> scores = torch.tensor([[0.8, 0.1, 0.1]]).log()
    >>> for ids in ([0], [0, 1], [0, 1, 0], [0, 1, 0, 1]):  # 1 followed 0 with probability 0.1, 0 followed 1 with 0.8
    ...     print(cap(torch.tensor([ids]), scores).softmax(-1))
    tensor([[0.8000, 0.1000, 0.1000]])
    tensor([[0.8000, 0.1000, 0.1000]])
    tensor([[0.8444, 0.0500, 0.1056]])
    tensor([[0.4000, 0.3000, 0.3000]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        penalty: float = 0.5,
        min_match: int = 3,
        unit: str = "any",
        sentence_end_token_ids: Sequence[int] | None = None,
        score_prompt: torch.nn.Module | None = None,
        pad_token_id: int | None = None,
    ):
        if not 0.0 <= penalty <= 1.0:
            raise ValueError(f"penalty ({penalty}) must lie in [0, 1]; smaller values break repetitions earlier.")
        if not isinstance(min_match, int) or min_match < 1:
            raise ValueError(f"min_match ({min_match}) must be a positive integer; it counts repeated tokens.")
        if unit not in ("any", "sentence"):
            raise ValueError(f"unit ({unit!r}) must be 'any' or 'sentence'.")
        if (unit == "sentence") != bool(sentence_end_token_ids):
            raise ValueError(
                f"sentence_end_token_ids ({sentence_end_token_ids}) must be given if and only if unit is 'sentence', "
                f"but unit is {unit!r}; pass e.g. [tokenizer.convert_tokens_to_ids('.')]."
            )
        self.penalty = penalty
        self.min_match = min_match
        self.unit = unit
        self.sentence_end_token_ids = frozenset(sentence_end_token_ids or ())
        self.score_prompt = score_prompt
        self.pad_token_id = pad_token_id
        self._log_penalty = math.log(penalty) if penalty else -math.inf
        self._scored: dict[int, tuple] = {}  # length -> the distribution for the token behind, what was capped in it

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self._extend(input_ids):
            self._start(input_ids)
        log_p = scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # [batch, vocab]
        self._remember(log_p, None)
        matches = [(row, u) for row, u in enumerate(self._aligned) if u is not None and u >= self._first_scored]
        if not matches:
            return scores

        rows, positions = torch.tensor(matches, device=scores.device).unbind(1)
        token = self._ids[rows, positions]
        log_cap = self._log_q[rows, positions] + self._log_penalty
        before = log_p[rows, token]
        # All other tokens together, summed directly: 1 - p(v) would lose every digit when p(v) is nearly 1.
        others = log_p[rows].scatter_(1, token.unsqueeze(1), -math.inf).logsumexp(-1)
        # With no other token allowed (a grammar, a forced EOS) the mass has nowhere to go.
        acts = (before > log_cap) & (others > -math.inf)
        # log p'(v) - log p'(others) = log cap - log(1 - cap), and the other logits stay as they are.
        log_rest = torch.log(-torch.expm1(log_cap))
        shift = torch.where(acts, log_cap - log_rest + others - before, 0.0)
        capped = (rows, token, torch.where(acts, log_cap, before), torch.where(acts, log_rest - others, 0.0))
        self._remember(log_p, capped)
        processed = scores.clone()
        processed[rows, token] = torch.where(acts, scores[rows, token] + shift, scores[rows, token]).to(scores.dtype)
        return processed

    def _extend(self, input_ids: torch.Tensor) -> bool:
        """Takes in the token that was chosen from the scores of one of the last calls; False if this is another text.

        Assisted decoding calls with a draft's prefixes, first for the assistant (or to see what is forbidden, with
        made-up scores), then for the model itself: so the latest scores of every length are those that count, and the
        next text is one of these prefixes with one more token. At the prompt, starting afresh comes to the same.
        """
        batch, length = input_ids.shape
        if length - 1 not in self._scored or not self._prompt_length < length <= self._length + 1:
            return False
        if self._ids.shape[0] != batch or self._ids.device != input_ids.device:
            return False
        seen = self._ids[:, : length - 1]
        chosen = input_ids[:, -1]
        same = (input_ids[:, :-1] == seen).all(1)
        same, tokens = torch.stack([same.long(), chosen]).tolist()  # the only transfer of a step
        if not all(same):
            moved = (input_ids[:, None, :-1] == seen).all(-1).any(1).tolist()
            if all(moved):
                raise ValueError(
                    "input_ids must keep every sequence in its row because the cap remembers each row's history, but "
                    "rows were reordered, as beam search does; use num_beams=1, or no_repeat_ngram_size with beams."
                )
            return False
        for _ in range(self._length - (length - 1)):
            for index in self._indexes:
                index.take_back()
        if length > self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)], 1)
            self._log_q = torch.cat([self._log_q, torch.zeros_like(self._log_q)], 1)
        self._ids[:, length - 1] = chosen
        log_p, capped = self._scored[length - 1]
        log_q = log_p.gather(1, chosen.unsqueeze(1)).squeeze(1)
        if capped is not None:
            rows, token, log_p_token, log_scale = capped
            log_q[rows] = torch.where(chosen[rows] == token, log_p_token, log_q[rows] + log_scale)
        self._log_q[:, length - 1] = log_q
        self._aligned = [index.append(token) for index, token in zip(self._indexes, tokens, strict=True)]
        self._length = length
        return True

    def _remember(self, log_p: torch.Tensor, capped: tuple[torch.Tensor, ...] | None) -> None:
        kept = _LONGEST_DRAFT + 2 if len(log_p) == 1 else 1  # assisted decoding takes no batches
        self._scored[self._length] = (log_p, capped)
        self._scored.pop(self._length - kept, None)

    def _start(self, input_ids: torch.Tensor) -> None:
        """Forgets the last text and reads a prompt."""
        length = input_ids.shape[1]
        self._length = self._prompt_length = length
        self._scored.clear()
        self._ids = torch.cat([input_ids, torch.zeros_like(input_ids)], 1)
        self._log_q = torch.zeros(self._ids.shape, device=input_ids.device)
        self._first_scored = length if self.score_prompt is None else 0
        self._indexes, self._aligned = [], []
        for row, tokens in enumerate(input_ids.tolist()):
            start = 0
            while start < length - 1 and tokens[start] == self.pad_token_id:
                start += 1
            if self.unit == "any":
                index = _ContextIndex(self.min_match, start)
            else:
                index = _SentenceIndex(self.min_match, start, self.sentence_end_token_ids)
            aligned = None
            for token in tokens[start:]:
                aligned = index.append(token)
            self._indexes.append(index)
            self._aligned.append(aligned)
            if self.score_prompt is not None:
                prompt = input_ids[row : row + 1, start:]
                log_p = self.score_prompt(input_ids=prompt).logits[:, :-1].float().log_softmax(-1)
                self._log_q[row, start + 1 : length] = log_p.gather(2, prompt[:, 1:, None]).squeeze()


class _ContextIndex:
    """The position after the latest earlier occurrence of the last `size` tokens, in constant time per token."""

    def __init__(self, size: int, start: int):
        self.size, self.position = size, start
        self.context: tuple[int, ...] = ()
        self.follows: dict[tuple[int, ...], int | None] = {}
        self.undo: deque[tuple] = deque(maxlen=_LONGEST_DRAFT + 2)

    def append(self, token: int) -> int | None:
        self.position += 1
        before, self.context = self.context, (*self.context, token)[-self.size :]
        earlier = self.follows.get(self.context)
        self.undo.append((before, earlier))
        if len(self.context) == self.size:
            self.follows[self.context] = self.position
        return earlier

    def take_back(self) -> None:
        self.position -= 1
        before, self.follows[self.context] = self.undo.pop()
        self.context = before


class _SentenceIndex:
    """The position after the latest earlier sentence that began with all tokens of the current one: a trie."""

    def __init__(self, min_match: int, start: int, ends: frozenset[int]):
        self.min_match, self.position, self.ends = min_match, start, ends
        self.children: dict[tuple[int, int], int] = {}  # (node, token) -> node; node 0 is a sentence's start
        self.follows: dict[int, int | None] = {}
        self.node = self.depth = 0
        self.undo: deque[tuple] = deque(maxlen=_LONGEST_DRAFT + 2)

    def append(self, token: int) -> int | None:
        self.position += 1
        before = (self.node, self.depth)
        if token in self.ends:
            self.node = self.depth = 0
        else:
            self.node = self.children.setdefault((self.node, token), len(self.children) + 1)
            self.depth += 1
        earlier = self.follows.get(self.node)
        self.undo.append((*before, earlier))
        if self.node:
            self.follows[self.node] = self.position
        return earlier if self.depth >= self.min_match else None

    def take_back(self) -> None:
        self.position -= 1
        node, depth, self.follows[self.node] = self.undo.pop()
        self.node, self.depth = node, depth
