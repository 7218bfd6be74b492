"""DittoTrainer: both losses of one forward pass, however the batch is cut into micro-batches, processes and runs."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

from tests.generation.tiny_llama import tiny_llama
from undersong.metrics.self_reinforcement import self_reinforcement
from undersong.training import DittoDataCollator, DittoLoss, DittoTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
END, VOCAB = 3, 24
TOKENIZER = SimpleNamespace(pad_token_id=0, save_pretrained=lambda folder: None)  # as much as is asked for here


class Recorder(DittoDataCollator):
    """Remembers its batches."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.batches = []

    def __call__(self, features):
        self.batches.append(super().__call__(features))
        return self.batches[-1]


def dataset(count=24, length=40):
    """Rows of sentences of different lengths, so that |M| differs from row to row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCAB, (count, length), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.15] = END
    return [{"input_ids": row.tolist()} for row in rows]


def trainer(folder, model=None, rate=0.5, rows=None, callbacks=None, **options):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | options
    return DittoTrainer(
        model or tiny_llama(VOCAB),
        TrainingArguments(str(folder), **options),
        train_dataset=rows or dataset(),
        data_collator=Recorder(TOKENIZER, [END], rate),
        callbacks=callbacks,
        ditto_loss=DittoLoss(0.5),
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_loss_is_the_models_on_plain_rows_plus_dittos_on_the_others(tmp_path):
    run = trainer(tmp_path)
    batch = run.data_collator(dataset(8))
    pseudo = batch["ditto_unit_len"] > 0
    assert 0 < pseudo.sum() < 8
    run.model.train()
    items = run._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = run.compute_loss(run.model, batch, num_items_in_batch=items)

    plain = batch["input_ids"][~pseudo]
    lm = run.model(plain, labels=plain).loss
    rows = [batch[name][pseudo] for name in ("input_ids", "ditto_prefix_len", "ditto_unit_len")]
    ditto = DittoLoss(0.5)(run.model(rows[0]).logits, *rows)
    torch.testing.assert_close(loss, lm + ditto)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])  # also: batches without a pseudo row, batches without a plain row
def test_accumulated_micro_batches_equal_one_batch(tmp_path, rate):
    whole = trainer(tmp_path, rate=rate)
    whole.train()
    parts = trainer(tmp_path, rate=rate, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weights(whole.model), weights(tiny_llama(VOCAB)), atol=1e-4)
    for a, b in zip(whole.state.log_history[:3], parts.state.log_history[:3], strict=True):
        assert {k: v for k, v in a.items() if k != "grad_norm"} == pytest.approx(
            {k: v for k, v in b.items() if k != "grad_norm"}, rel=1e-4
        )


def test_models_that_do_not_take_num_items(tmp_path):
    # Trainer then averages the micro-batches; only pseudo rows, so that the plain rows' means do not differ
    rows = [row for row in dataset(40) if row["input_ids"].count(END) > 5]
    final = []
    for cut in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        run = trainer(tmp_path, rate=1.0, rows=rows, **cut)
        run.model_accepts_loss_kwargs = False
        run.train()
        final.append(weights(run.model))
    torch.testing.assert_close(*final, rtol=1e-5, atol=1e-6)


def test_logs_are_means_over_tokens(tmp_path):
    run = trainer(tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0, per_device_train_batch_size=8)
    run.train()
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["lm_loss"] + logged["ditto_loss"], rel=1e-4)
    batch = run.data_collator.batches[0]  # the loader fetches one ahead
    terms = run.ditto_loss.terms(
        run.model(batch["input_ids"]).logits,
        batch["input_ids"],
        batch["ditto_prefix_len"],
        batch["ditto_unit_len"],
    )
    assert logged["tp_ratio"] == pytest.approx((terms.probability / terms.baseline).item(), rel=1e-5)


def test_evaluation_is_the_plain_language_modelling_loss(tmp_path):
    run = trainer(tmp_path, rate=1.0, per_device_eval_batch_size=8)
    rows = dataset(8)
    ids = torch.tensor([row["input_ids"] for row in rows])
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(run.model(ids, labels=ids).loss.item(), rel=1e-5)
    assert run.data_collator.rate == 1.0
    assert run.predict(rows).metrics["test_loss"] == pytest.approx(run.model(ids, labels=ids).loss.item(), rel=1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_resumed_run_draws_what_an_uninterrupted_one_does(tmp_path):
    # 24 rows, 4 a step: the run stops inside its second epoch
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 8}

    def run(callbacks=None):
        return trainer(tmp_path, callbacks=callbacks, **options)

    whole = run()
    whole.train()
    run([StopAt(8)]).train()
    rest = run()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    torch.testing.assert_close(weights(rest.model), weights(whole.model))
    for got, want in zip(rest.data_collator.batches[-4:], whole.data_collator.batches[-4:], strict=True):
        assert all(torch.equal(got[name], want[name]) for name in want)
    first, second = whole.data_collator.batches[:6], whole.data_collator.batches[6:]
    pseudo = [{tuple(ids) for b in part for ids in b["input_ids"].tolist()} for part in (first, second)]
    assert pseudo[0] != pseudo[1]  # an epoch's draws are new


def test_adapters_are_trained_and_nothing_else(tmp_path):
    model = get_peft_model(tiny_llama(VOCAB), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(tmp_path, model).train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_B" in name or "lora_A" in name}


def test_chat_rows_keep_their_masks_on_the_way_to_the_collator(tmp_path):
    rows = [row | {"assistant_masks": [0] * 10 + [1] * 30} for row in dataset()]
    run = trainer(tmp_path, rows=rows, max_steps=1)
    run.train()
    batch = run.data_collator.batches[0]
    plain = batch["ditto_unit_len"] == 0
    assert plain.any()
    assert (batch["labels"][plain, :10] == -100).all()
    assert (batch["labels"][plain, 10:] == batch["input_ids"][plain, 10:]).all()
    assert (batch["ditto_prefix_len"][~plain] > 10).all()


def looping_text(again, seed, count=1024):
    """Sentences of 2 to 4 random words, each said again (and again) with probability `again`."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        row, sentence = [], None
        while len(row) < 64:
            if sentence is None or draw.random() > again:
                sentence = [*(draw.randrange(4, VOCAB) for _ in range(draw.randint(2, 4))), END]
            row += sentence
        rows.append({"input_ids": row[:64]})
    return rows


