"""A recurrent router for mixtures of experts that exist already (arXiv 2408.06793, section 3).

The router of every layer with experts gets a term from a state that each token carries up the layers:

    s_i = W_i x_i + W2_i h_i,   h_i = cell(W1_i x_i, h_{i-1}),   h_0 = 0

with W_i the router that was there and one cell for all layers. With W2_i = 0, as it starts, the model is what it was.
The state lives inside one forward pass. Routers and layers become instances of subclasses of their own classes, so
that whatever finds them by class (router logits, balancing losses, sharding policies) still does.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .._compat import register_recorded_outputs
from .checkpointing import refuse_reentrant
from .recurrent_router_config import RecurrentRouterConfig
from .recurrent_router_layer import RecurrentRouter

CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell}
MODULES = ("rmoe_cell", "rmoe_input_proj", "rmoe_score")  # what is added: to the trunk, and to every router


class RoutingState:
    """What the tokens of one forward pass carry: a state for each layer with experts that has been passed.

    States are kept by layer and set once, so that a layer that is computed again in the backward pass (gradient
    checkpointing) reads what it read at first. No mapping, or tools that move arguments between devices would copy it.
    """

    def __init__(self, cell):
        self.cell = cell
        self.states = {}

    def below(self, index, device):
        return None if index == 0 else self.states[index - 1].to(device)


class RouterScore(nn.Linear):
    """W2. Zero in mode "residual", so that it changes nothing at first."""

    starts_at_zero = True


class RecurrentRouterGate:
    """In front of a family's router class: `W x + W2 h` in the place of `W x`."""

    rmoe_state = None  # of the forward pass that is running

    def forward(self, hidden_states):
        if self.rmoe_state is None:
            raise RuntimeError(
                f"{type(self).__name__} was called outside its model and has no routing state; call the model."
            )
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        with torch.autocast(hidden_states.device.type, enabled=False):
            u = self.rmoe_input_proj(hidden_states.to(self.rmoe_input_proj.weight.dtype))
        base = F.linear(hidden_states, self.weight) if self.rmoe_mode == "residual" else None
        state = self.rmoe_state
        h, logits, weights, experts = self.rmoe_route(
            u,
            state.below(self.rmoe_index, u.device),
            tuple(parameter.to(u.device) for parameter in state.cell),
            self.rmoe_score.weight,
            self.top_k,
            base,
            getattr(self, "norm_topk_prob", True),
        )
        state.states.setdefault(self.rmoe_index, h)
        # Families that may skip the normalisation give weights in the dtype of the logits, the others in float32.
        dtype = hidden_states.dtype if base is None else base.dtype
        return logits.to(dtype), weights.to(dtype) if hasattr(self, "norm_topk_prob") else weights, experts


class RecurrentRouterLayer:
    """In front of a family's decoder layer: hands the state of this forward pass to its router.

    It does so inside `forward`, because that is what gradient checkpointing computes again; by then another forward
    pass may have begun.
    """

    def forward(self, *args, rmoe_state=None, **kwargs):
        self.mlp.gate.rmoe_state = rmoe_state
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.mlp.gate.rmoe_state = None


class RecurrentRouterModel:
    """In front of a family's model class: one whose configuration says how its routers remember."""

    trunk_class = None  # ours for the trunk of a head
    _keep_in_fp32_modules_strict = [*MODULES]

    @classmethod
    def _can_set_experts_implementation(cls):
        return True  # transformers looks for its decorator in the file of the class, which is the family's

    def post_init(self):
        trunk = trunk_of(self)
        if not hasattr(trunk, "rmoe_cell"):  # before the initialisation, which then finds what is added
            change_class(trunk, self.trunk_class or type(self))
            add_recurrent_router(self, RecurrentRouterConfig(**self.config.recurrent_router), check=False)
        super().post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.RNNCellBase):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, RouterScore) and module.starts_at_zero:
            init.zeros_(module.weight)


def change_class(model, cls):
    """Makes a model an instance of `cls`, which transformers then asks for what it can return, router logits say."""
    model.__class__ = cls
    register_recorded_outputs(model)


def trunk_of(model):
    """The module with the decoder layers, in the model or the model itself; None if there is none."""
    for module in (getattr(model, "base_model", model), model):
        if isinstance(getattr(module, "layers", None), nn.ModuleList):
            return module
    return None


