"""PEFT on Mamba: every projection can be adapted, trained, merged and saved, `out_proj` included."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Mamba2ForCausalLM, MambaForCausalLM

from tests.common.cases import build, make_inputs
from undersong.registry import ARCHITECTURES
from undersong.training import allow_out_proj_adapters

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [ARCHITECTURES["mamba"], ARCHITECTURES["mamba2"]]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
STOCK = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
TARGETS = [
    (row, target)
    for row in ROWS
    for target in ("in_proj", "x_proj", "dt_proj", "out_proj")
    if row.model_type == "mamba" or target not in ("x_proj", "dt_proj")
]
every_target = pytest.mark.parametrize(
    ("row", "target"), TARGETS, ids=lambda x: x if isinstance(x, str) else x.model_type
)


def base(row):
    return build(row, "AutoModelForCausalLM", dtype=torch.float64)


def adapted(row, target, **options):
    torch.manual_seed(0)
    with allow_out_proj_adapters():
        return get_peft_model(base(row), LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM", **options))


def train(model, inputs, steps=3):
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for _ in range(steps):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def logits(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


@every_target
def test_an_adapter_trains_merges_and_loads(row, target, tmp_path):
    model = adapted(row, target)
    assert {name.split(".lora_")[0].split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        target
    }
    inputs = make_inputs(model.base_model.model, 2, 7)
    before = logits(model, inputs)
    torch.testing.assert_close(before, logits(base(row), inputs), rtol=0, atol=1e-12)
    train(model, inputs)
    after = logits(model, inputs)
    assert (after - before).abs().max() > 1e-3, "the adapter has no effect"
    # in training mode too: no path reads the weight past the adapter
    torch.testing.assert_close(logits(model.train(), inputs), after, rtol=0, atol=1e-12)
    model.eval()

    model.save_pretrained(tmp_path)
    with allow_out_proj_adapters():
        loaded = PeftModel.from_pretrained(base(row), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, inputs), after, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), after, rtol=0, atol=1e-9)


@every_target
def test_one_token_at_a_time_sees_the_adapter(row, target):
    model = adapted(row, target, init_lora_weights=False)
    inputs = make_inputs(model.base_model.model, 2, 5)
    want, cache, steps = logits(model, inputs), None, []
    for token in inputs["input_ids"].split(1, dim=1):
        with torch.no_grad():
            outputs = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), want, rtol=0, atol=1e-9)


@every_row
def test_out_proj_is_allowed_for_our_classes_only_and_only_inside_the_block(row):
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(base(row), LoraConfig(target_modules=["out_proj"]))
    stock = STOCK[row.model_type](row.config_class()(**row.tiny))
    with allow_out_proj_adapters():
        with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
            get_peft_model(stock, LoraConfig(target_modules=["out_proj"]))
        # its weight is an operand of the convolution, in ours too: an adapter around the module would have no effect
        with pytest.raises(ValueError, match="Module 'conv1d' is incompatible with Mamba-based models"):
            get_peft_model(base(row), LoraConfig(target_modules=["conv1d"]))
    with pytest.raises(ValueError, match="Module 'out_proj' is incompatible with Mamba-based models"):
        get_peft_model(base(row), LoraConfig(target_modules=["out_proj"]))


@every_row
def test_default_targets_are_known(row):
    model = get_peft_model(base(row), LoraConfig(task_type="CAUSAL_LM"))
    found = {name.split(".lora_")[0].split(".")[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert found >= set(row.lora_targets)


def test_a_matrix_of_rates_can_be_adapted_as_a_parameter(tmp_path):
    """`target_parameters` reaches A_log of Mamba, `[channels, state]`."""
    row = ROWS[0]
    torch.manual_seed(0)
    model = get_peft_model(base(row), LoraConfig(r=2, target_modules=[], target_parameters=["mixer.A_log"]))
    inputs = make_inputs(model.base_model.model, 2, 7)
    before = logits(model, inputs)
    train(model, inputs)
    after = logits(model, inputs)
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(row), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, inputs), after, rtol=0, atol=1e-9)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), after, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("row", "name"), [(ROWS[0], "mixer.D"), (ROWS[1], "mixer.A_log"), (ROWS[1], "mixer.dt_bias")])
def test_vectors_cannot_which_is_what_state_tuning_is_for(row, name):
    with pytest.raises(ValueError, match="initialized with 1 dimensional Parameter, but only 2d and 3d are supported"):
        get_peft_model(base(row), LoraConfig(target_modules=[], target_parameters=[name]))
