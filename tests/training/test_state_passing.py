"""State passing: windows with carried states are one text to the model, and texts apart to the gradient."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Mamba2ForCausalLM, TrainerCallback, TrainingArguments

from tests.common.cases import CAUSAL_LM, RECURRENT, build, close, name
from undersong import enable_fast_mamba
from undersong.registry import ARCHITECTURES
from undersong.training.mamba import add_state_tuning
from undersong.training.state_passing import StatePassingTrainer
from undersong.training.streaming_documents import DocumentWindows, StreamingDocumentCollator

pytestmark = pytest.mark.usefixtures("one_thread")
every_model = pytest.mark.parametrize("row", [row for row in RECURRENT if row in CAUSAL_LM], ids=name)
MAMBA2 = ARCHITECTURES["mamba2"]
WINDOW = 4


def model_of(row=MAMBA2, **options):
    return build(row, "AutoModelForCausalLM", **options)


def documents(lengths, vocab=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (length,), generator=generator).tolist() for length in lengths]


def trainer_of(folder, model, texts=None, cls=StatePassingTrainer, evaluated=None, window=WINDOW, **options):
    ours = {key: options.pop(key) for key in ("initial_states", "state_dropout", "save_states") if key in options}
    options = {
        "per_device_train_batch_size": 2,
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
    texts = documents([14, 14, 9, 11, 13, 12]) if texts is None else texts
    return cls(
        model,
        TrainingArguments(str(folder), **options),
        train_dataset=DocumentWindows(texts, window=window),
        eval_dataset=None if evaluated is None else DocumentWindows(evaluated, window=window),
        data_collator=StreamingDocumentCollator(),
        **ours,
    )


def batches_of(ids, window=WINDOW):
    """The micro-batches of equally long documents `[rows, length]` read in parallel."""
    windows = DocumentWindows(ids.tolist(), window=window)
    each = len(windows) // len(ids)
    collate = StreamingDocumentCollator()
    return [collate([windows[row * each + step] for row in range(len(ids))]) for step in range(each)]


def text(rows, length, seed=0):
    return torch.tensor(documents([length] * rows, seed=seed))


def logits_of(trainer, batch):
    return trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)[1].logits


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_model
def test_windows_with_passed_states_are_one_long_forward(row, tmp_path):
    model, ids = model_of(row, dtype=torch.float64), text(2, 11)
    trainer = trainer_of(tmp_path, model)
    got = torch.cat(
        [logits_of(trainer, batch)[:, : batch["attention_mask"].sum(1)[0]] for batch in batches_of(ids)], 1
    )
    close(got, model.train()(input_ids=ids).logits)


@every_model
def test_the_first_token_of_a_window_counts(row, tmp_path):
    model, ids = model_of(row, dtype=torch.float64).train(), text(2, 11)
    trainer = trainer_of(tmp_path, model)
    items = torch.tensor(2 * 10)
    total = sum(trainer.compute_loss(model, batch, num_items_in_batch=items).item() for batch in batches_of(ids))
    assert total == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)  # losses are float32


@every_model
def test_gradients_stop_at_the_border_of_a_window(row, tmp_path):
    model, ids = model_of(row, dtype=torch.float64).train(), text(2, 8)
    trainer = trainer_of(tmp_path, model)
    first, second = batches_of(ids)
    trainer.compute_loss(model, first)
    trainer.compute_loss(model, second).backward()
    got = gradients(model)

    model.zero_grad()
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    logits = model(input_ids=ids[:, 4:], past_key_values=cache).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten()).backward()
    want = gradients(model)
    assert got.keys() == want.keys()
    for parameter, gradient in want.items():
        close(got[parameter], gradient, atol=1e-6)  # losses are float32

    model.zero_grad()
    logits = model(input_ids=ids).logits[:, 4:-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten()).backward()
    assert max((got[key] - gradient).abs().max() for key, gradient in gradients(model).items()) > 1e-4


@every_model
def test_a_new_document_begins_anew_and_leaves_other_rows_alone(row, tmp_path):
    model = model_of(row, dtype=torch.float64)
    trainer = trainer_of(tmp_path, model)
    ids, new = text(3, 8), text(3, 4, seed=1)
    first, second = batches_of(ids)
    second["input_ids"][1] = new[1]
    second["doc_start"] = torch.tensor([False, True, False])
    logits_of(trainer, first)
    got = logits_of(trainer, second)
    close(got[1], model.train()(input_ids=new[1:2]).logits[0])
    close(got[[0, 2]], model(input_ids=ids).logits[[0, 2], 4:])


def test_padding_at_the_end_of_a_document_does_not_disturb_the_next_one(tmp_path):
    model = model_of(dtype=torch.float64)
    trainer = trainer_of(tmp_path, model)
    windows = DocumentWindows(documents([6, 8]), window=4)
    collate = StreamingDocumentCollator()
    short, long = ([windows[i] for i in indices] for indices in ((0, 1), (2, 3)))
    for one, two in zip(short, long, strict=True):
        logits = logits_of(trainer, collate([one, two]))
    close(logits[0, :2], model.train()(input_ids=torch.tensor(documents([6, 8])[:1])).logits[0, 4:])
    close(logits[1], model(input_ids=torch.tensor(documents([6, 8])[1:])).logits[0, 4:])


def test_states_advance_with_every_micro_batch(tmp_path):
    ids = text(2, 8)
    trainer = trainer_of(
        tmp_path, model_of(dtype=torch.float64), ids.tolist(), max_steps=1, gradient_accumulation_steps=2
    )
    trainer.train()

    model = model_of(dtype=torch.float64).train()
    cache, total = None, 0.0
    for begin in (0, 4):  # the next window's first token is predicted from the last of this one
        outputs = model(input_ids=ids[:, begin : begin + 4], past_key_values=cache, use_cache=True)
        labels = ids[:, begin + 1 : begin + 5]
        logits = outputs.logits[:, : labels.shape[1]]
        total = total + torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 14
        cache = outputs.past_key_values
        for layer in cache.layers:
            layer.write(**{key: state.detach() for key, state in layer.states.items()})
    total.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), abs=1e-4)  # Trainer rounds what it logs
    for (key, got), want in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, msg=key)


KINDS = [
    {},
    {"initial_states": "passed"},
    {"initial_states": "gaussian", "state_dropout": 0.3},
]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options.get("initial_states", "zero"))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_training_is_the_same_to_the_bit(options, accumulation, tmp_path):
    common = options | {"max_steps": 7, "save_strategy": "steps", "gradient_accumulation_steps": accumulation}
    whole = trainer_of(tmp_path / "whole", model_of(), save_steps=3, **common)
    whole.train()

    def resumed(**changes):
        trainer = trainer_of(tmp_path / "again", model_of(seed=1), save_steps=100, **common | changes)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        return dict(trainer.model.named_parameters())

    got, want = resumed(), dict(whole.model.named_parameters())
    assert all(torch.equal(got[key], value) for key, value in want.items())
    if accumulation == 1 and not options:  # and it is the states that make it so
        (tmp_path / "whole" / "checkpoint-3" / "recurrent_states.safetensors").unlink()
        assert any(not torch.equal(value, want[key]) for key, value in resumed().items())


_PROCESS = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.training.test_state_passing import model_of, trainer_of
options = {{"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ddp_backend": "gloo"}}
trainer_of({folder!r}, model_of(), **options).train()
run = trainer_of({folder!r}, model_of(seed=1), **options)
assert run.args.world_size == 2
run.train(resume_from_checkpoint={folder!r} + "/checkpoint-3")
if run.is_world_process_zero():
    torch.save(run.accelerator.unwrap_model(run.model).state_dict(), {result!r})
"""


