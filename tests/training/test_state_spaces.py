"""Which parameters train at which rate, and that nothing is trained twice or forgotten."""

import pytest
import torch
from transformers import TrainingArguments

from undersong.modeling.s4d.configuration_s4d import S4DConfig
from undersong.modeling.s4d.modeling_s4d import S4DForTimeSeriesClassification
from undersong.modeling.s5.configuration_s5 import S5Config
from undersong.modeling.s5.modeling_s5 import S5ForTimeSeriesClassification
from undersong.training import StateSpaceTrainer, state_space_groups

pytestmark = pytest.mark.usefixtures("one_thread")
DYNAMICS = {"s4d": {"log_dt", "log_A_real", "A_imag"}, "s5": {"log_dt", "log_A_real", "A_imag", "B"}}
both = pytest.mark.parametrize("kind", DYNAMICS)


def build(kind):
    torch.manual_seed(0)
    cls, config = {
        "s4d": (S4DForTimeSeriesClassification, S4DConfig),
        "s5": (S5ForTimeSeriesClassification, S5Config),
    }[kind]
    return cls(config(hidden_size=8, state_size=4, num_hidden_layers=2, num_labels=2))


def trainer(kind, folder, **arguments):
    data = [{"past_values": torch.randn(5, 1), "labels": n % 2} for n in range(8)]
    defaults = {
        "learning_rate": 4e-3,
        "weight_decay": 0.1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    arguments = TrainingArguments(folder, **defaults | {"disable_tqdm": True} | arguments)
    return StateSpaceTrainer(build(kind), arguments, train_dataset=data)


def named_groups(model, groups):
    """{last part of the name: (learning rate, weight decay)}, each parameter seen exactly once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            found[names.pop(id(parameter))] = (group["lr"], group["weight_decay"])
    assert not names, f"{sorted(names.values())} are in no group"
    return found


def check(kind, found):
    for name, setting in found.items():
        last = name.rpartition(".")[2]
        if "mixer" in name and last in DYNAMICS[kind]:
            assert setting == (1e-3, 0.0), name
        elif last in ("bias", "D") or "norm" in name:
            assert setting == (4e-3, 0.0), name
        else:
            assert setting == (4e-3, 0.1), name


@both
def test_dynamics_have_a_rate_of_their_own_and_no_decay(kind, tmp_path):
    mine = trainer(kind, tmp_path)
    check(kind, named_groups(mine.model, mine.create_optimizer().param_groups))
    model = build(kind)
    check(kind, named_groups(model, state_space_groups(model, 4e-3, 0.1)))


def test_the_rate_of_the_dynamics_is_a_limit(tmp_path):
    small = trainer("s4d", tmp_path, learning_rate=1e-4)
    assert {group["lr"] for group in small.create_optimizer().param_groups} == {1e-4}
    model = build("s4d")
    groups = state_space_groups(model, 4e-3, state_space_learning_rate=2e-3)
    assert [group["lr"] for group in groups] == [4e-3, 4e-3, 2e-3]


def test_frozen_parameters_are_left_out():
    model = build("s5").requires_grad_(False)
    assert state_space_groups(model, 1e-3) == []


@both
def test_the_schedule_scales_both_rates_and_training_moves_the_dynamics(kind, tmp_path):
    mine = trainer(kind, tmp_path, max_steps=4, lr_scheduler_type="linear", per_device_train_batch_size=4)
    before = {name: parameter.clone() for name, parameter in mine.model.named_parameters()}
    mine.train()
    assert {group["lr"] for group in mine.optimizer.param_groups} == {0.0}
    rates = {group["initial_lr"] for group in mine.optimizer.param_groups}
    assert rates == {4e-3, 1e-3}
    assert not any(torch.equal(parameter, before[name]) for name, parameter in mine.model.named_parameters())


def test_an_optimizer_of_the_user_is_left_alone(tmp_path):
    model = build("s4d")
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none")
    mine = StateSpaceTrainer(model, arguments, optimizers=(own, None))
    assert mine.create_optimizer() is own
    assert [group["lr"] for group in own.param_groups] == [0.5]
