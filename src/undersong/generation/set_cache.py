"""Remembers what a model computed for members of sets, for the next prompt that holds them.

With set-based prompting (McIlroy-Young et al., arXiv 2406.06581) the keys and values of a member depend on the text
before its set and on the member, not on its siblings: all start at the same position and do not see each other. So a
passage is read once per model and prefix, and a prompt with known passages costs only its last piece of text.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .masks import empty_cache, to_model_mask
from .set_encoding import set_attention

_Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values per layer, [1, heads, tokens, width]


class SetCache:
    """Keys and values of text before sets and of their members, least recently used first out.

    Pass it to `SetBasedGenerate(set_cache=...)`, `set_prefill(..., set_cache=...)` or `mcq(..., set_cache=...)`. Rows
    of a batch are read one after another. Entries belong to one model with its weights as they are: a training step
    makes them unreachable; call `clear()` after switching adapters.

    Args:
        max_tokens: how many tokens to remember. One costs 2 x layers x key heads x head size numbers.

    Attributes:
        hits, misses: pieces (members, texts before or between sets) that were remembered, or computed.

    Raises:
        ValueError: `max_tokens` below 1.

    >>> len(SetCache(max_tokens=4096))
    0
    """

    def __init__(self, max_tokens: int = 65536):
        if max_tokens < 1:
            raise ValueError(f"max_tokens ({max_tokens}) must be positive; a passage has some hundred tokens.")
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._entries: OrderedDict[tuple, _Layers] = OrderedDict()
        self.tokens = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    @torch.no_grad()
    def prefill(
        self, model, input_ids, attention_mask, position_ids, segment_ids, cache: DynamicCache, **options
    ) -> CausalLMOutputWithPast:
        """Read prompts into an empty cache.

        Args:
            input_ids, attention_mask, position_ids, segment_ids: as in `SetPromptEncoding`; rows end with plain text.
            cache: empty; it then holds all tokens, with padding where the prompts have it.
            options: further arguments of `model(...)`.

        Returns:
            The model's output with the logits of every row's last token, `[batch, 1, vocabulary]`, and the cache.

        Raises:
            ValueError: attentions or hidden states asked for; of what is remembered there are none.
        """
        for name in ("output_attentions", "output_hidden_states"):
            if options.get(name):
                raise ValueError(f"{name} ({options[name]}) needs the whole prompt to be read; drop set_cache.")
        rows, length = [], input_ids.shape[1]
        for row, first in enumerate((length - attention_mask.sum(1)).tolist()):
            own = cache if len(input_ids) == 1 and first == 0 else empty_cache(model)
            tensors = (t[row, first:] for t in (input_ids, position_ids, segment_ids))
            rows.append((self._read(model, *tensors, own, options), first))
        if rows[0][0].past_key_values is not cache:
            for layer in range(len(rows[0][0].past_key_values.layers)):
                states = [(out.past_key_values.layers[layer], first) for out, first in rows]
                keys = torch.cat([F.pad(s.keys, (0, 0, first, 0)) for s, first in states])
                values = torch.cat([F.pad(s.values, (0, 0, first, 0)) for s, first in states])
                cache.update(keys, values, layer)
        return CausalLMOutputWithPast(logits=torch.cat([out.logits[:, -1:] for out, _ in rows]), past_key_values=cache)

    def _read(self, model, ids, positions, segments, cache: DynamicCache, options: dict):
        """One row: all but its last piece from memory, what is not there in one forward pass per set."""
        context, past = _identity(model), []
        on_cpu = ids.cpu(), segments.cpu()
        *remembered, last = _groups(on_cpu[1])
        for group in remembered:
            names = [_digest(context[-1], *(t[start:end] for t in on_cpu)) for start, end in group]
            keys = [(*context[:-1], name) for name in names]
            found = {key: self._entries[key] for key in keys if key in self._entries}
            missing = {key: span for key, span in zip(keys, group, strict=True) if key not in found}
            self.hits, self.misses = self.hits + len(keys) - len(missing), self.misses + len(missing)
            if missing:
                found |= self._compute(model, ids, positions, segments, past, missing, options)
            for key in keys:
                self._entries.move_to_end(key)
            past += [found[key] for key in keys]
            context = (*context[:-1], hashlib.sha256(b"".join(names)).digest())
        while self.tokens > self.max_tokens:
            self.tokens -= self._entries.popitem(last=False)[1][0][0].shape[-2]
        ((start, end),) = last
        return _forward(model, ids[start:end], positions[start:end], segments[start:end], past, cache, options)

    def _compute(self, model, ids, positions, segments, past, missing: dict, options: dict) -> dict:
        places = torch.cat([torch.arange(start, end) for start, end in missing.values()]).to(ids.device)
        cache = empty_cache(model)
        _forward(model, ids[places], positions[places], segments[places], past, cache, options)
        lengths = [end - start for start, end in missing.values()]
        done = {key: [] for key in missing}
        for layer in cache.layers:
            parts = (states[:, :, -len(places) :].split(lengths, dim=2) for states in (layer.keys, layer.values))
            for entry, keys, values in zip(done.values(), *parts, strict=True):
                entry.append((keys.clone(), values.clone()))  # a view would keep all siblings in memory
        self._entries |= done
        self.tokens += len(places)
        return done


def _forward(model, ids, positions, segments, past: list[_Layers], cache: DynamicCache, options: dict):
    for layer, states in enumerate(zip(*past, strict=True)):
        keys, values = zip(*states, strict=True)
        cache.update(torch.cat(keys, 2), torch.cat(values, 2), layer)
    mask = None  # plain text needs none: it sees all before it
    if (segments >= 0).any():
        own = set_attention(segments[None], torch.ones_like(ids)[None])
        seen = torch.ones(1, len(ids), cache.get_seq_length(), dtype=torch.bool, device=ids.device)
        mask = to_model_mask(torch.cat([seen, own], 2), model)
    return model(
        input_ids=ids[None],
        attention_mask=mask,
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
        **options,
    )


def _groups(segments: torch.Tensor) -> Iterator[list[tuple[int, int]]]:
    """`(start, end)` of the pieces of a row, those of a set together: texts and members alternate."""
    outermost = [tuple(pair) for pair in segments[:, :2].tolist()]
    pieces, start = [], 0
    for (of_set, _), tokens in groupby(outermost):
        end = start + len(list(tokens))
        pieces.append((of_set, (start, end)))
        start = end
    for _, group in groupby(pieces, key=lambda piece: piece[0]):
        yield [span for _, span in group]


def _identity(model) -> tuple:
    """What entries of a model have in common; the last item stands for the text so far."""
    weights = list(model.parameters())
    version = sum(0 if w.is_inference() else w._version for w in weights)
    return weakref.ref(model), weights[0].dtype, weights[0].device, version, b""


def _digest(context: bytes, ids: torch.Tensor, segments: torch.Tensor) -> bytes:
    sets, members = segments[:, 2::2], segments[:, 3::2]  # within the piece
    used = (sets >= 0).any(0)
    sets, members = sets[:, used], members[:, used]
    if used.any():  # sets are numbered through the prompt, but a member is the same in any place
        sets = sets.where(sets < 0, sets - sets[sets >= 0].min())
    parts = (t.contiguous().numpy().tobytes() for t in (ids, sets, members))
    return hashlib.sha256(b"|".join([context, *parts])).digest()