@pytest.mark.slow
def test_training_bends_the_curve(tmp_path):
    # a model that has learnt to copy is as sure of the eighth repetition as of the first; DITTO makes it decay
    options = {"per_device_train_batch_size": 32, "optim": "adamw_torch", "logging_steps": 50}
    model = tiny_llama(VOCAB)
    first = options | {"rows": looping_text(0.7, seed=0), "learning_rate": 5e-3, "max_steps": 450}
    trainer(tmp_path, model, rate=0.0, **first).train()
    learnt = {name: value.clone() for name, value in model.state_dict().items()}
    sentences = [row["input_ids"][:3] + [END] for row in looping_text(0.0, seed=2, count=12)]
    then = options | {"rows": looping_text(0.5, seed=1), "learning_rate": 1e-3, "max_steps": 60}
    tp = {}
    for rate in (0.0, 0.5):
        model.load_state_dict(learnt)
        trainer(tmp_path, model, rate=rate, **then).train()
        tp[rate] = self_reinforcement(model.eval(), None, sentences, [[5, 9, END]], max_repeats=8)["tp"]
    assert tp[0.0][8] > 0.9 * tp[0.0][1] > 0.4
    assert tp[0.5][8] < 0.6 * tp[0.5][1]
    assert tp[0.5][8] < 0.5 * tp[0.0][8]


_PROCESS = """
import sys
sys.path.insert(0, {root!r})
import torch
from tests.training.test_ditto_trainer import trainer, weights
run = trainer({folder!r}, per_device_train_batch_size=2, ddp_backend="gloo")
assert run.args.world_size == 2
run.train()
if run.is_world_process_zero():
    torch.save((weights(run.accelerator.unwrap_model(run.model)), run.state.log_history), {result!r})
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    script, result = tmp_path / "script.py", tmp_path / "result.pt"
    root = str(Path(__file__).parents[2])
    script.write_text(_PROCESS.format(root=root, folder=str(tmp_path), result=str(result)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    got, history = torch.load(result, weights_only=True)
    torch.testing.assert_close(got, weights(whole.model), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(whole.state.log_history[:3], history[:3], strict=True):
        for name in ("loss", "lm_loss", "ditto_loss", "tp_ratio"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3), json.dumps(history)
