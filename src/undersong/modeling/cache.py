"""The cache layer that every recurrent model shares, and what `generate()` needs around it.

transformers' own `LinearAttentionLayer` copies states into a frozen buffer (no gradients through a cached state, dtype
fixed by the first call), and a cache made of it alone makes `generate()` raise in `get_seq_length`. The layer here
keeps named float32 states that are assigned, is empty by absence and never by zeros, and counts its own tokens.
"""

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
    LinearAttentionLayer,
    QuantizedCache,
    StaticCache,
)
from transformers.generation import GenerationMixin


class RecurrentStateLayer(LinearAttentionLayer, CacheLayerMixin):
    """The recurrent state of one layer: named tensors whose first axis is the batch.

    Attributes:
        states: state tensors by name, empty before the first `write` and after `reset`.
        seen_tokens: positions that went through the layer, padding included (what `get_seq_length` reports).
        valid_tokens: `[batch]` int64, positions that were not padding, per row; None before the first token.

    >>> import torch
    >>> layer = RecurrentStateLayer()
    >>> layer.read("h") is None
    True
    >>> layer.write(h=torch.arange(3.0)[:, None])
    >>> layer.reorder_cache(torch.tensor([2, 0, 0]))
    >>> layer.read("h").flatten().tolist()
    [2.0, 0.0, 0.0]
    """

    is_compileable = False  # the number of states is only known after the first write
    supports_early_init = False

    def __init__(self):
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self.states: dict[str, torch.Tensor] = {}
        self.seen_tokens = 0
        self.valid_tokens: torch.Tensor | None = None

    def read(self, *names):
        """The named states: None while the layer is empty; one name gives a tensor, several a tuple."""
        if not self.states:
            return None
        return self.states[names[0]] if len(names) == 1 else tuple(self.states[name] for name in names)

    def write(self, **states):
        """Assigns the named states (no copy, so gradients flow through a carried state)."""
        self.states = states
        first = next(iter(states.values()))
        self.dtype, self.device = first.dtype, first.device
        self.is_initialized = True
        self.has_previous_state[0] = True

    def advance(self, seen, valid):
        """Counts `seen` further positions, of which `valid` `[batch]` per row were not padding."""
        self.seen_tokens += seen
        self.valid_tokens = valid if self.valid_tokens is None else self.valid_tokens + valid

    @property
    def batch_size(self):
        if not self.states:
            raise AttributeError(
                "an empty RecurrentStateLayer has no batch size yet"
            )  # Cache.batch_size asks by hasattr
        return next(iter(self.states.values())).shape[0]

    @property
    def is_croppable(self):
        return False

    def get_seq_length(self):
        return self.seen_tokens

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, query_length):
        return self.seen_tokens + query_length, 0

    def _map(self, function):
        self.states = {name: function(state) for name, state in self.states.items()}
        if self.valid_tokens is not None:
            self.valid_tokens = function(self.valid_tokens)

    def reset(self):
        self.states, self.seen_tokens, self.valid_tokens = {}, 0, None
        self.is_initialized = False
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx):
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats):
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self._map(lambda state: state[indices.to(state.device)])

    def offload(self):
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self):
        self._map(lambda state: state.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove):
        raise RuntimeError(
            f"crop({tokens_to_remove}) needs a cache that can roll back, but a recurrent state has no past to return"
            " to; keep a copy of the cache (copy.deepcopy) from before the tokens you want to drop."
        )

    def activate_past_recording(self):
        self.crop(0)

    def lazy_initialization(self, *args, **kwargs):
        raise RuntimeError("RecurrentStateLayer has no buffers to initialise; use write(name=tensor).")

    def update(self, *args, **kwargs):
        raise RuntimeError("RecurrentStateLayer keeps named states, not keys and values; use write(name=tensor).")

    update_conv_state = update_recurrent_state = update


