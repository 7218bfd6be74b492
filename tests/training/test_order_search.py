"""OrderSearchLoss and its Trainer: orders come from the model, and are always orders of the target set."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import default_collate
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from tests.generation.tiny_llama import tiny_llama
from undersong.data.pointer_collator import PointerDataCollator
from undersong.modeling.pointer_network.configuration_pointer_network import PointerNetworkConfig
from undersong.modeling.pointer_network.modeling_pointer_network import PointerNetworkForConditionalGeneration
from undersong.training.order_search import OrderSearchLoss, OrderSearchTrainer, OrderSearchTrainerMixin
from undersong.training.segment_orders import RandomSegments, SortedSegments, split_target

pytestmark = pytest.mark.usefixtures("one_thread")
SEP, VOCAB = 9, 24


def tiny_t5(dropout=0.0):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": dropout}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, **sizes))


def tiny_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        init_std=0.5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model = BartForConditionalGeneration(config)
    # what a checkpoint may carry: settings that would bend a distribution, or write ids of their own
    model.generation_config.update(forced_bos_token_id=0, forced_eos_token_id=2, temperature=0.1, top_k=1, num_beams=2)
    return model


def pointer():
    torch.manual_seed(0)
    config = PointerNetworkConfig(input_size=1, hidden_size=8, encoder_type="set", initializer_range=0.8)
    return PointerNetworkForConditionalGeneration(config)


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# sets with several tokens a segment, one that begins another, duplicates, a single segment, and none
SETS = [[5, 6, SEP, 5, SEP, 7, 8, 4], [10, SEP, 11, SEP, 10], [12, 13], [], [5, SEP, 5, 5, SEP, 5, 5, 5, SEP, 5]]


def seq2seq_batch(begin=(), end=(1,)):
    labels = padded([[*begin, *row, *end] for row in SETS], -100)
    inputs = torch.randint(4, VOCAB, (len(SETS), 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(inputs)
    mask[1, 3:] = 0
    return {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def causal_batch(side="right"):
    """Prompts of different lengths, then the sets."""
    prompts = [[1, 4, 5], [1], [1, 6], [1, 7, 8, 4], [1, 4]]
    ids, labels, mask = [], [], []
    width = max(len(prompt) + len(row) + 1 for prompt, row in zip(prompts, SETS, strict=True))
    for prompt, row in zip(prompts, SETS, strict=True):
        pad = width - len(prompt) - len(row) - 1
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids.append([0] * left + prompt + row + [2] + [0] * right)
        labels.append([-100] * (left + len(prompt)) + row + [2] + [-100] * right)
        mask.append([0] * left + [1] * (width - pad) + [0] * right)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def pointer_batch():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (4, 2, 1, 3):
        labels = [*torch.randperm(n, generator=generator).add(1).tolist(), 0]
        rows.append({"input_values": torch.rand(n, 1, generator=generator), "labels": torch.tensor(labels)})
    return PointerDataCollator()(rows)


CASES = {
    "t5": (tiny_t5, seq2seq_batch, SEP),
    "bart": (tiny_bart, lambda: seq2seq_batch(begin=(0,), end=(2,)), SEP),
    "llama": (lambda: tiny_llama(VOCAB), causal_batch, SEP),
    "llama-left": (lambda: tiny_llama(VOCAB), lambda: causal_batch("left"), SEP),
    "pointer": (pointer, pointer_batch, None),
}
every_model = pytest.mark.parametrize("case", CASES)


def made(case):
    build, batch, separator = CASES[case]
    return build().eval(), batch(), separator


def segments_of(model, labels, separator):
    fixed = {0, 1, 2} if separator else {0}
    return [split_target(row, separator, fixed) for row in labels.tolist()]


def log_likelihood(model, inputs):
    """log p(target) of every row, written out with a loop."""
    with torch.no_grad():
        logits = model(**inputs).logits.double().log_softmax(-1)
    shift = 0 if model.config.is_encoder_decoder else 1
    total = []
    for row, labels in enumerate(inputs["labels"].tolist()):
        total.append(sum(logits[row, t - shift, token].item() for t, token in enumerate(labels) if token != -100))
    return torch.tensor(total)


def one_row(model, inputs, row, target, order):
    """A row of the batch, with its target in that order."""
    inputs = {name: value[row : row + 1] for name, value in inputs.items()}
    for name in ("labels",) if model.config.is_encoder_decoder else ("labels", "input_ids"):
        ids = inputs[name][0].tolist()
        ids[target.start : target.start + len(target.ids(order))] = target.ids(order)
        inputs[name] = torch.tensor([ids])
    return inputs


@every_model
@pytest.mark.parametrize("strategy", ["sample", "greedy", "exact", "random"])
def test_an_order_is_always_one_of_the_same_set(case, strategy):
    model, inputs, separator = made(case)
    loss = OrderSearchLoss(strategy, warmup_steps=0, separator_id=separator)
    want = segments_of(model, inputs["labels"], separator)
    changed = False
    for seed in range(4):
        torch.manual_seed(seed)
        chosen = loss.choose(model, inputs, step=7)
        for got, target in zip(segments_of(model, chosen.inputs["labels"], separator), want, strict=True):
            assert Counter(got.segments) == Counter(target.segments)
            assert (got.start, got.prefix, got.suffix) == (target.start, target.prefix, target.suffix)
        changed |= not torch.equal(chosen.inputs["labels"], inputs["labels"])
        counted = chosen.inputs["labels"] != -100
        assert torch.equal(counted, inputs["labels"] != -100)
        if not model.config.is_encoder_decoder:
            assert torch.equal(chosen.inputs["input_ids"][counted], chosen.inputs["labels"][counted])
            assert torch.equal(chosen.inputs["input_ids"][~counted], inputs["input_ids"][~counted])
        assert (chosen.entropy >= 0).all()
    assert changed


@every_model
def test_exact_is_the_best_of_all_orders(case):
    model, inputs, separator = made(case)
    loss = OrderSearchLoss("exact", separator_id=separator)
    best = log_likelihood(model, loss.choose(model, inputs).inputs)
    targets = segments_of(model, inputs["labels"], separator)
    for row, target in enumerate(targets):
        scores = {}
        for order in set(itertools.permutations(target.segments)):
            scores[order] = log_likelihood(model, one_row(model, inputs, row, target, order)).item()
        assert best[row].item() == pytest.approx(max(scores.values()), abs=1e-4)
        p = torch.tensor(list(scores.values())).softmax(0)
        entropy = loss.choose(model, inputs).entropy[row].item()
        assert entropy == pytest.approx(-(p * p.log()).sum().item(), abs=1e-3)


def choices(model, case_inputs, row, target, order, separator):
    """log q of every token of restricted ancestral decoding, from one teacher-forced pass: the model's distribution
    over the tokens that continue segments not yet written; and whether that token was the most likely one."""
    inputs = one_row(model, case_inputs, row, target, order)
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    at = target.start + len(target.prefix) - (0 if model.config.is_encoder_decoder else 1)
    logs, greedy, left = [], [], Counter(target.segments)
    for segment in order:
        for here in range(len(segment) + 1):
            if len(left) == 1:
                return logs, greedy  # nothing left to choose
            last = here == len(segment)
            if last and separator is None:
                break
            fitting = [other for other in left if other[:here] == segment[:here]]
            allowed = {separator if len(other) == here else other[here] for other in fitting}
            token = separator if last else segment[here]
            among = logits[at, sorted(allowed)]
            logs.append((logits[at, token] - among.logsumexp(0)).item())
            greedy.append(bool(logits[at, token] == among.max()))
            at += 1
        left -= Counter([segment])
    return logs, greedy


@pytest.mark.parametrize("case", ["t5", "bart", "llama", "llama-left", "pointer"])
def test_sampling_follows_the_models_distribution(case):
    """Frequencies of 600 sampled orders against q(order) from teacher forcing, and the entropy of q."""
    model, inputs, separator = made(case)
    row = 0
    target = segments_of(model, inputs["labels"], separator)[row]
    q = {
        order: math.exp(sum(choices(model, inputs, row, target, order, separator)[0]))
        for order in set(itertools.permutations(target.segments))
    }
    assert sum(q.values()) == pytest.approx(1, abs=1e-4)
    torch.manual_seed(0)
    one = {name: value[row : row + 1] for name, value in inputs.items()}
    chosen = OrderSearchLoss("sample", num_samples=600, separator_id=separator).choose(model, one)
    counts = Counter(target.segments for target in segments_of(model, chosen.inputs["labels"], separator))
    # an order of q < 0.5 % is not expected often enough for a chi-square; they are counted together
    rare = [order for order in q if q[order] < 0.005]
    common = [order for order in q if q[order] >= 0.005]
    observed = [counts[order] for order in common] + [sum(counts[order] for order in rare)] * bool(rare)
    expected = [600 * q[order] for order in common] + [600 * sum(q[order] for order in rare)] * bool(rare)
    scale = sum(observed) / sum(expected)
    assert chisquare(observed, [scale * value for value in expected]).pvalue > 1e-4
    entropy = -sum(p * math.log(p) for p in q.values())
    assert chosen.entropy.mean().item() == pytest.approx(entropy, abs=0.15)


@every_model
def test_greedy_takes_the_most_likely_token(case):
    model, inputs, separator = made(case)
    chosen = OrderSearchLoss("greedy", separator_id=separator).choose(model, inputs).inputs
    for row, target in enumerate(segments_of(model, chosen["labels"], separator)):
        assert all(choices(model, inputs, row, target, target.segments, separator)[1])


def test_warmup_is_uniform_over_distinct_orders():
    model = tiny_t5()
    labels = torch.tensor([[5, SEP, 6, 7, SEP, 5, SEP, 8, 1]])  # 4! / 2! orders
    inputs = {"input_ids": torch.tensor([[4, 5]]), "labels": labels}
    torch.manual_seed(0)
    loss = OrderSearchLoss("sample", warmup_steps=10, num_samples=2400, separator_id=SEP)
    chosen = loss.choose(model, inputs, step=9)
    counts = Counter(map(tuple, chosen.inputs["labels"].tolist()))
    assert len(counts) == 12
    assert chisquare(list(counts.values())).pvalue > 1e-3
    assert chosen.entropy_limit[0].item() == pytest.approx(math.log(12))
    assert torch.equal(chosen.entropy, chosen.entropy_limit)
    after = loss.choose(model, inputs, step=10)
    assert (after.entropy < after.entropy_limit).all()


@pytest.mark.parametrize("strategy", ["sample", "greedy", "exact", "random"])
def test_given_orders_are_the_only_ones(strategy):
    """In proportion to their likelihoods where they are sampled, the best one where a search takes it."""
    model = tiny_llama(VOCAB)
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 2]]), "labels": torch.tensor([[-100, 5, 6, 7, 2]])}
    orders = [(0, 1, 2), (2, 0, 1)]
    loss = OrderSearchLoss(strategy, warmup_steps=0, orders=orders)
    torch.manual_seed(0)
    seen = Counter(tuple(loss.choose(model, inputs).inputs["labels"][0, 1:4].tolist()) for _ in range(400))
    target = split_target(inputs["labels"][0].tolist(), None, {2})
    scores = [
        log_likelihood(model, one_row(model, inputs, 0, target, [target.segments[i] for i in order]))
        for order in orders
    ]
    p = {"random": torch.tensor([0.5, 0.5]), "sample": torch.cat(scores).double().softmax(0)}.get(strategy)
    if p is None:
        assert seen == {((5, 6, 7), (7, 5, 6))[int(torch.cat(scores).argmax())]: 400}
    else:
        assert chisquare([seen[5, 6, 7], seen[7, 5, 6]], 400 * p.double().numpy()).pvalue > 1e-3
    chosen = loss.choose(model, inputs)
    assert chosen.entropy_limit.item() == pytest.approx(math.log(2))
    if strategy != "random":
        p = torch.cat(scores).softmax(0)
        assert chosen.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-3)


def test_sampling_leaves_no_trace():
    """Dropout is off while orders are chosen, modules keep their modes, settings their values, weights no gradient."""
    model = tiny_bart().train()
    model.model.encoder.eval()
    settings = model.generation_config
    modes = [module.training for module in model.modules()]
    inputs = seq2seq_batch(begin=(0,), end=(2,))
    loss = OrderSearchLoss("greedy", separator_id=SEP)
    first = loss.choose(model, inputs)
    again = loss.choose(model, inputs)  # dropout 0.1 would change the choice's entropy
    assert torch.equal(first.entropy, again.entropy)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is settings
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(inputs["labels"], seq2seq_batch(begin=(0,), end=(2,))["labels"])


@pytest.mark.parametrize("strategy", ["sample", "greedy", "exact", "random"])
def test_rows_without_a_target_pass(strategy):
    """Beside others, and alone."""
    model, inputs, _ = made("llama")
    inputs["labels"][1] = -100
    loss = OrderSearchLoss(strategy, separator_id=SEP, warmup_steps=0)
    chosen = loss.choose(model, inputs)
    assert (chosen.inputs["labels"][1] == -100).all()
    assert (chosen.entropy[1], chosen.entropy_limit[1]) == (0, 0)
    alone = {name: value[1:2] for name, value in inputs.items()}
    assert torch.equal(loss.choose(model, alone).inputs["input_ids"], alone["input_ids"])


@every_model
def test_loss_is_the_models_loss_of_that_order(case):
    model, inputs, separator = made(case)
    loss = OrderSearchLoss("exact", separator_id=separator)
    got = loss(model, inputs)
    want = model(**loss.choose(model, inputs).inputs).loss
    assert got.item() == pytest.approx(want.item())
    assert got.item() < model(**inputs).loss.item() + 1e-6
    got.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_decoder_inputs_that_came_with_the_batch_are_shifted_anew():
    model, inputs, _ = made("t5")
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(inputs["labels"])
    chosen = OrderSearchLoss("exact", separator_id=SEP).choose(model, inputs).inputs
    assert not torch.equal(chosen["labels"], inputs["labels"])
    assert torch.equal(chosen["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(chosen["labels"]))


def test_ids_of_ones_own_stay_at_the_end():
    model = tiny_t5()
    inputs = {"input_ids": torch.tensor([[4]]), "labels": torch.tensor([[5, SEP, 6, SEP, 7, 1, 20]])}
    for seed in range(6):
        torch.manual_seed(seed)
        loss = OrderSearchLoss("random", separator_id=SEP, fixed_ids=[20])
        assert loss.choose(model, inputs).inputs["labels"][0, -2:].tolist() == [1, 20]


def test_many_equal_segments_are_few_orders():
    model = tiny_t5()
    labels = torch.tensor([[5] * 12 + [6, 1]])
    chosen = OrderSearchLoss("exact").choose(model, {"input_ids": torch.tensor([[4]]), "labels": labels})
    assert chosen.entropy_limit.item() == pytest.approx(math.log(13), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrderSearchLoss("best"), r"strategy \('best'\) must be one of 'sample', 'greedy', 'exact'"),
        (lambda: OrderSearchLoss(warmup_steps=-1), r"warmup_steps \(-1\) must be 0 or more"),
        (lambda: OrderSearchLoss("exact", num_samples=3), r"num_samples \(3\) must be 1.* strategy is 'exact'"),
        (lambda: OrderSearchLoss(num_samples=0), r"num_samples \(0\) must be 1"),
        (
            lambda: OrderSearchLoss("exact").choose(
                tiny_t5(), {"input_ids": torch.tensor([[4]]), "labels": torch.tensor([[4, 5, 6, 7, 8, 1]])}
            ),
            r"labels of row 0 hold a set with 120 orders, but at most 24 are compared",
        ),
        (
            lambda: OrderSearchLoss(orders=[(0, 1), (1, 0)]).choose(
                tiny_t5(), {"input_ids": torch.tensor([[4]]), "labels": torch.tensor([[4, 5, 6, 1]])}
            ),
            r"orders \(\[\(0, 1\), \(1, 0\)\]\) must be permutations of 0 to 2 because the set of row 0 has 3",
        ),
        (
            lambda: OrderSearchLoss().choose(
                tiny_llama(VOCAB), {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5]])}
            ),
            r"labels of row 0 begin with a target \(4\), but a causal model",
        ),
        (
            lambda: OrderSearchLoss().choose(
                tiny_llama(VOCAB),
                {
                    "input_ids": torch.tensor([[1, 4, 5], [0, 6, 5]]),
                    "labels": torch.tensor([[-100, 4, 5], [-100, 6, 5]]),
                    "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
                },
            ),
            r"labels of row 1 begin with a target \(6\), but a causal model",
        ),
        (
            lambda: OrderSearchLoss().choose(
                tiny_llama(VOCAB), {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[-100, 6]])}
            ),
            r"labels must be the input_ids with -100 on the prompt",
        ),
        (lambda: split_target([5, -100, 6], SEP, (), row=3), r"labels of row 3 hold -100 .* tokens 0 and 2"),
        (lambda: split_target([5, SEP, SEP, 6], SEP, (), row=2), r"labels of row 2 .* separator_id \(9\)"),
        (
            lambda: SortedSegments(list, causal=True)([{"labels": [5, 6], "input_ids": [5]}]),
            r"input_ids of row 0 \(1 tokens\) must be as long as its labels \(2\)",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_separator_behind_every_segment_stays_there():
    target = split_target([4, 5, SEP, 6, SEP, 7, SEP, 1], SEP, [1])
    assert target.segments == ((4, 5), (6,), (7,))
    assert target.ids(sorted(target.segments, reverse=True)) == [7, SEP, 6, SEP, 4, 5, SEP, 1]


def test_collators_reorder_before_anything_is_shifted():
    model = tiny_t5()
    tokenizer = PadOnly()
    features = [{"input_ids": [4, 5], "labels": [8, SEP, 6, 7, SEP, 5, 1]}, {"input_ids": [6], "labels": [7, 1]}]
    batch = SortedSegments(DataCollatorForSeq2Seq(tokenizer, model), SEP, fixed_ids=[1])(features)
    assert batch["labels"].tolist() == [[5, SEP, 6, 7, SEP, 8, 1], [7, 1] + [-100] * 5]
    assert batch["decoder_input_ids"][0].tolist() == [0, 5, SEP, 6, 7, SEP, 8]
    assert features[0]["labels"] == [8, SEP, 6, 7, SEP, 5, 1]
    by_length = SortedSegments(list, SEP, fixed_ids=[1], key=lambda ids: -len(ids))(features)
    assert by_length[0]["labels"] == [6, 7, SEP, 8, SEP, 5, 1]


def test_random_collator_moves_the_text_of_causal_rows_too():
    feature = {"input_ids": [1, 4, 5, SEP, 6, 7, SEP, 8, 2], "labels": [-100, -100, 5, SEP, 6, 7, SEP, 8, 2]}
    seen = set()
    torch.manual_seed(0)
    for _ in range(60):
        (row,) = RandomSegments(list, SEP, fixed_ids=[2], causal=True)([feature])
        assert row["input_ids"][:2] == [1, 4]
        assert row["input_ids"][2:] == row["labels"][2:]
        seen.add(tuple(row["labels"][2:]))
    assert len(seen) == 6


class PadOnly:
    """As much of a tokenizer as the collator asks for."""

    padding_side, pad_token_id, deprecation_warnings = "right", 0, {}

    def pad(self, features, **options):
        return {
            "input_ids": padded([feature["input_ids"] for feature in features], 0),
            "attention_mask": padded([[1] * len(feature["input_ids"]) for feature in features], 0),
        }


def toy_rows(count=32):
    """Sets of three different tokens and an input that names them."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        items = (torch.randperm(6, generator=generator)[:3] + 10).tolist()
        rows.append({"input_ids": items, "labels": [items[0], SEP, items[1], SEP, items[2], 1]})
    return rows


