"""Two-stage finetuning: when item vectors move, when training goes back, and when it stops."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer_heads import RecformerForSequentialRecommendation
from undersong.tokenization.recformer_tokenizer import RecformerTokenizer
from undersong.training import two_stage
from undersong.training.recformer_data import DataCollatorForRecformerFinetuning
from undersong.training.two_stage import TwoStageCallback

from ..modeling.recformer_catalogue import ITEMS, words

pytestmark = pytest.mark.usefixtures("one_thread")


def build():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RecformerConfig(vocab_size=len(words()), attention_window=4, max_attr_length=3, **sizes)
    tokenizer = RecformerTokenizer.from_config(words(), config)
    return RecformerForSequentialRecommendation(config).set_items(tokenizer, ITEMS), tokenizer


class Loop:
    """A training loop that adds 1 to a weight each epoch, with figures that are scripted."""

    def __init__(self, monkeypatch, folder, figures, **options):
        self.model, _ = build()
        self.weight = self.model.longformer.embeddings.LayerNorm.weight
        self.callback = TwoStageCallback([[1]], [2], **options)
        self.args = SimpleNamespace(output_dir=str(folder), should_save=True)
        self.state, self.control = TrainerState(epoch=0), TrainerControl()
        self.begins, self.tables = [], []  # the weight and the item vectors with which each epoch starts
        scripted = iter(figures)
        monkeypatch.setattr(two_stage, "full_ranks", lambda *args, **kwargs: None)
        monkeypatch.setattr(two_stage, "ranking_scores", lambda ranks, ks: {"ndcg@10/full": next(scripted)})

    def run(self):
        call = (self.args, self.state, self.control)
        self.callback.on_train_begin(*call, model=self.model)
        while not self.control.should_training_stop:
            self.callback.on_epoch_begin(*call, model=self.model)
            self.begins.append(self.weight[0].item())
            self.tables.append(self.model.item_embedding.clone())
            with torch.no_grad():
                self.weight += 1.0
            self.state.epoch += 1
            self.callback.on_epoch_end(*call, model=self.model)
        self.callback.on_train_end(*call, model=self.model)
        return self


def test_stage_two_goes_back_to_the_best_and_keeps_its_vectors(monkeypatch, tmp_path):
    figures = [0.1, 0.3, 0.2, 0.2, 0.4, 0.1, 0.1]
    loop = Loop(monkeypatch, tmp_path, figures, stage1_patience=2, stage2_patience=2).run()
    # the weight is 1 at the start; stage 1 ends after epochs 3 and 4, and stage 2 begins where epoch 2 ended
    assert loop.begins == [1, 2, 3, 4, 3, 4, 5]
    assert [entry["stage"] for entry in loop.callback.history] == [1, 1, 1, 1, 2, 2, 2]
    tables = loop.tables
    assert all(not torch.equal(tables[n], tables[n + 1]) for n in range(3))  # new vectors in every epoch of stage 1
    assert all(torch.equal(table, tables[1]) for table in tables[4:])  # those of the best epoch ever after
    # the best of all was epoch 5
    assert (loop.callback.best, loop.callback.best_epoch, loop.callback.stage) == (0.4, 5, 3)
    assert loop.weight[0] == 4
    assert torch.equal(loop.model.item_embedding, tables[1])


def test_without_stage_two_training_ends_with_the_best_of_stage_one(monkeypatch, tmp_path):
    loop = Loop(monkeypatch, tmp_path, [0.1, 0.3, 0.2], stage1_patience=1, stage2_patience=0).run()
    assert loop.begins == [1, 2, 3]
    assert loop.weight[0] == 3
    assert torch.equal(loop.model.item_embedding, loop.tables[1])


def test_an_interrupted_training_goes_on_where_it_was(monkeypatch, tmp_path):
    figures, patience = [0.1, 0.3, 0.2, 0.4, 0.1], {"stage1_patience": 1, "stage2_patience": 1}
    whole = Loop(monkeypatch, tmp_path / "whole", figures, **patience).run()

    part = Loop(monkeypatch, tmp_path / "part", figures[:3], **patience)
    with pytest.raises(StopIteration):
        part.run()  # in the middle of epoch 4, when the script ends
    part.state.global_step = 30
    (tmp_path / "part" / "checkpoint-30").mkdir()
    part.callback.on_save(part.args, part.state, part.control)
    assert json.loads((tmp_path / "part" / "checkpoint-30" / "two_stage.json").read_text())["stage"] == 2

    again = Loop(monkeypatch, tmp_path / "part", figures[3:], **patience)
    again.model.load_state_dict(part.model.state_dict())
    with torch.no_grad():
        again.weight -= 1.0  # the checkpoint was made at the end of epoch 3
    again.state.global_step, again.state.epoch = 30, 3
    again.run()
    assert again.callback.history == whole.callback.history
    assert again.begins == whole.begins[3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_trainer_runs_both_stages_and_improves(tmp_path):
    """Users who buy one item of each color in turn, which a few epochs learn."""
    model, tokenizer = build()
    kinds = list(range(1, 25))
    users = [[kinds[(start + 6 * step) % 24] for step in range(4)] for start in range(24)]
    callback = TwoStageCallback([u[:-1] for u in users], [u[-1] for u in users], stage1_patience=1, stage2_patience=1)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=12,
        per_device_train_batch_size=12,
        learning_rate=3e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    collator = DataCollatorForRecformerFinetuning(tokenizer, list(ITEMS.values()))
    trainer = Trainer(model, arguments, train_dataset=users, data_collator=collator, callbacks=[callback])
    trainer.train()
    figures = [entry["ndcg"] for entry in callback.history]
    assert callback.best == max(figures) > figures[0]
    assert {entry["stage"] for entry in callback.history} >= {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage1_patience": 0}, r"stage1_patience \(0\) must be at least 1"),
        ({"stage2_patience": -1}, r"stage2_patience \(-1\) at least 0"),
        ({"histories": []}, "histories is empty, so nothing tells when to stop"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        TwoStageCallback(**{"histories": [[1]], "targets": [2], **options})