def adopt_cache(cache, layer_types):
    """Makes a cache hold a `RecurrentStateLayer` for every "linear_attention" entry of `layer_types`, in place.

    Args:
        cache: None (a new `Cache` is built), a stock cache that is still empty at those layers (as `generate()` or a
            user makes it; it may hold no layers at all), or one that was adopted before.
        layer_types: the config's `layer_types`.

    Returns:
        The cache whose `layers` to use: the given one, or the self-attention part of an `EncoderDecoderCache`.

    Raises:
        ValueError: static and quantized caches, and layers that already hold another kind of state.
    """
    if cache is None:
        cache = Cache(layers=[])
    elif isinstance(cache, EncoderDecoderCache):
        return adopt_cache(cache.self_attention_cache, layer_types)
    elif not isinstance(cache, Cache) or isinstance(cache, (StaticCache, QuantizedCache)):
        raise ValueError(
            f"past_key_values ({type(cache).__name__}) cannot hold a recurrent state; pass a DynamicCache(),"
            " or None to let the model build its own."
        )
    for index, layer_type in enumerate(layer_types):
        recurrent = layer_type == "linear_attention"
        if index == len(cache.layers):
            cache.layers.append(RecurrentStateLayer() if recurrent else DynamicLayer())
        elif recurrent:
            adopt_layer(cache, index)
    return cache


def adopt_layer(cache, index):
    """Puts a `RecurrentStateLayer` into a cache for a stock layer that is still empty; ValueError if it is not."""
    layer = cache.layers[index]
    if isinstance(layer, RecurrentStateLayer):
        return
    if layer.is_initialized if isinstance(layer, CacheLayerMixin) else layer.has_previous_state[0]:
        raise ValueError(
            f"past_key_values already holds a {type(layer).__name__} with content at layer {index}, which is"
            " another model's state; pass a fresh DynamicCache()."
        )
    cache.layers[index] = RecurrentStateLayer()


def continue_cache(cache, layer_types, *, wanted, packed, checkpointing):
    """The cache that a forward reads and fills, or None.

    Args:
        cache: what the caller passed, or None; it is used even where none is `wanted`.
        wanted: `use_cache`.
        packed: whether the batch is packed: it ends in one state per sequence, which no row could continue.
        checkpointing: whether gradient checkpointing trains, where layers run without a cache.

    Raises:
        ValueError: a cache was passed under gradient checkpointing, or with a past for packed input.
    """
    if cache is not None and checkpointing:
        raise ValueError(
            "past_key_values cannot be used while gradient checkpointing trains: the layers would run without it;"
            " call model.eval() or switch gradient checkpointing off."
        )
    if packed and cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "packed input (position_ids that restart, seq_idx or cu_seq_lens_q) cannot continue a cache: it"
            " would be unclear which sequence goes on; run the sequences as rows of a padded batch."
        )
    if packed or checkpointing or not (wanted or cache is not None):
        return None
    return adopt_cache(cache, layer_types)


def count_tokens(cache, shape, mask, device):
    """Counts `shape = (batch, length)` further positions in every recurrent layer; `mask` False is padding."""
    valid = torch.full(shape[:1], shape[1], device=device) if mask is None else mask.sum(1)
    first, *others = (layer for layer in cache.layers if isinstance(layer, RecurrentStateLayer))
    first.advance(shape[1], valid)
    for layer in others:  # one sum on the device, not one a layer
        layer.seen_tokens, layer.valid_tokens = first.seen_tokens, first.valid_tokens


class RecurrentGenerationMixin(GenerationMixin):
    """`generate()` with recurrent states: builds the cache, and refuses by name what cannot work.

    Inside generate() the cache goes by `past_key_values`, also for models that transformers expects to have
    `cache_params` (any class with "mamba" in its name): chunked prefill and continuation only know the first.
    """

    def _update_model_kwargs_for_generation(self, *args, **kwargs):
        return _one_name(super()._update_model_kwargs_for_generation(*args, **kwargs))

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        implementation = generation_config.cache_implementation
        if implementation is not None and not implementation.startswith("dynamic"):
            raise ValueError(
                f"cache_implementation ({implementation!r}) is not available for {type(self).__name__}: its state has"
                " a fixed size and never grows, so there is nothing to preallocate, quantize or offload; leave it out."
            )
        cache = _one_name(model_kwargs).get("past_key_values")
        if cache is not None and implementation is not None:
            raise ValueError(
                f"cache_implementation ({implementation!r}) builds a cache, but past_key_values already holds one;"
                " pass only one of the two."
            )
        if cache is not None or generation_config.use_cache:
            model_kwargs["past_key_values"] = adopt_cache(cache, self.config.layer_types)
            if cache is not None:
                cache._is_user_defined = True  # generate() leaves it filled


def _one_name(model_kwargs):
    if (cache := model_kwargs.pop("cache_params", None)) is not None:
        model_kwargs["past_key_values"] = cache
    return model_kwargs


__all__ = [
    "RecurrentGenerationMixin",
    "RecurrentStateLayer",
    "adopt_cache",
    "adopt_layer",
    "continue_cache",
    "count_tokens",
]
