"""Training Mamba: weight decay spares the rates, packed equals unpacked, and initial states can be learned alone."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import (
    DataCollatorWithFlattening,
    FalconMambaForCausalLM,
    Mamba2ForCausalLM,
    MambaForCausalLM,
    Trainer,
    TrainingArguments,
)

from tests.common.cases import build, make_inputs
from undersong import enable_fast_mamba
from undersong.registry import ARCHITECTURES
from undersong.training import (
    MambaTrainer,
    add_state_tuning,
    load_state_tuning,
    save_state_tuning,
)

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [ARCHITECTURES["mamba"], ARCHITECTURES["mamba2"]]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
STOCK = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}
LENGTHS = [9, 3, 14, 1, 6]


def model_of(row, **changes):
    return build(row, "AutoModelForCausalLM", **changes)


def trainer_of(folder, model, rows=None, cls=MambaTrainer, **options):
    options = {
        "per_device_train_batch_size": 5,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | options
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    return cls(model, TrainingArguments(str(folder), **options), train_dataset=rows, data_collator=collator)


def texts(vocab=99, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, vocab, (n,), generator=generator).tolist()} for n in lengths]


def padded(rows, side):
    """`input_ids`, `attention_mask` and `labels` of rows of different lengths."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        begin = longest - len(row["input_ids"]) if side == "left" else 0
        ids[index, begin : begin + len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[index, begin : begin + len(row["input_ids"])] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels.scatter_(1, mask.argmax(1, keepdim=True), -100)  # the first token has nothing to be predicted from
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# weight decay


def decayed(folder, model, cls=MambaTrainer):
    trainer = trainer_of(folder, model, cls=cls, weight_decay=0.1, optim="adamw_torch")
    trainer.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in trainer.optimizer.param_groups
    }
    return groups[0.1], groups[0.0]


@every_row
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_rates_and_offsets_do_not_decay_and_everything_else_does_as_before(row, stock, tmp_path):
    model = STOCK[row.model_type](row.config_class()(**row.tiny)) if stock else model_of(row)
    spared = re.compile(r"mixer\.(A_log|D|dt_bias|dt_proj\.bias|conv1d\.bias)$")
    decay, free = decayed(tmp_path, model)
    before, _ = decayed(tmp_path, model, cls=Trainer)
    assert {name for name, _ in model.named_parameters()} == decay | free
    assert before - decay == {name for name in before if spared.search(name)} != set()
    assert decay < before
    assert not [name for name in decay if spared.search(name)]
    assert {name.split("mixer.")[1] for name in decay if "layers.1.mixer" in name} >= {
        "in_proj.weight",
        "conv1d.weight",
    }


def test_adapters_around_the_parameters_do_not_hide_them(tmp_path):
    model = get_peft_model(
        model_of(ROWS[0]),
        LoraConfig(
            target_modules=["in_proj", "dt_proj"], target_parameters=["mixer.A_log"], modules_to_save=["norm_f"]
        ),
    )
    model.requires_grad_(True)
    decay, free = decayed(tmp_path, model)
    assert [name for name in free if name.endswith("base_layer.A_log")]
    assert [name for name in free if name.endswith("dt_proj.base_layer.bias")]
    assert [name for name in decay if "lora_A" in name]
    assert not [name for name in decay if name.endswith(("A_log", ".D", ".bias"))]


# packing


@every_row
@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_loss_and_gradients_equal_the_padded_batchs(row, side):
    model, rows = model_of(row).train(), texts()
    packed = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(rows)
    assert packed["input_ids"].shape == (1, sum(LENGTHS))

    def run(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}

    (loss, gradients), (want, want_gradients) = run(packed), run(padded(rows, side))
    assert loss == pytest.approx(want, abs=1e-5)
    for name, gradient in want_gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        assert (gradients[name] - gradient).abs().max().item() <= 1e-5 * max(scale, 1.0), name
    # packing matters: read as one text, the same tokens have another loss
    assert abs(model(input_ids=packed["input_ids"], labels=packed["labels"]).loss.item() - want) > 1e-3


@every_row
def test_trainer_with_packed_batches_takes_the_steps_of_padded_batches(row, tmp_path):
    rows = texts(lengths=LENGTHS * 2)
    trainer = trainer_of(tmp_path, model_of(row), rows, max_steps=2)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda features: seen.append(features) or collate(features)
    trainer.train()

    model = model_of(row).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for features in seen[:2]:
        losses.append(model(**padded(features, "right")).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([loss.item() for loss in losses], abs=1e-4)  # Trainer rounds what it logs
    for (name, got), want in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=name)
    assert not torch.allclose(model.lm_head.weight, model_of(row).lm_head.weight, atol=1e-4)


# learned initial states