@pytest.mark.slow
def test_two_processes_resumed_on_the_way_equal_one(tmp_path):
    whole = trainer_of(tmp_path / "one", model_of(), max_steps=6, per_device_train_batch_size=4)
    whole.train()
    script, result = tmp_path / "script.py", tmp_path / "result.pt"
    root, folder = str(Path(__file__).parents[2]), tmp_path / "two"
    script.write_text(_PROCESS.format(root=root, folder=str(folder), result=str(result)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    files = {path.name for path in (folder / "checkpoint-3").iterdir() if path.name.startswith("recurrent_states")}
    assert files == {"recurrent_states_0.safetensors", "recurrent_states_1.safetensors"}
    torch.testing.assert_close(
        torch.load(result, weights_only=True), whole.model.state_dict(), rtol=1e-4, atol=1e-5
    )  # sums in another order


def test_states_stay_out_of_checkpoints_on_demand(tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, model_of(), save_states=False, **options).train()
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert "rng_state.pth" in names
    assert "recurrent_states.safetensors" not in names


class Evaluate(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True


def test_evaluation_begins_afresh_and_leaves_the_training_as_it_is(tmp_path):
    held_out = documents([9, 7], seed=5)
    plain = trainer_of(tmp_path, model_of(), max_steps=4)
    plain.train()
    watched = trainer_of(tmp_path, model_of(), max_steps=4, evaluated=held_out)
    watched.add_callback(Evaluate())
    watched.train()
    for got, want in zip(watched.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(got, want)
    losses = [entry["eval_loss"] for entry in watched.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4

    watched.remove_callback(Evaluate)
    model = watched.model.eval()
    windows = DocumentWindows(held_out, window=WINDOW)
    sums = [
        model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]), shift_labels=torch.tensor([labels])).loss
        * (torch.tensor(labels) != -100).sum()
        for ids, labels in ((windows[i]["input_ids"], windows[i]["shift_labels"]) for i in range(len(windows)))
    ]
    total = sum(sum_.item() for sum_ in sums) / (8 + 6)
    assert watched.evaluate()["eval_loss"] == pytest.approx(total, abs=1e-4)


def test_epochs_begin_with_new_documents_in_another_order(tmp_path):
    trainer = trainer_of(tmp_path, model_of(), num_train_epochs=2, max_steps=-1)
    seen = []
    compute = trainer.compute_loss

    def watch(model, inputs, **options):
        seen.append((inputs["doc_start"].clone(), inputs["input_ids"].clone()))
        return compute(model, inputs, **options)

    trainer.compute_loss = watch
    trainer.train()
    half = len(seen) // 2
    assert len(seen) == 2 * half == trainer.state.global_step
    assert seen[0][0].all()
    assert seen[half][0].all()
    assert not torch.equal(seen[0][1], seen[half][1])


# other initial states


def final_states(model, ids, layer=0, state="ssm"):
    return model(input_ids=ids, use_cache=True).past_key_values.layers[layer].states[state]


def test_a_dropped_row_begins_in_the_initial_state(tmp_path):
    model, ids = model_of(dtype=torch.float64), text(2, 8)
    trainer = trainer_of(tmp_path, model, state_dropout=1.0)
    first, second = batches_of(ids)
    logits_of(trainer, first)
    close(logits_of(trainer, second), model.train()(input_ids=ids[:, 4:]).logits)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_passed_states_come_from_another_row(rows, tmp_path):
    model, ids = model_of(dtype=torch.float64).train(), text(rows, 4)
    trainer = trainer_of(tmp_path, model, initial_states="passed")
    logits_of(trainer, {"input_ids": ids, "labels": ids})
    new = text(rows, 4, seed=1)
    got = logits_of(trainer, {"input_ids": new, "labels": new})
    wants = [  # after every row of the step before
        model(input_ids=torch.cat([ids[donor].expand(rows, -1), new], 1)).logits[:, 4:] for donor in range(rows)
    ]
    donors = [[d for d in range(rows) if torch.allclose(got[row], wants[d][row])] for row in range(rows)]
    assert sorted(sum(donors, [])) == list(range(rows)), "every state is taken once"
    assert rows == 1 or all(donors[row] != [row] for row in range(rows))


def test_gaussian_states_have_the_statistics_of_final_states_per_head(tmp_path):
    model, ids = model_of().train(), text(64, 12)
    trainer = trainer_of(tmp_path, model, initial_states="gaussian")
    logits_of(trainer, {"input_ids": ids, "labels": ids})
    final = final_states(model, ids)
    drawn = trainer._begin(torch.ones(64, dtype=torch.bool)).layers[0].states
    assert not drawn["conv"].any(), "the window of the convolution is no noise"
    assert drawn["ssm"].shape == final.shape
    for head in range(final.shape[1]):
        want, got = final[:, head].std(), drawn["ssm"][:, head].std()
        assert got.item() == pytest.approx(want.item(), rel=0.1)
        assert drawn["ssm"][:, head].mean().item() == pytest.approx(
            final[:, head].mean().item(), abs=4 * want.item() / math.sqrt(final[:, head].numel())
        )
    assert final.transpose(0, 1).flatten(1).std(1).std() > 0.1 * final.std(), "heads differ"


def test_rows_of_a_text_go_on_whatever_states_others_begin_in(tmp_path):
    model, ids = model_of(dtype=torch.float64), text(2, 8)
    trainer = trainer_of(tmp_path, model, initial_states="gaussian")
    first, second = batches_of(ids)
    logits_of(trainer, first)
    close(logits_of(trainer, second), model.train()(input_ids=ids).logits[:, 4:])


# refusals


def test_a_stock_model_is_refused_until_it_is_ours(tmp_path):
    model = Mamba2ForCausalLM(MAMBA2.config_class()(**MAMBA2.tiny))
    with pytest.raises(
        ValueError, match=r"model \(Mamba2ForCausalLM\) keeps no recurrent state that could be carried"
    ):
        trainer_of(tmp_path, model).train()
    trainer_of(tmp_path, enable_fast_mamba(model)).train()


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"initial_states \('noise'\) must be one of 'zero', 'gaussian', 'passed'"):
        trainer_of(tmp_path, model_of(), initial_states="noise")
    with pytest.raises(ValueError, match=r"state_dropout \(1.5\) must lie in \[0, 1\]"):
        trainer_of(tmp_path, model_of(), state_dropout=1.5)
    with pytest.raises(ValueError, match=r"label_smoothing_factor \(0.1\) must be 0"):
        trainer_of(tmp_path, model_of(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"split_batches \(True\) must be False"):
        trainer_of(tmp_path, model_of(), accelerator_config={"split_batches": True})
    with pytest.raises(ValueError, match="model has learned initial states, which carried states would replace"):
        trainer_of(tmp_path, add_state_tuning(model_of()))


def test_batches_that_cannot_continue_are_refused(tmp_path):
    ids = text(3, 8)
    trainer = trainer_of(tmp_path, model_of())
    with pytest.raises(ValueError, match="batches have no doc_start, so no row could continue another"):
        logits_of(trainer, {"input_ids": ids, "labels": ids})
    first, second = batches_of(ids)
    logits_of(trainer, first)
    with pytest.raises(ValueError, match="the batch has 2 rows but the one before had 3"):
        logits_of(trainer, {key: value[:2] for key, value in second.items()})
    logits_of(trainer, {key: value[:2] for key, value in first.items()})  # new documents need no states


def test_a_state_that_is_no_sum_takes_no_noise(tmp_path):
    trainer = trainer_of(tmp_path, model_of(ARCHITECTURES["aaren"]), initial_states="gaussian")
    with pytest.raises(
        ValueError, match=r"needs a state that is a sum, such as Mamba's, but the model's consists of m"
    ):
        logits_of(trainer, batches_of(text(2, 4))[0])
