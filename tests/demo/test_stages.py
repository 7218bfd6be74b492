"""The stages on tiny settings: a random language model with an eight-token vocabulary, one epoch on 32 digits."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import undersong.demo
from undersong.data.digits import SeriesDataset, digits
from undersong.demo import recipe, stages
from undersong.demo.decode import METHODS, continuations, decode, load

WORDS = ["<pad>", "<eos>", "<unk>", "the", "sea", "and", "sky", "sings"]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, pad_token_id=0, eos_token_id=1, **size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_digits():
    return {name: SeriesDataset(part.past_values[:32], part.labels[:32]) for name, part in digits().items()}


@pytest.fixture(scope="module")
def trained(few_digits):
    ticks = []
    result, models = stages.train_both(epochs=1, data=few_digits, advance=lambda: ticks.append(1))
    return result, models, ticks


def test_decode_compares_every_method(language_model):
    ticks = []
    prompts = ["the sea", "the sky and the"]
    result = decode(max_new_tokens=6, prompts=prompts, folder=language_model, advance=lambda: ticks.append(1))
    assert json.loads(json.dumps(result)) == result
    assert list(result["methods"]) == list(METHODS) == ["greedy", "typical sampling", "repetition cap"]
    assert len(ticks) == 3
    for row in result["methods"].values():
        assert len(row["texts"]) == 2
        assert 0 <= row["metrics"]["rep_4"] <= 1
        assert row["tokens_per_s"] > 0


def test_continuations_stop_before_the_end_token_and_hold_no_prompt(language_model):
    model, tokenizer = load(language_model)

    def end_third(input_ids, scores):  # <eos> is forced as the third new token of row 1
        if input_ids.shape[1] == 5:
            scores[1] = torch.where(torch.arange(8) == 1, 0.0, -torch.inf)
        else:
            scores[:, :3] = -torch.inf
        return scores

    new = continuations(model, tokenizer, ["the sea and", "sea"], max_new_tokens=5, do_sample=False,
                        logits_processor=[end_third])  # fmt: skip
    assert [len(tokens) for tokens in new] == [5, 2]
    assert 1 not in new[1]


def test_sampled_continuations_depend_on_the_seed_alone(language_model):
    model, tokenizer = load(language_model)
    first, again, other = (
        continuations(model, tokenizer, ["the sea"], max_new_tokens=20, do_sample=True, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_train_reports_both_models(trained):
    result, models, ticks = trained
    assert json.loads(json.dumps(result)) == result
    assert len(ticks) == 2  # one epoch each
    assert list(models) == ["aaren", "transformer"]
    assert result["data"] == {"train": 32, "validation": 32, "test": 32}
    for facts in result["models"].values():
        assert len(facts["history"]) == facts["epochs"] == 1
        assert facts["history"][0]["validation"] == facts["validation"]
        assert facts["history"][0]["loss"] > 0
    assert sum(result["example"]["probabilities"]) == pytest.approx(1, abs=1e-5)


def test_the_two_models_are_of_one_size(trained):
    sizes = [facts["parameters"] for facts in trained[0]["models"].values()]
    # Aaren's query per layer is all that sets them apart
    assert sizes[0] - sizes[1] == recipe.config().num_hidden_layers * recipe.config().hidden_size


def test_training_is_reproducible_and_seeded(few_digits):
    first, again, other = (recipe.train("aaren", epochs=1, data=few_digits, seed=seed).model for seed in (3, 3, 4))
    weights = [model.score.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_uses_the_given_learning_rate(few_digits):
    slow = recipe.train("transformer", epochs=1, data=few_digits, learning_rate=1e-9)
    torch.manual_seed(0)
    assert slow.learning_rate == 1e-9
    fresh = recipe.TransformerForTimeSeriesClassification(recipe.config())
    torch.testing.assert_close(slow.model.score.weight, fresh.score.weight, atol=1e-6, rtol=0)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"kind \('lstm'\) must be one of aaren, transformer"):
        recipe.train("lstm")


def test_baseline_sees_the_whole_series():
    model = recipe.TransformerForTimeSeriesClassification(recipe.config()).eval()
    series = torch.rand(1, 64, 1, requires_grad=True)
    hidden = model.encoder(model.value_projection(series))
    (gradient,) = torch.autograd.grad(hidden[0, 0].pow(2).sum(), series)
    assert gradient[0, 63, 0] != 0


def test_round_trip_is_bit_equal_and_carries_the_card(trained, few_digits):
    result, models, _ = trained
    card = stages.card(models["aaren"], result["models"]["aaren"], hardware="a test", command="pytest")
    assert "1,077 of scikit-learn's 1,797" in card.content
    assert "pytest" in card.content
    hub = stages.round_trip(models["aaren"], few_digits["test"].past_values, model_card=card)
    assert json.loads(json.dumps(hub)) == hub
    assert hub["bit_equal"], hub["largest_difference"]
    assert hub["loaded_class"] == "AarenForTimeSeriesClassification"
    assert hub["loaded_module"].startswith("transformers_modules.")
    assert hub["files"]["README.md"] == len(card.content.encode())
    assert hub["series"] == 32


def test_a_failing_process_is_quoted(trained, monkeypatch):
    monkeypatch.setattr(stages, "_ELSEWHERE", "raise ImportError('torch is gone')")
    with pytest.raises(RuntimeError, match="loading undersong/aaren-digits failed: .*torch is gone"):
        stages.round_trip(trained[1]["aaren"], torch.zeros(1, 64, 1))


def test_run_writes_report_and_json(language_model, few_digits, tmp_path, monkeypatch, capsys):
    from undersong.demo import runner

    monkeypatch.setattr(runner, "smollm2", lambda: language_model)
    monkeypatch.setattr("undersong.demo.decode.smollm2", lambda: language_model)
    monkeypatch.setattr(runner, "digits", lambda: few_digits)
    monkeypatch.setattr(runner, "FAST", {"prompts": 1, "max_new_tokens": 5, "epochs": 1})
    assert callable(undersong.demo.run)  # the name stays the function, whatever was imported
    report = undersong.demo.run(output=tmp_path / "new" / "folder", fast=True)
    assert report == tmp_path / "new" / "folder" / "report.html"
    result = json.loads((report.parent / "demo.json").read_text(encoding="utf-8"))
    assert {"decode", "train", "hub", "seconds", "about"} == set(result)
    assert result["about"]["fast"] is True
    assert sorted(path.name for path in report.parent.iterdir()) == ["demo.json", "report.html"]
    printed = capsys.readouterr().out
    assert "bit-equal: True" in printed
    assert "report.html" in printed
