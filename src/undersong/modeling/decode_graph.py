"""Decoding through CUDA graphs: the forward of one token is recorded once a batch size, then replayed.

A recurrent model's step is some hundred small kernels, and launching them takes longer than running them. Its state
has a fixed size, so the same recording serves every step of every sequence: nothing grows, nothing is padded.
"""

import contextlib
import functools
import inspect
import weakref

import torch
from transformers.cache_utils import Cache

from .cache import RecurrentStateLayer

WARMUP = 3  # runs before the recording, in which kernels are compiled and libraries take their memory


@contextlib.contextmanager
def decode_graph(model):
    """Inside the block, single-token forwards of `model` are replayed from CUDA graphs; results are those without.

    For models whose cache is made of `RecurrentStateLayer`. Everything that does not fit runs as it always does:
    prefill, training, recorded gradients, autocast, labels, hidden states as outputs. Each batch size is recorded when
    it first comes up (a second, once), and one more time for steps with an `attention_mask`; padding in a step works.

    A cache that went through a graph holds the graph's own buffers, which the next step overwrites: copy the cache
    (`copy.deepcopy`) to keep a moment. Another cache may take over at any step, at the cost of copying the states.
    Weights may change in place between steps, but move, cast or kernelize the model before the block.

    Args:
        model: on a CUDA device; its `forward` is exchanged, and restored at the end whatever happens.

    Yields:
        `DecodeGraphs`, which counts what was recorded, replayed and run eagerly.

    Raises:
        RuntimeError: the model is on another device, where there are no graphs; leave the block out.

    >>> from undersong import AarenConfig, AarenForCausalLM
    >>> model = AarenForCausalLM(AarenConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> if torch.cuda.is_available():
    ...     with decode_graph(model.cuda()) as graphs:
    ...         tokens = model.generate(torch.tensor([[1, 3]]).cuda(), max_new_tokens=20)
    """
    _require_device(model)
    own = vars(model).get("forward")
    graphs = DecodeGraphs(model)
    model.forward = functools.wraps(graphs.forward)(graphs)
    try:
        yield graphs
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


class DecodeGraphs:
    """What stands in for a model's forward inside `decode_graph`.

    Attributes:
        captured, replayed, eager: how often a step was recorded, replayed, and a forward run without a graph.
    """

    def __init__(self, model):
        self.model, self.forward = model, model.forward
        self.captured = self.replayed = self.eager = 0
        self._steps: dict[tuple, _Step] = {}
        self._names = list(inspect.signature(model.forward).parameters)

    def __call__(self, *args, **kwargs):
        kwargs = dict(zip(self._names, args, strict=False)) | kwargs
        found = self._find(kwargs)
        if found is None:
            self.eager += 1
            return self.forward(**kwargs)
        key, tensors, constants, caches = found
        cache = next(iter(caches.values()))
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(self.forward, tensors, constants, list(caches), cache)
            self.captured += 1
        self.replayed += 1
        return step.replay(tensors, cache)

    def _find(self, kwargs):
        """(key, tensors, constants, caches by argument) of a step that fits a graph, or None."""
        if self.model.training or torch.is_grad_enabled() or torch.is_autocast_enabled(self.model.device.type):
            return None
        tensors, constants, caches = {}, {}, {}
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, Cache):
                caches[name] = value
            elif value is None or isinstance(value, bool | int | float | str):
                constants[name] = value
            else:
                return None
        ids = tensors.get("input_ids")
        if ids is None or ids.ndim != 2 or ids.shape[1] != 1 or "labels" in tensors or len(set(caches.values())) != 1:
            return None
        wanted = ("output_hidden_states", "output_attentions")
        if any(constants.get(n, getattr(self.model.config, n, False)) for n in wanted):
            return None
        if constants.get("return_dict") is False or not _holds_a_batch(next(iter(caches.values())), len(ids)):
            return None
        mask = tensors.get("attention_mask")
        if mask is not None:  # it covers everything so far, of which only the last position concerns the step
            if mask.ndim != 2:
                return None
            tensors["attention_mask"] = mask[:, -1:]
        if any(value.device != self.model.device for value in tensors.values()):
            return None
        shapes = tuple((name, value.shape, value.dtype) for name, value in tensors.items())
        states = tuple((name, s.shape, s.dtype) for name, s in next(iter(caches.values())).layers[0].states.items())
        return (shapes, tuple(constants.items()), tuple(caches), states), tensors, constants, caches


