"""Fine-tuning Mamba: which parameters weight decay spares, and initial states that are learned.

Packed batches need nothing of their own: `DataCollatorWithFlattening(return_seq_idx=True)` with any `Trainer` and a
`FastMamba*ForCausalLM` gives the loss of the unpacked rows. A learned initial state h_0 is to a state space model what
a prefix is to attention (Kang et al., "State-offset Tuning", arXiv 2503.03499): the state that a text would have left.
"""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import Trainer

from ..modeling.state_file import write_tensors

# A_log and dt_bias are logarithms of rates: pulled towards 0 they move every time constant. The authors' code marks
# A_log, D and dt_bias as free of weight decay. Adapters put a `base_layer` into the names of what they wrap.
_NO_DECAY = re.compile(r"(^|\.)(A_log|D|dt_bias|(dt_proj|conv1d)(\.base_layer)?\.bias)$")


class MambaTrainerMixin:
    """Spares `A_log`, `D`, `dt_bias`, `dt_proj.bias` and `conv1d.bias` from weight decay in a `Trainer`.

    Works on transformers' Mamba types and their relatives, on ours, and under PEFT. Every other parameter is treated
    as `Trainer` treats it.

    >>> import tempfile
    >>> from transformers import MambaConfig, MambaForCausalLM, TrainingArguments
    >>> model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = TrainingArguments(folder, weight_decay=0.1, use_cpu=True)
    ...     names = [set(of(model, arguments).get_decay_parameter_names(model)) for of in (Trainer, MambaTrainer)]
    >>> sorted(names[0] - names[1])
    ['backbone.layers.0.mixer.A_log', 'backbone.layers.0.mixer.D']
    """

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not _NO_DECAY.search(name)]


class MambaTrainer(MambaTrainerMixin, Trainer):
    """`Trainer` with `MambaTrainerMixin`; mix the latter into another Trainer yourself."""


@contextmanager
def allow_out_proj_adapters():
    """Inside this block PEFT takes `out_proj` of our Mamba classes as a target of LoRA and its kind.

    PEFT refuses it for all Mamba types, since the fused training kernel of transformers' classes reads the weight past
    the adapter. Ours call `out_proj` as a module, in training too. Only making and loading adapters needs the block.

    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import MambaConfig
    >>> from undersong import FastMambaForCausalLM
    >>> model = FastMambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    >>> with allow_out_proj_adapters():
    ...     model = get_peft_model(model, LoraConfig(target_modules=["in_proj", "out_proj"]))
    >>> len([name for name, _ in model.named_parameters() if "out_proj.lora_A" in name])
    1
    """
    from peft.tuners import tuners_utils

    check = tuners_utils._check_lora_target_modules_mamba

    def checked(peft_config, model, target_name):
        if target_name != "out_proj" or not _found_mixers(model):
            check(peft_config, model, target_name)

    tuners_utils._check_lora_target_modules_mamba = checked
    try:
        yield
    finally:
        tuners_utils._check_lora_target_modules_mamba = check


class InitialState(nn.Module):
    """A mixer's recurrence that starts every sequence in a learned state instead of zeros.

    The parameter `initial_state` is `[channels, state]` (Mamba) or `[heads, head_dim, state]` (Mamba-2). A cache that
    already holds a state goes on from that one.
    """

    def __init__(self, recurrence, initial_state, also=()):
        super().__init__()
        self.recurrence = recurrence
        self.also = list(also)  # names of the mixer's parameters that are saved with it
        self.initial_state = nn.Parameter(initial_state)

    def forward(self, x, *inputs, initial_state=None, cu_seqlens=None, **options):
        if initial_state is None:
            rows = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            initial_state = self.initial_state.expand(rows, *self.initial_state.shape)
        return self.recurrence(x, *inputs, initial_state=initial_state, cu_seqlens=cu_seqlens, **options)


