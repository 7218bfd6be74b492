"""Attention masks of any shape for stock models, and caches that keep only some of their last tokens.

Set-based prompting, tree drafting and the like say with a bool tensor which key a query may see. What a model then
takes depends on its attention implementation (an additive mask, a `BlockMask`) and on its sliding windows, and most
wrong choices run without an exception. These helpers make the choice once, or refuse. They hold no state.
"""

from __future__ import annotations

import inspect
import os

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer

_BLOCK = 128  # tile of flex_attention
_RECURRENT_LAYERS = {"linear_attention", "hybrid", "hybrid_sliding", "conv"}


def check_custom_attention(model: PreTrainedModel) -> None:
    """Refuse models that cannot run with custom masks and positions.

    Raises:
        ValueError: an encoder-decoder or recurrent model, one without position ids or with ALiBi (its bias goes by
            the place in memory), or flash attention, which takes no masks.
    """
    base = base_model(model)
    name, config = type(base).__name__, base.config.get_text_config(decoder=True)
    if base.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; custom attention masks need a decoder-only model.")
    if getattr(base, "_is_stateful", False) or _RECURRENT_LAYERS & set(getattr(config, "layer_types", None) or ()):
        raise ValueError(f"{name} has recurrent layers, which read tokens in order; use a pure attention model.")
    if "position_ids" not in inspect.signature(base.forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} takes no position_ids (or uses ALiBi, which ignores them); use a model with rotary or learned "
            "positions."
        )
    implementation = base.config._attn_implementation
    if implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"attn_implementation ({implementation!r}) of {name} takes no custom masks; use 'sdpa', 'eager' or "
            "'flex_attention', e.g. model.set_attn_implementation('sdpa')."
        )