def sparse_layers(trunk):
    """The layers that have a router and experts."""
    return [
        layer
        for layer in trunk.layers
        if hasattr(getattr(layer, "mlp", None), "gate") and hasattr(layer.mlp, "experts")
    ]


def add_recurrent_router(model, config, check=True):
    """Adds the modules of a recurrent router to a model, in place; `check` tries its routers first.

    Raises:
        ValueError: no layer has a router and experts; there is one already; a router works in another way.
    """
    trunk = trunk_of(model)
    layers = [] if trunk is None else sparse_layers(trunk)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no layer with a router (mlp.gate) and experts (mlp.experts);"
            " take a mixture of experts such as Mixtral, OLMoE or Qwen3-MoE."
        )
    if hasattr(trunk, "rmoe_cell"):
        raise ValueError(f"model ({type(model).__name__}) has a recurrent router; detach_recurrent_router it first.")
    for layer in layers if check else ():
        _check_router(layer.mlp.gate)
    size = config.router_hidden_size
    weight = layers[0].mlp.gate.weight
    factory = {"device": weight.device, "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32}
    trunk.rmoe_cell = CELLS[config.router_type](size, size, **factory)
    std = getattr(model.config, "initializer_range", 0.02)
    for index, layer in enumerate(layers):
        gate = layer.mlp.gate
        factory["device"] = gate.weight.device
        gate.rmoe_input_proj = nn.Linear(gate.hidden_dim, size, bias=False, **factory)
        gate.rmoe_score = RouterScore(size, gate.num_experts, bias=False, **factory)
        gate.rmoe_score.starts_at_zero = config.mode == "residual"
        nn.init.normal_(gate.rmoe_input_proj.weight, std=std)
        nn.init.normal_(gate.rmoe_score.weight, std=0.0 if gate.rmoe_score.starts_at_zero else std)
        gate.rmoe_route = RecurrentRouter()
        gate.rmoe_index, gate.rmoe_mode = index, config.mode
        _put_in_front(gate, RecurrentRouterGate)
        _put_in_front(layer, RecurrentRouterLayer)
    trunk.rmoe_hook = trunk.register_forward_pre_hook(_begin, with_kwargs=True)


def remove_recurrent_router(model):
    """Takes out what `add_recurrent_router` added."""
    trunk = trunk_of(model)
    trunk.rmoe_hook.remove()
    del trunk.rmoe_hook, trunk.rmoe_cell
    for layer in sparse_layers(trunk):
        gate = layer.mlp.gate
        for name in ("rmoe_input_proj", "rmoe_score", "rmoe_route", "rmoe_index", "rmoe_mode", "rmoe_state"):
            if name in vars(gate) or name in gate._modules:
                delattr(gate, name)
        for module in (gate, layer):
            module.__class__ = type(module).__mro__[2]


def _put_in_front(module, mixin):
    """Makes `module` an instance of a subclass of its class that goes by the same name, as sharding policies and
    device maps find layers by it."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _begin(trunk, args, kwargs):
    refuse_reentrant(trunk.layers[0])
    cell = trunk.rmoe_cell
    kwargs["rmoe_state"] = RoutingState((cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
    return args, kwargs


def _check_router(gate):
    """That a router is softmax, top-k, perhaps normalised, and nothing else; by trying it."""
    known = all(hasattr(gate, name) for name in ("top_k", "num_experts", "hidden_dim", "weight"))
    if known and not gate.weight.is_meta:
        x = torch.randn(4, gate.hidden_dim, generator=torch.Generator().manual_seed(0))
        x = x.to(gate.weight.device, gate.weight.dtype)
        with torch.no_grad():
            got = gate(x)
            logits = F.linear(x, gate.weight)
            weights, experts = logits.float().softmax(-1).topk(gate.top_k, -1)
            if getattr(gate, "norm_topk_prob", True):
                weights = weights / weights.sum(-1, keepdim=True)
        want = logits, weights.to(logits.dtype) if hasattr(gate, "norm_topk_prob") else weights, experts
        known = (
            isinstance(got, tuple)
            and len(got) == 3
            and all(a.shape == b.shape and torch.allclose(a, b) for a, b in zip(got, want, strict=True))
        )
    if not known:
        raise ValueError(
            f"the router {type(gate).__name__} does not choose by softmax and top-k of a linear score;"
            " only such routers (Mixtral's, OLMoE's, Qwen3-MoE's) can be given a memory."
        )
