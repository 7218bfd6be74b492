"""Router statistics are what one counts by hand, and the callback gives them for what the Trainer evaluates."""

import math

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from undersong import RMoEConfig, RMoEForCausalLM, attach_recurrent_router
from undersong.training.router_stats import RouterCounts, RouterStatsCallback, plot_router_stats, router_stats

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
FAMILIES = ("Mixtral", "Olmoe", "Qwen3Moe", "rmoe", "attached")


def build(family):
    torch.manual_seed(0)
    if family == "rmoe":
        return RMoEForCausalLM(RMoEConfig(**SIZES, num_local_experts=4, router_hidden_size=6))
    name = "Olmoe" if family == "attached" else family
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES))
    return attach_recurrent_router(model, 6) if family == "attached" else model


def rows(count, seed=0):
    """Token ids, the second half of them padded on the left."""
    ids = torch.randint(3, 31, (count, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[count // 2 :, :3] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": i} for i, m in zip(ids, mask, strict=True)]


def together(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_of(model, folder, **options):
    arguments = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 0}
    arguments |= {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 3, "logging_strategy": "no"}
    return Trainer(
        model,
        TrainingArguments(folder, **arguments | options),
        train_dataset=rows(16),
        eval_dataset=rows(8, seed=1),
        callbacks=[],
    )


def logits_of(*chosen, experts):
    """A layer's logits by the experts of every token, the first choice first."""
    logits = torch.full((len(chosen), experts), -1.0)
    for token, order in enumerate(chosen):
        for rank, expert in enumerate(order):
            logits[token, expert] = 5.0 - rank
    return logits


def test_load_and_its_entropy_by_hand():
    """Of 8 choices expert 0 has 4, expert 1 has 2, expert 2 and 3 have 1 each."""
    layer = logits_of((0, 1), (0, 2), (1, 0), (3, 0), experts=4)
    stats = router_stats((layer,), top_k=2)
    assert stats["load"] == [[0.5, 0.25, 0.125, 0.125]]
    assert stats["load_entropy"] == pytest.approx([1.75 * math.log(2)])
    assert stats["max_over_mean_load"] == [2.0]
    assert stats["mutual_information"] == [], "one layer has no neighbour"


def test_even_and_collapsed_loads_are_the_bounds():
    even = logits_of((0,), (1,), (2,), (3,), experts=4)
    collapsed = logits_of((2,), (2,), (2,), (2,), experts=4)
    stats = router_stats((even, collapsed), top_k=1)
    assert stats["load_entropy"] == pytest.approx([math.log(4), 0.0])
    assert stats["max_over_mean_load"] == [1.0, 4.0]
    assert stats["mutual_information"] == [0.0], "a choice that is always the same tells nothing"


def test_mutual_information_by_hand():
    """p(0, 0) = 3/8, p(0, 1) = 1/8, p(1, 0) = 1/8, p(1, 1) = 3/8, by first choices whatever the second ones are."""
    below = logits_of(*[(0, 1)] * 4, *[(1, 0)] * 4, experts=2)
    above = logits_of(*[(0, 1)] * 3, (1, 0), (0, 1), *[(1, 0)] * 3, experts=2)
    want = 2 * (3 / 8 * math.log(3 / 2) + 1 / 8 * math.log(1 / 2))
    for top_k in (1, 2):
        assert router_stats((below, above), top_k)["mutual_information"] == pytest.approx([want])
    same, independent = router_stats((below, below), 1), logits_of(*[(0, 1), (1, 0)] * 4, experts=2)
    assert same["mutual_information"] == pytest.approx([math.log(2)])
    assert router_stats((below, independent), 1)["mutual_information"] == pytest.approx([0.0], abs=1e-12)


def test_padding_does_not_count_and_batches_add_up():
    logits = tuple(torch.randn(2 * 5, 4, generator=torch.Generator().manual_seed(layer)) for layer in range(3))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    want = router_stats(tuple(layer[mask.flatten().bool()] for layer in logits), 2)
    assert router_stats(logits, 2, mask) == want
    longer = torch.cat([torch.ones(2, 3), mask], 1)  # keys of a cache come before
    assert router_stats(logits, 2, longer) == want
    counts = RouterCounts()
    for row in range(2):
        counts.add([layer.view(2, 5, 4)[row] for layer in logits], 2, mask[row : row + 1])
    assert counts.stats() == want
    assert router_stats(logits, 2, torch.zeros(2, 1, 5, 5)) == router_stats(logits, 2), "a mask of who sees whom"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_callback_reports_the_evaluation_set(family, tmp_path):
    model = build(family)
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(callback := RouterStatsCallback(trainer))
    metrics = trainer.evaluate()
    inputs = together(rows(8, seed=1))
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    want = router_stats(outputs.router_logits, 2, inputs["attention_mask"])
    assert callback.last["load"] == want["load"]
    for name in ("load_entropy", "max_over_mean_load", "mutual_information"):
        values = [metrics[f"eval_router_{name}_{layer}"] for layer in range(len(want[name]))]
        assert values == pytest.approx(want[name])
        assert metrics[f"eval_router_{name}"] == pytest.approx(sum(want[name]) / len(want[name]))
        assert trainer.state.log_history[-1][f"eval_router_{name}"] == metrics[f"eval_router_{name}"]
    assert trainer.evaluate()["eval_router_load_entropy"] == metrics["eval_router_load_entropy"], "counts begin anew"


def test_nobody_else_sees_the_router_logits(tmp_path):
    """Neither the caller of the model nor the predictions, and the loss stays what it was without the callback."""
    model = build("Olmoe")
    trainer = trainer_of(model, tmp_path)
    want = trainer.evaluate()["eval_loss"]
    trainer.add_callback(RouterStatsCallback(trainer))
    assert trainer.evaluate()["eval_loss"] == want
    assert trainer.predict(rows(8, seed=1)).predictions.shape == (8, 7, 31)
    inputs = together(rows(2))
    assert model(**inputs).router_logits is None
    assert len(model(**inputs, output_router_logits=True).router_logits) == 3, "who asks gets them"


def test_what_is_no_evaluation_does_not_count(tmp_path):
    model = build("rmoe")
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(RouterStatsCallback(trainer))
    want = trainer.evaluate()["eval_router_load_entropy_0"]
    model.eval()(torch.full((1, 50), 5))
    trainer.predict(rows(3, seed=2))
    assert trainer.evaluate()["eval_router_load_entropy_0"] == want


def test_two_trainers_of_one_model(tmp_path):
    model = build("Olmoe")
    values = []
    for _ in range(2):
        trainer = trainer_of(model, tmp_path)
        trainer.add_callback(RouterStatsCallback(trainer))
        values.append(trainer.evaluate()["eval_router_load_entropy"])
    assert values[0] == values[1]
    assert model(**together(rows(2))).router_logits is None


def test_training_steps_are_logged_where_asked_for(tmp_path):
    """Every second step, all its micro-batches; checkpointing computes layers twice, they count once."""
    model = build("Mixtral")
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.0,
    )
    trainer.add_callback(RouterStatsCallback(trainer, steps=2))
    seen = []
    model.model.register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "router_load_entropy" in log]
    assert [log["step"] for log in logs] == [2, 4]
    assert len(seen) == 8
    model.eval()
    for log, batches in zip(logs, (seen[2:4], seen[6:8]), strict=True):
        counts = RouterCounts()
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                counts.add(model(**inputs, output_router_logits=True).router_logits, 2, inputs["attention_mask"])
        for name in ("load_entropy", "max_over_mean_load", "mutual_information"):
            for layer, value in enumerate(counts.stats()[name]):
                assert log[f"router_{name}_{layer}"] == pytest.approx(value), name


def test_under_peft_and_with_several_evaluation_sets(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("Qwen3Moe"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainer = trainer_of(model, tmp_path)
    trainer.add_callback(RouterStatsCallback(trainer))
    metrics = trainer.evaluate({"even": rows(4), "odd": rows(5, seed=3)})
    assert {"eval_even_router_load_entropy", "eval_odd_router_mutual_information_1"} <= metrics.keys()


def test_a_model_that_is_made_anew_for_each_training_is_followed(tmp_path):
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, disable_tqdm=True, report_to="none", max_steps=1, eval_strategy="steps", eval_steps=1
    )
    trainer = Trainer(
        args=arguments, model_init=lambda: build("Mixtral"), train_dataset=rows(4), eval_dataset=rows(8, seed=1)
    )
    trainer.add_callback(callback := RouterStatsCallback(trainer))
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert sum("eval_router_load_entropy" in log for log in trainer.state.log_history) == 1
    assert callback.last["load"]
    assert not first.model._forward_pre_hooks, "the hooks of the first one are off"


def test_the_plot_shows_both(tmp_path):
    pytest.importorskip("matplotlib")
    before, after = (
        router_stats(tuple(torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(seed))), 2) for seed in (0, 1)
    )
    figure = plot_router_stats(before, after, tmp_path / "stats.png")
    assert (tmp_path / "stats.png").stat().st_size > 0
    entropy, load, information = figure.axes
    assert list(entropy.lines[0].get_ydata()) == before["load_entropy"]
    assert list(load.lines[1].get_ydata()) == after["max_over_mean_load"]
    assert list(information.lines[1].get_ydata()) == after["mutual_information"]
    assert entropy.lines[2].get_ydata()[0] == pytest.approx(math.log(4))


def test_errors(tmp_path):
    logits = (torch.zeros(6, 4), torch.zeros(6, 4))
    with pytest.raises(ValueError, match="router_logits is empty; call the model with output_router_logits=True"):
        router_stats((), 2)
    with pytest.raises(ValueError, match=r"router_logits \(shapes \[\[6, 4\], \[6, 3\]\]\) must be"):
        router_stats((torch.zeros(6, 4), torch.zeros(6, 3)), 2)
    with pytest.raises(ValueError, match=r"top_k \(5\) must lie between 1 and the number of experts \(4\)"):
        router_stats(logits, 5)
    for mask in (torch.ones(4, 2), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"attention_mask \(\[., 2\]\) does not fit router_logits of 6 tokens"):
            router_stats(logits, 2, mask)
    with pytest.raises(ValueError, match="no token was counted"):
        router_stats(logits, 2, torch.zeros(2, 3))
    trainer = trainer_of(build("Mixtral"), tmp_path)
    with pytest.raises(ValueError, match=r"steps \(0\) must be an integer of at least 1, or None"):
        RouterStatsCallback(trainer, steps=0)
    sizes = {"vocab_size": 31, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    dense = transformers.LlamaConfig(**sizes, num_attention_heads=1)
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\) has no num_experts_per_tok"):
        RouterStatsCallback(trainer_of(transformers.LlamaForCausalLM(dense), tmp_path))
    dense.num_experts_per_tok = 2
    trainer = trainer_of(transformers.LlamaForCausalLM(dense), tmp_path)
    trainer.add_callback(RouterStatsCallback(trainer))
    with pytest.raises(ValueError, match=r"model \(LlamaModel\) returns no router_logits"):
        trainer.evaluate()