def base_model(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache that `generate()` would begin with."""
    return DynamicCache(config=base_model(model).config.get_text_config(decoder=True))


def attention_window(model: PreTrainedModel) -> int | None:
    """The fewest tokens that a layer of the model looks back over, itself included; None if all see everything."""
    config = base_model(model).config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    windows = []
    if getattr(config, "sliding_window", None) and (not layers or "sliding_attention" in layers):
        windows.append(config.sliding_window)
    if getattr(config, "attention_chunk_size", None) and (not layers or "chunked_attention" in layers):
        windows.append(config.attention_chunk_size)
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        windows.append(config.window_size)
    return min(windows, default=None)


def to_model_mask(allowed: torch.BoolTensor, model: PreTrainedModel, *, positions=None):
    """What to pass as `attention_mask` so that query i sees exactly the keys j with `allowed[..., i, j]`.

    Args:
        allowed: `[batch, queries, keys]` or `[batch, 1, queries, keys]` bool; with a cache its tokens are the first
            keys. Every query must see at least one key (let padding see itself).
        model: decides by its attention implementation and its sliding windows.
        positions: `(of queries, of keys)`, `[batch, queries]` and `[batch, keys]`: where tokens stand in the text.
            Needed only when there are more keys than the sliding window of the model: such layers then see the
            allowed keys less than a window away, by these positions.

    Returns:
        sdpa, eager: `[batch, 1, queries, keys]` in the model's dtype, 0 or the dtype's minimum, to be added to scores
        (a bool mask would be right under sdpa only; eager adds it as 0 and 1). flex_attention: a `BlockMask`.
        Models with windowed and full layers get a dict by layer type once a window is narrower than the keys.

    Raises:
        ValueError: see `check_custom_attention`; a window narrower than the keys without `positions`, or in a model
            that cannot be told about it. With UNDERSONG_DEBUG=1 also a query that sees nothing.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=1)
    >>> to_model_mask(torch.ones(1, 2, 2).tril().bool(), LlamaForCausalLM(config)) < 0
    tensor([[[[False,  True],
              [False, False]]]])
    """
    check_custom_attention(model)
    if allowed.dtype != torch.bool or allowed.ndim not in (3, 4) or (allowed.ndim == 4 and allowed.shape[1] != 1):
        raise ValueError(
            f"allowed ({allowed.dtype}, shape {list(allowed.shape)}) must be a bool tensor [batch, queries, keys] or "
            "[batch, 1, queries, keys]."
        )
    allowed = allowed.flatten(0, 1) if allowed.ndim == 4 else allowed
    if os.environ.get("UNDERSONG_DEBUG") == "1" and not allowed.any(-1).all():
        raise ValueError("allowed has a query without any key, whose softmax is NaN; let padding see itself.")
    model = base_model(model)
    window, keys = attention_window(model), allowed.shape[-1]
    if window is None or keys <= window:
        return _in_models_form(allowed, model)

    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ())
    if window != getattr(config, "sliding_window", None) or layers - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"allowed has {keys} keys, but {name} has layers that see {window} and takes no mask for them; use at "
            f"most {window} tokens."
        )
    if positions is None:
        raise ValueError(
            f"allowed has {keys} keys, but {name} has layers that see {window}; pass positions=(of queries, of keys)."
        )
    of_queries, of_keys = positions
    windowed = allowed & (of_queries[:, :, None] - of_keys[:, None, :] < window)
    if "full_attention" not in layers:
        return _in_models_form(windowed, model)
    full = _in_models_form(allowed, model)
    return {"full_attention": full, "sliding_attention": _in_models_form(windowed, model)}


def _in_models_form(allowed, model):
    if model.config._attn_implementation == "flex_attention":
        return _block_mask(allowed)
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(model.dtype).min)[:, None]


def _block_mask(allowed):
    """`BlockMask` of a dense bool mask: tiles that are full need no mask, empty ones are never visited."""
    from torch.nn.attention.flex_attention import BlockMask

    batch, queries, keys = allowed.shape
    padded = F.pad(allowed, (0, -keys % _BLOCK, 0, -queries % _BLOCK)).contiguous()
    tiles = padded.unflatten(2, (-1, _BLOCK)).unflatten(1, (-1, _BLOCK))  # [batch, q tiles, _BLOCK, k tiles, _BLOCK]
    some, all_ = tiles.any(4).any(2)[:, None], tiles.all(4).all(2)[:, None]

    def listed(chosen):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
        return chosen.sum(-1, dtype=torch.int32), order

    def mask_mod(b, h, q, k):
        return padded[b, q, k]

    return BlockMask.from_kv_blocks(
        *listed(some & ~all_), *listed(all_), BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(queries, keys)
    )


def gather_cache(cache: Cache, keep_from: int, idx: torch.LongTensor) -> None:
    """Of the tokens after the first `keep_from`, keep those at `keep_from + idx`, in this order; in place.

    Keys are stored rotated to their position in the text, so moving them within the cache changes nothing else.

    Args:
        cache: any cache of dynamic layers. Sliding layers that have dropped tokens must record the past:
            `cache.activate_past_recording()` before the forward pass that added the tokens.
        keep_from: number of leading tokens that stay.
        idx: 1-D, places after `keep_from`, the same for all rows of the batch.

    Raises:
        ValueError: an index beyond the cache, a cache that cannot be gathered, or a sliding layer that no longer has
            the tokens before it.

    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.arange(6.).view(1, 1, 6, 1), torch.zeros(1, 1, 6, 1), 0)
    >>> gather_cache(cache, 2, torch.tensor([1, 3]))
    >>> cache.layers[0].keys.flatten()
    tensor([0., 1., 3., 5.])
    """
    if not cache.is_croppable:
        kinds = sorted({type(layer).__name__ for layer in cache.layers if not layer.is_croppable})
        raise ValueError(f"cache ({type(cache).__name__} of {kinds}) cannot drop tokens; use a DynamicCache.")
    length = cache.get_seq_length()
    count = idx.numel()
    if not 0 <= keep_from <= length or (count and not 0 <= idx.min() <= idx.max() < length - keep_from):
        raise ValueError(
            f"idx ({idx.tolist()}) must lie in [0, {length - keep_from}) because the cache has {length} tokens and "
            f"keep_from is {keep_from}."
        )
    if not torch.equal(idx.cpu(), torch.arange(count)):  # else the kept tokens are in place already
        for layer in cache.layers:
            if not layer.is_initialized:  # layers that share another layer's keys
                continue
            start = keep_from - (length - layer.keys.shape[-2])
            if start < 0:
                kept = layer.keys.shape[-2]
                raise ValueError(
                    f"keep_from ({keep_from}) lies before the {kept} tokens that a sliding layer still has; call "
                    "cache.activate_past_recording() before the forward pass."
                )
            for states in (layer.keys, layer.values):
                states[:, :, start : start + count] = states.index_select(2, (start + idx).to(states.device))
    removed = length - keep_from - count
    past_window = any(isinstance(layer, DynamicSlidingWindowLayer) and layer.record_past for layer in cache.layers)
    if removed or past_window:  # crop(0) trims recording layers back to their window
        cache.crop(-removed)