def add_state_tuning(model, also=()):
    """Gives every mixer a learned initial state, zero at first, and freezes the rest of the model; in place.

    A layer has as many of these parameters as its state has entries, and they cost nothing in generation. Under PEFT
    nothing is frozen, so adapters train beside the states.

    Args:
        model: a model of `FastMamba*` classes (`enable_fast_mamba` makes one), bare or under PEFT.
        also: parameters of the mixers to train and save as well, such as `("A_log", "D", "dt_bias")`, which adapters
            of PEFT cannot reach where they are vectors.

    Returns:
        The model.

    Raises:
        ValueError: no mixer to tune, a second call, or a name that is no parameter of the mixers.

    >>> from transformers import MambaConfig
    >>> from undersong import FastMambaForCausalLM
    >>> model = FastMambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1))
    >>> [(name, tuple(p.shape)) for name, p in add_state_tuning(model).named_parameters() if p.requires_grad]
    [('backbone.layers.0.mixer.recurrence.initial_state', (16, 4))]
    """
    mixers = _mixers(model)
    if _has_states(mixers):
        raise ValueError(f"model ({type(model).__name__}) already has learned initial states; add them once.")
    for name in also:
        for mixer in mixers:
            _parameter(mixer, name)
    if not hasattr(model, "peft_config"):
        model.requires_grad_(False)
    for mixer in mixers:
        mixer.recurrence = InitialState(mixer.recurrence, _zero_state(mixer), also)
        for name in also:
            _parameter(mixer, name).requires_grad_(True)
    return model


def save_state_tuning(model, path, *, overwrite=False) -> Path:
    """Writes what `add_state_tuning` made trainable to one safetensors file, without the rest of the model.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        ValueError: the model has no learned initial states.
    """
    mixers = _mixers(model)
    if not _has_states(mixers):
        raise ValueError(f"model ({type(model).__name__}) has no learned initial states; call add_state_tuning first.")
    names = mixers[0].recurrence.also
    tensors = {key: p.detach().cpu().contiguous() for key, p in _tuned(mixers, names).items()}
    header = {"state_tuning": json.dumps(names), "model_type": model.config.model_type}
    return write_tensors(tensors, path, header, overwrite)


def load_state_tuning(model, path):
    """Reads what `save_state_tuning` wrote into a model, in place; adds the initial states if the model has none.

    Parameters trained `also` replace the model's own.

    Returns:
        The model.

    Raises:
        ValueError: the file holds something else, or states of another size or number of layers.
    """
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
        if "state_tuning" not in header:
            raise ValueError(f"path ({path}) holds no learned initial states; write it with save_state_tuning.")
        loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    names = json.loads(header["state_tuning"])
    mixers = _mixers(model)
    if not _has_states(mixers):
        add_state_tuning(model, also=names)
    own = _tuned(mixers, names)
    sizes = [{key: tuple(tensor.shape) for key, tensor in side.items()} for side in (loaded, own)]
    if sizes[0] != sizes[1]:
        key = min(key for key in sizes[0].keys() | sizes[1].keys() if sizes[0].get(key) != sizes[1].get(key))
        raise ValueError(
            f"path ({path}), written for a {header['model_type']} model, has {key} of shape {sizes[0].get(key)} where"
            f" the model ({type(model).__name__}) has {sizes[1].get(key)}; load it into the model it was trained on."
        )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(loaded[key])
    for mixer in mixers:
        mixer.recurrence.also = names
    return model


def _found_mixers(model):
    # PEFT gives wrappers the attributes of what they wrap, so a mixer is what holds the op itself
    return [m for m in model.modules() if "recurrence" in m._modules and not isinstance(m, InitialState)]


def _mixers(model):
    found = _found_mixers(model)
    if not found:
        raise ValueError(
            f"model ({type(model).__name__}) has no mixer of undersong to tune; make it one with"
            " undersong.enable_fast_mamba(model), or load it as FastMambaForCausalLM."
        )
    return found


def _has_states(mixers):
    return isinstance(mixers[0].recurrence, InitialState)


def _zero_state(mixer):
    if mixer.A_log.dim() == 2:  # Mamba: [channels, state]
        shape = mixer.A_log.shape
    else:
        shape = (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
    dtype = torch.promote_types(mixer.A_log.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=mixer.A_log.device)


def _parameter(mixer, name):
    parent, _, leaf = name.rpartition(".")
    try:
        module = mixer.get_submodule(parent)
        return getattr(module, "base_layer", module).get_parameter(leaf)
    except AttributeError:
        usual = [known for known, _ in mixer.named_parameters(recurse=False)]
        raise ValueError(
            f"also ({name!r}) must name parameters of a {type(mixer).__name__}, such as {', '.join(usual)}."
        ) from None


def _tuned(mixers, names):
    """Key in the file -> parameter."""
    found = {}
    for index, mixer in enumerate(mixers):
        found[f"mixers.{index}.initial_state"] = mixer.recurrence.initial_state
        found |= {f"mixers.{index}.{name}": _parameter(mixer, name) for name in names}
    return found