def collate(features):
    return {
        "input_ids": torch.tensor([feature["input_ids"] for feature in features]),
        "labels": torch.tensor([feature["labels"] for feature in features]),
    }


def arguments(folder, cls=TrainingArguments, **options):
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 0.02,
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
    return cls(str(folder), **options)


def trainer(folder, search, cls=OrderSearchTrainer, model=None, **options):
    args_class = Seq2SeqTrainingArguments if issubclass(cls, Seq2SeqTrainer) else TrainingArguments
    return cls(
        model or tiny_t5(),
        arguments(folder, args_class, **options),
        train_dataset=toy_rows(),
        eval_dataset=toy_rows(8),
        data_collator=collate,
        order_search=search,
    )


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_trainer_logs_entropy_and_warms_up(tmp_path):
    run = trainer(tmp_path, OrderSearchLoss("greedy", warmup_steps=4, separator_id=SEP))
    run.train()
    logs = [entry for entry in run.state.log_history if "order_entropy" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    limit = math.log(6)
    assert all(entry["order_entropy_limit"] == pytest.approx(limit) for entry in logs)
    assert [entry["order_entropy"] for entry in logs[:2]] == pytest.approx([limit, limit])
    assert 0 < logs[2]["order_entropy"] < limit


@pytest.mark.parametrize(
    "case", ["llama", "pointer"]
)  # T5 and BART do not take num_items_in_batch, though they say so
def test_accumulated_micro_batches_equal_one_batch(tmp_path, case):
    build, batch, separator = CASES[case]
    batch = batch()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]  # targets of different lengths
    final = []
    for cut in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4}):
        options = {"per_device_train_batch_size": 1, "learning_rate": 0.1, "max_steps": 4} | cut
        run = OrderSearchTrainer(
            build(),
            arguments(tmp_path, **options),
            train_dataset=rows,
            data_collator=default_collate,
            order_search=OrderSearchLoss("greedy", warmup_steps=0, separator_id=separator),
        )
        run.train()
        final.append((weights(run.model), run.state.log_history[0]["order_entropy"]))
    torch.testing.assert_close(final[1], final[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(final[0][0], weights(build()), atol=1e-3)


def test_several_samples_are_averaged(tmp_path):
    model = tiny_t5()
    search = OrderSearchLoss("random", num_samples=3, separator_id=SEP)
    run = trainer(tmp_path, search, model=model)
    batch = collate(toy_rows(4))
    model.train()
    torch.manual_seed(3)
    items = (batch["labels"] != -100).sum()
    got = run.compute_loss(model, batch, num_items_in_batch=items)
    torch.manual_seed(3)
    want = model(**search.choose(model, batch).inputs).loss
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_evaluation_measures_the_greedy_order_and_generation_still_works(tmp_path):
    class SetTrainer(OrderSearchTrainerMixin, Seq2SeqTrainer):
        """Generates in evaluation."""

    run = trainer(
        tmp_path,
        OrderSearchLoss("sample", separator_id=SEP),
        SetTrainer,
        predict_with_generate=True,
        generation_max_length=8,
        per_device_eval_batch_size=8,
    )
    metrics = run.evaluate()
    greedy = OrderSearchLoss("greedy", separator_id=SEP).choose(run.model, collate(toy_rows(8))).inputs
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(run.model(**greedy).loss.item(), rel=1e-4)


def test_adapters_train_on_searched_orders(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_t5(), LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"]))
    settings = model.generation_config
    run = trainer(tmp_path, OrderSearchLoss("sample", warmup_steps=0, separator_id=SEP), model=model)
    before = weights(model)
    run.train()
    assert not torch.equal(weights(model), before)
    assert model.generation_config is settings


def test_pointer_network_learns_with_a_search(tmp_path):
    rows = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(64):
        labels = torch.cat([torch.randperm(3, generator=generator) + 1, torch.zeros(1, dtype=torch.long)])
        rows.append({"input_values": torch.rand(3, 1, generator=generator), "labels": labels})
    run = OrderSearchTrainer(
        pointer(),
        arguments(tmp_path, max_steps=30, optim="adamw_torch", learning_rate=0.01, logging_steps=10),
        train_dataset=rows,
        data_collator=PointerDataCollator(),
        order_search=OrderSearchLoss("sample", warmup_steps=5),
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
