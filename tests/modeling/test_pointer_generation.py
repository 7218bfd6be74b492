"""Stock `generate()` and trainers on pointer networks: a vocabulary of its own for every batch."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from undersong.data.pointer_collator import PointerDataCollator
from undersong.generation.pointer_processors import decoding_steps

from .pointer_models import KINDS, build, padded, points

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 4, "num_return_sequences": 3},
    "beam sample": {"num_beams": 3, "do_sample": True},
}
LENGTHS = (6, 3, 4)


def rows():
    return [points(1, n, seed=n)[0] for n in LENGTHS]


def generate(model, *args, **options):
    torch.manual_seed(0)
    return model.generate(*args, return_dict_in_generate=True, output_scores=True, **options)


@every_kind
@pytest.mark.parametrize("mode", MODES)
def test_cache_on_equals_cache_off_in_every_mode(kind, mode):
    model = build(kind)
    values, mask = padded(rows())
    got = generate(model, values, attention_mask=mask, **MODES[mode])
    want = generate(model, values, attention_mask=mask, use_cache=False, **MODES[mode])
    assert got.sequences.tolist() == want.sequences.tolist()
    for left, right in zip(got.scores, want.scores, strict=True):
        assert torch.equal(left.isfinite(), right.isfinite())
        assert (left - right)[right.isfinite()].abs().max() < 2e-6  # scores are rounded to float32


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_padded_row_is_answered_as_if_it_were_alone(kind, side, mode):
    model = build(kind)
    values, mask = padded(rows(), side)
    options = MODES[mode] | {"max_new_tokens": 6}
    together = model.generate(values, attention_mask=mask, **options)
    count = MODES[mode].get("num_return_sequences", 1)
    for index, row in enumerate(rows()):
        first = (max(LENGTHS) - len(row)) * (side == "left")  # ids are columns
        got = together[index * count : (index + 1) * count]
        alone = model.generate(row[None], **options)
        assert alone.shape[1] <= got.shape[1]
        alone = torch.nn.functional.pad(alone, (0, got.shape[1] - alone.shape[1]))
        assert torch.where(got == 0, 0, got - first).tolist() == alone.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_widths_may_differ_from_call_to_call(mode):
    model = build()
    for n in (5, 2, 1, 9):
        output = generate(model, points(2, n), **MODES[mode])
        assert all(scores.shape[1] == n + 1 for scores in output.scores)
        assert output.sequences.max() <= n
        assert (output.sequences[:, 0] == 0).all()


def test_an_answer_may_by_default_name_every_item_twice_at_most_once():
    model = build()
    with torch.no_grad():
        model.model.end.fill_(0)
        model.attention.v.zero_()  # all ids are equally likely, so sampling goes on for long
    torch.manual_seed(0)
    lengths = {n: model.generate(points(40, n), do_sample=True).shape[1] for n in (4, 9)}
    assert lengths == {4: 1 + 6, 9: 1 + 11}
    assert model.generate(points(2, 4), max_length=3, min_length=3).shape[1] == 3
    assert model.generate(points(2, 4), max_new_tokens=9, min_new_tokens=9).shape[1] == 10
    config = GenerationConfig(max_length=5, min_length=5, eos_token_id=0, pad_token_id=0, decoder_start_token_id=0)
    assert model.generate(points(2, 4), generation_config=config).shape[1] == 5


def is_valid(task, ids, n):
    ids = ids[1:]
    end = ids.index(0)
    assert set(ids[end:]) == {0}
    ids = ids[:end]
    if task == "hull":
        return len(ids) == min(n, 3) + 1 or (ids[0] == ids[-1] and len(set(ids)) == len(ids) - 1 >= 3)
    if task == "triangulation":
        return len(ids) % 3 == 0
    return sorted(ids) == list(range(1, n + 1)) and (task == "permutation" or ids[0] == 1)


@pytest.mark.parametrize("task", ["tour", "permutation", "hull", "triangulation"])
@pytest.mark.parametrize("mode", MODES)
def test_a_task_makes_every_output_valid(task, mode):
    model = build()
    values, mask = padded(rows())
    output = generate(model, values, attention_mask=mask, task=task, **MODES[mode])
    count = len(output.sequences) // 3
    assert output.sequences.shape[1] <= 1 + decoding_steps(task, 6)
    for index, ids in enumerate(output.sequences.tolist()):
        assert is_valid(task, ids, LENGTHS[index // count]), ids


def test_the_task_of_a_generation_config_is_the_default_and_a_call_may_drop_it():
    model, x = build(), points(3, 5)
    free = model.generate(x).tolist()
    model.generation_config.task = "tour"
    assert [sorted(ids) for ids in model.generate(x).tolist()] == [[0, 0, 1, 2, 3, 4, 5]] * 3
    assert model.generate(x, task=None).tolist() == free
    assert [sorted(ids) for ids in model.generate(x, generation_config=GenerationConfig()).tolist()][0][-1] == 5
    config = GenerationConfig()
    config.task = "hull"
    assert is_valid("hull", model.generate(x, generation_config=config)[0].tolist(), 5)
    with pytest.raises(ValueError, match=r"task \('tower'\) must be one of"):
        model.generate(x, task="tower")


def test_strict_hulls_are_convex():
    model = build()
    values, mask = padded(rows())
    options = {"attention_mask": mask, "task": "hull", "do_sample": True, "num_return_sequences": 8}
    torch.manual_seed(0)
    for index, ids in enumerate(model.generate(values, strict_geometry=True, **options).tolist()):
        corners = values[index // 8][torch.tensor(ids[1 : ids.index(0, 1) - 1]) - 1]
        before, after = corners - corners.roll(1, 0), corners.roll(-1, 0) - corners
        assert (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0] > 0).all(), ids
    with pytest.raises(ValueError, match="strict_geometry"):
        model.generate(values, attention_mask=mask, task="tour", strict_geometry=True)
    model.generation_config.strict_geometry = True
    tour = model.generate(values, attention_mask=mask, task="tour", strict_geometry=False)[0]
    assert is_valid("tour", tour.tolist(), 6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("task", [None, "permutation"])
def test_more_beams_than_answers_gives_no_impossible_ones(n, task):
    """Candidates of probability 0 fill the beams; what is returned for them is empty and scored below all others."""
    model, x = build(), points(2, n)
    answers = {1: 1, 2: 2, 3: 6}[n]
    options = {"num_beams": 8, "num_return_sequences": 8, "max_new_tokens": n + 1, "task": task}
    output = generate(model, x, **options)
    for begin in (0, 8):
        ids = output.sequences[begin : begin + 8].tolist()
        scores = output.sequences_scores[begin : begin + 8]
        real = [row for row, score in zip(ids, scores.tolist(), strict=True) if score > -1e6]
        assert max(map(max, ids)) <= n
        if task is not None:
            assert len(real) == min(answers, 8)
            assert len(set(map(tuple, real))) == len(real)
            assert all(is_valid("permutation", row, n) for row in real)
            empty = [row for row, score in zip(ids, scores.tolist(), strict=True) if score <= -1e6]
            assert all(is_valid("permutation", row, n) or set(row) == {0} for row in empty), empty


def test_processors_of_the_user_and_renormalised_scores():
    model, x = build(), points(2, 5)

    def without_3(ids, scores):
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)

    options = {"num_beams": 3, "renormalize_logits": True}
    for more in ({"logits_processor": [without_3]}, {"task": "permutation"}):
        output = generate(model, x, **options, **more)
        assert ("task" in more) == (3 in output.sequences)
        for scores in output.scores:
            assert torch.allclose(scores.exp().sum(1), torch.ones(()), atol=1e-5)


def test_transition_scores_use_the_vocabulary_of_the_batch():
    model = build()
    values, mask = padded(rows())
    output = generate(model, values, attention_mask=mask, num_beams=3, length_penalty=0.0)
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    assert torch.allclose(scores.sum(1), output.sequences_scores, atol=1e-5)
    greedy = generate(model, values, attention_mask=mask)
    scores = model.compute_transition_scores(greedy.sequences, greedy.scores, normalize_logits=True)
    steps = torch.stack(greedy.scores, 1).log_softmax(-1)
    assert torch.allclose(scores, steps.gather(2, greedy.sequences[:, 1:, None]).squeeze(2), atol=1e-6)
    assert model.config.vocab_size == 1


def test_what_generate_cannot_start_from_is_named():
    model, x = build(item_vocab_size=5), points(2, 4)
    with pytest.raises(ValueError, match=r"generate\(\) got no items; pass input_values"):
        model.generate(max_new_tokens=2)
    with pytest.raises(ValueError, match="items are given as input_values and input_ids; pass exactly one"):
        model.generate(input_values=x, input_ids=torch.ones(2, 4).long())
    with pytest.raises(ValueError, match="items are given as inputs_embeds and inputs; pass exactly one"):
        model.generate(x, inputs_embeds=x)


class Sorting(torch.utils.data.Dataset):
    """Numbers, and their positions from the smallest to the largest."""

    def __init__(self, size, low, high, seed=0):
        generator = torch.Generator().manual_seed(seed)
        counts = torch.randint(low, high + 1, (size,), generator=generator)
        self.values = [torch.rand(n, 1, generator=generator) for n in counts.tolist()]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        values = self.values[index]
        return {"input_values": values, "labels": torch.cat([values[:, 0].argsort() + 1, torch.tensor([0])])}


def sorter(**overrides):
    return build(dtype=torch.float32, input_size=1, hidden_size=24, initializer_range=0.2, **overrides)


def arguments(cls, folder, **values):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 10}
    return cls(output_dir=folder, learning_rate=0.02, per_device_train_batch_size=16, seed=0, **quiet, **values)


def test_fifty_steps_of_the_trainer_lower_the_loss(tmp_path):
    trainer = Trainer(
        sorter(),
        arguments(TrainingArguments, tmp_path, max_steps=50),
        train_dataset=Sorting(400, 2, 4),
        eval_dataset=Sorting(20, 2, 4, seed=1),
        data_collator=PointerDataCollator(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75 * before
    predictions = trainer.predict(Sorting(20, 2, 4, seed=1)).predictions
    assert isinstance(predictions, np.ndarray), "only logits; no states and no encoder outputs"
    assert predictions.shape[0] == 20


def answers(ids):
    """What stands in front of the first 0 or -100, without the start."""
    return [[*row[: min([*np.flatnonzero(row <= 0), len(row)])]] for row in ids]


def test_seq2seq_trainer_predicts_by_generation_over_batches_of_different_widths(tmp_path):
    data, seen = Sorting(7, 1, 6), {}

    def compute_metrics(evaluation):
        seen["predictions"], seen["labels"] = evaluation.predictions, evaluation.label_ids
        pairs = zip(answers(evaluation.predictions[:, 1:]), answers(evaluation.label_ids), strict=True)
        return {"exact": float(np.mean([got == want for got, want in pairs]))}

    model = sorter()
    trainer = Seq2SeqTrainer(
        model,
        arguments(Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, per_device_eval_batch_size=2),
        eval_dataset=data,
        data_collator=PointerDataCollator(),
        compute_metrics=compute_metrics,
    )
    assert "eval_exact" in trainer.evaluate()
    want = [row["labels"][:-1].tolist() for row in data]
    assert answers(seen["labels"]) == want, "padded with 0 behind -100, which must not be read"
    alone = [model.generate(row["input_values"][None])[0].numpy()[1:] for row in data]
    assert answers(seen["predictions"][:, 1:]) == answers(alone)
    widths = {len(row["input_values"]) for row in data}
    assert len(widths) > 2
    metrics = trainer.evaluate(num_beams=3, max_new_tokens=4)
    assert set(metrics) >= {"eval_loss", "eval_exact"}


def test_the_collator_of_transformers_makes_the_same_decoder_inputs():
    model = build()
    labels = torch.tensor([[2, 1, 0], [1, 0, -100]])
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == [[0, 2, 1], [0, 1, 0]]


def test_an_exported_folder_generates_without_undersong(tmp_path):
    from undersong.hub import export

    model = build("two layers, two glimpses", torch.float32)
    model.generation_config.task = "tour"
    values, mask = padded([row.float() for row in rows()], fill=0.0)
    options = {"num_beams": 3, "attention_mask": mask}
    torch.save({"values": values, "options": options}, tmp_path / "case.pt")
    export(model, tmp_path / "tour")
    code = f"""
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "undersong":
                    raise ModuleNotFoundError("undersong is not here")
        sys.meta_path.insert(0, Blocked())
        import torch, transformers
        case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
        folder = {str(tmp_path / "tour")!r}
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True).eval()
        print(model.generate(case["values"], **case["options"]).tolist())
    """
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(model.generate(values, **options).tolist())
