"""Training linear state spaces: their dynamics take a smaller learning rate and no weight decay.

S4D (arXiv 2206.11893, appendix) and S5 (arXiv 2208.04933, appendix) train A, B and the time steps apart from the rest:
a step of the usual size moves a time constant by orders of magnitude, and decay pulls all of them towards one value.
"""

from __future__ import annotations

import re

from transformers import Trainer

LEARNING_RATE = 1e-3
_DYNAMICS = re.compile(r"(^|\.)mixer\.(log_dt|log_A_real|A_imag|B)$")


def state_space_groups(model, learning_rate, weight_decay=0.0, state_space_learning_rate=LEARNING_RATE):
    """Parameter groups for an optimizer of a model with S4D or S5 layers.

    Args:
        model: any module that contains S4D or S5 layers.
        learning_rate, weight_decay: of everything but the dynamics; biases, norms and the skips D do not decay.
        state_space_learning_rate: upper limit of the learning rate of log_dt, A and B, which never decay.

    Returns:
        Up to three dictionaries with "params", "lr" and "weight_decay", frozen parameters and empty groups left out.

    >>> import torch
    >>> from undersong.modeling.s4d.configuration_s4d import S4DConfig
    >>> from undersong.modeling.s4d.modeling_s4d import S4DModel
    >>> model = S4DModel(S4DConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    >>> groups = state_space_groups(model, learning_rate=4e-3, weight_decay=0.05)
    >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups]
    [(3, 0.004, 0.05), (6, 0.004, 0.0), (3, 0.001, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    decayed, plain, dynamics = [], [], []
    for name, parameter in model.named_parameters():
        if _DYNAMICS.search(name):
            group = dynamics
        else:
            group = decayed if parameter.dim() > 1 else plain  # vectors: biases, norms and D
        if parameter.requires_grad:
            group.append(parameter)
    slow = min(learning_rate, state_space_learning_rate)
    groups = [(decayed, learning_rate, weight_decay), (plain, learning_rate, 0.0), (dynamics, slow, 0.0)]
    return [{"params": group, "lr": lr, "weight_decay": decay} for group, lr, decay in groups if group]


class StateSpaceTrainerMixin:
    """Gives log_dt, A and B of S4D and S5 layers a learning rate of their own, and no weight decay, in a `Trainer`.

    The scheduler scales both learning rates alike. Skips D are spared from weight decay as well.

    Args:
        state_space_learning_rate: its upper limit; it is never above `args.learning_rate`. All other arguments are
            `Trainer`'s.

    >>> import tempfile
    >>> from transformers import TrainingArguments
    >>> from undersong.modeling.s5.configuration_s5 import S5Config
    >>> from undersong.modeling.s5.modeling_s5 import S5ForCausalLM
    >>> model = S5ForCausalLM(S5Config(vocab_size=11, hidden_size=8, state_size=4, num_hidden_layers=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     arguments = TrainingArguments(folder, learning_rate=5e-3, weight_decay=0.1, use_cpu=True)
    ...     optimizer = StateSpaceTrainer(model, arguments).create_optimizer()
    >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    [(4, 0.005, 0.1), (6, 0.005, 0.0), (4, 0.001, 0.0)]
    """

    def __init__(self, *args, state_space_learning_rate: float = LEARNING_RATE, **kwargs):
        self.state_space_learning_rate = state_space_learning_rate
        super().__init__(*args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not (_DYNAMICS.search(name) or name.endswith("mixer.D"))]

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        names = (self.model if model is None else model).named_parameters()
        dynamics = {id(parameter) for name, parameter in names if _DYNAMICS.search(name)}
        for group in list(optimizer.param_groups):
            taken = [parameter for parameter in group["params"] if id(parameter) in dynamics]
            if taken:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in dynamics]
                limited = {"lr": min(group["lr"], self.state_space_learning_rate), "weight_decay": 0.0}
                optimizer.add_param_group({**group, **limited, "params": taken})
        return optimizer


class StateSpaceTrainer(StateSpaceTrainerMixin, Trainer):
    """`Trainer` with `StateSpaceTrainerMixin`; mix the latter into another Trainer yourself."""


__all__ = ["StateSpaceTrainer", "StateSpaceTrainerMixin", "state_space_groups"]