class _Step:
    """One recording: its buffers for inputs and states, and whose states the buffers are."""

    def __init__(self, forward, tensors, constants, cache_names, cache):
        self.owner = lambda: None
        with torch.inference_mode(False):  # buffers that may be written in any mode
            self.inputs = {name: torch.zeros_like(value) for name, value in tensors.items()}
            self.states = [{n: torch.empty_like(s) for n, s in layer.states.items()} for layer in cache.layers]
            self.valid = torch.empty_like(cache.layers[0].valid_tokens)
        shadow = Cache(layers=[RecurrentStateLayer() for _ in cache.layers])
        seen = cache.get_seq_length()

        def run():
            for layer, states in zip(shadow.layers, self.states, strict=True):
                layer.write(**states)
                layer.seen_tokens, layer.valid_tokens = seen, self.valid
            outputs = forward(**self.inputs, **constants, **dict.fromkeys(cache_names, shadow))
            for layer, states in zip(shadow.layers, self.states, strict=True):
                for name, buffer in states.items():
                    if layer.states[name] is not buffer:  # the model did not write in place
                        buffer.copy_(layer.states[name])
            self.valid.copy_(shadow.layers[0].valid_tokens)
            return outputs

        # The mask stays zero here: a model that looks for padding, which it cannot do while recording, finds some, and
        # so warms up the kernels that the recording takes.
        for states in self.states:
            for buffer in states.values():
                buffer.zero_()
        for name, value in tensors.items():
            if name != "attention_mask":
                self.inputs[name].copy_(value)
        self.valid.copy_(cache.layers[0].valid_tokens)
        self.run, self.outputs = capture(run, self.valid.device)

    def replay(self, tensors, cache):
        for name, value in tensors.items():
            self.inputs[name].copy_(value)
        self.take(cache)
        self.run()
        for layer in cache.layers:
            layer.seen_tokens += 1
        return type(self.outputs)(**{n: cache if isinstance(v, Cache) else v.clone() for n, v in self.outputs.items()})

    def take(self, cache):
        """Makes the buffers hold the states of `cache`, and `cache` the buffers."""
        pairs = list(zip(cache.layers, self.states, strict=True))
        if cache.layers[0].valid_tokens is self.valid and all(
            layer.states[name] is buffer for layer, states in pairs for name, buffer in states.items()
        ):
            return
        owner = self.owner()
        if owner is not None and owner is not cache:
            self.give_back(owner)
        for layer, states in pairs:
            for name, buffer in states.items():
                if layer.states[name] is not buffer:
                    buffer.copy_(layer.states[name])
            layer.write(**states)
        if cache.layers[0].valid_tokens is not self.valid:
            self.valid.copy_(cache.layers[0].valid_tokens)
        for layer in cache.layers:
            layer.valid_tokens = self.valid
        self.owner = weakref.ref(cache)

    def give_back(self, owner):
        """Gives a cache that held the buffers tensors of its own."""
        valid = self.valid.clone()
        for layer, states in zip(owner.layers, self.states, strict=False):
            for name, buffer in states.items():
                if layer.states.get(name) is buffer:
                    layer.states[name] = buffer.clone()
            if layer.valid_tokens is self.valid:
                layer.valid_tokens = valid


def capture(run, device):
    """Records `run`, which works on buffers, after warming it up; returns (replay, what the recorded run returned)."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
    return graph.replay, outputs


def _holds_a_batch(cache, batch):
    layers = cache.layers
    return (
        bool(layers)
        and all(
            isinstance(layer, RecurrentStateLayer) and layer.states and layer.valid_tokens is not None
            for layer in layers
        )
        and layers[0].batch_size == batch
    )


def _require_device(model):
    if model.device.type != "cuda":
        raise RuntimeError(
            f"decode_graph needs a model on a CUDA device, it is on {model.device}; move it, or leave the block out."
        )


__all__ = ["DecodeGraphs", "decode_graph"]