def tuned(row, **changes):
    """A model whose initial states are far from zero."""
    model = add_state_tuning(model_of(row, dtype=torch.float64, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@every_row
def test_states_start_at_zero_and_are_all_that_trains(row):
    plain, model = model_of(row), add_state_tuning(model_of(row))
    inputs = make_inputs(model, 2, 7)
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
    shape = {"mamba": (64, 8), "mamba2": (8, 8, 8)}[row.model_type]
    found = trainable(model)
    assert [tuple(p.shape) for p in found.values()] == [shape, shape]
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in found.values())


@every_row
def test_every_sequence_starts_in_the_learned_state_however_it_is_laid_out(row):
    model, rows = tuned(row), texts()
    alone = [model(input_ids=torch.tensor([r["input_ids"]])).logits[0] for r in rows]
    plain = model_of(row, dtype=torch.float64)
    assert (alone[0] - plain(input_ids=torch.tensor([rows[0]["input_ids"]])).logits[0]).abs().max() > 1e-3

    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    torch.testing.assert_close(model(**packed).logits[0], torch.cat(alone))
    for side in ("left", "right"):
        batch = padded(rows, side)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(logits[batch["attention_mask"].bool()], torch.cat(alone))


@every_row
@pytest.mark.parametrize("split", [1, 4])
def test_a_cache_goes_on_from_its_own_state(row, split):
    model = tuned(row)
    ids = make_inputs(model, 2, 9)["input_ids"]
    first = model(input_ids=ids[:, :split], use_cache=True)
    second = model(input_ids=ids[:, split:-1], past_key_values=first.past_key_values, use_cache=True)
    last = model(input_ids=ids[:, -1:], past_key_values=second.past_key_values)
    logits = torch.cat([first.logits, second.logits, last.logits], 1)
    torch.testing.assert_close(logits, model(input_ids=ids).logits)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@every_row
def test_training_moves_the_states_and_nothing_else(row, tmp_path):
    model = add_state_tuning(model_of(row), also=("D",))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_of(tmp_path, model, texts(), max_steps=3, learning_rate=1.0)
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.endswith(("initial_state", "mixer.D"))}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@every_row
def test_what_was_tuned_is_saved_alone_and_loads_into_a_fresh_model(row, tmp_path):
    model = add_state_tuning(model_of(row), also=("A_log", "D", "conv1d.bias"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    path = save_state_tuning(model, tmp_path / "tuned.safetensors")
    size = sum(p.numel() * p.element_size() for p in trainable(model).values())
    assert path.stat().st_size < size + 2000
    fresh = load_state_tuning(model_of(row), path)
    inputs = make_inputs(model, 2, 7)
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    assert trainable(fresh).keys() == trainable(model).keys()

    again = load_state_tuning(add_state_tuning(model_of(row)), path)  # into a model that has states already
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    with pytest.raises(FileExistsError, match=r"tuned.safetensors\) exists; pass overwrite=True"):
        save_state_tuning(again, path)
    save_state_tuning(again, path, overwrite=True)
    assert torch.equal(load_state_tuning(model_of(row), path)(**inputs).logits, model(**inputs).logits)


@every_row
def test_states_train_beside_adapters(row, tmp_path):
    model = get_peft_model(model_of(row), LoraConfig(r=2, target_modules=["in_proj", "x_proj"]))
    add_state_tuning(model, also=("dt_bias" if row.model_type == "mamba2" else "dt_proj.bias",))
    kinds = {"lora_A", "lora_B", "initial_state", "bias"}
    assert {next((kind for kind in kinds if kind in name), name) for name in trainable(model)} == kinds
    trainer_of(tmp_path, model, texts(), max_steps=2, learning_rate=0.5).train()
    inputs = make_inputs(model.base_model.model, 2, 7)
    model.eval()
    want = model(**inputs).logits
    save_state_tuning(model, tmp_path / "tuned")
    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    fresh = PeftModel.from_pretrained(model_of(row), str(tmp_path / "adapter"))
    fresh = load_state_tuning(fresh, tmp_path / "tuned").eval()
    torch.testing.assert_close(fresh(**inputs).logits, want)
    merged = fresh.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, want, rtol=1e-4, atol=1e-4)
    save_state_tuning(merged, tmp_path / "merged")


@pytest.mark.parametrize("stock", [MambaForCausalLM, FalconMambaForCausalLM], ids=lambda cls: cls.__name__)
def test_models_upgraded_in_place_can_be_tuned(stock):
    config = stock.config_class(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    model = add_state_tuning(enable_fast_mamba(stock(config)), also=("A_log",))
    ids = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"initial_state", "A_log"}
    assert all(p.grad.abs().max() > 0 for p in trainable(model).values())


def test_models_and_names_that_cannot_be_tuned_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"model \(MambaForCausalLM\) has no mixer of undersong to tune"):
        add_state_tuning(MambaForCausalLM(ROWS[0].config_class()(**ROWS[0].tiny)))
    model = model_of(ROWS[0])
    for name in ("dt_bias", "nothing.weight"):
        with pytest.raises(ValueError, match=rf"also \('{name}'\) must name parameters of a FastMambaMixer, such as"):
            add_state_tuning(model, also=(name,))
    assert all(p.requires_grad for p in model.parameters()), "a refused call leaves the model as it was"
    with pytest.raises(ValueError, match="has no learned initial states; call add_state_tuning first"):
        save_state_tuning(model, tmp_path / "tuned")
    path = save_state_tuning(add_state_tuning(model), tmp_path / "tuned")
    with pytest.raises(ValueError, match="already has learned initial states; add them once"):
        add_state_tuning(model)
    with pytest.raises(ValueError, match=r"a mamba model, has mixers.0.initial_state of shape \(64, 8\) where the"):
        load_state_tuning(model_of(ROWS[1]), path)
    with pytest.raises(ValueError, match=r"has mixers.1.initial_state of shape \(64, 8\) where .* has None"):
        load_state_tuning(model_of(ROWS[0], num_hidden_layers=1), path)
    save_file({"h": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other\) holds no learned initial states; write it with"):
        load_state_tuning(model, tmp_path / "other")
