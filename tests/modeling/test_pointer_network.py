"""Pointer networks: logits by their definition, every encoder under padding, losses, and errors."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, DynamicCache, T5Config

from undersong.modeling.pointer_network.configuration_pointer_network import PointerNetworkConfig
from undersong.modeling.pointer_network.modeling_pointer_network import (
    PointerNetworkForConditionalGeneration,
    PointerNetworkModel,
)

from .pointer_models import KINDS, build, naive_logits, padded, points

pytestmark = pytest.mark.usefixtures("one_thread")
every_kind = pytest.mark.parametrize("kind", KINDS)
LENGTHS = (5, 3, 1)
IDS = ([0, 2, 5, 1, 2], [0, 3, 1, 1, 2], [0, 1, 1, 1, 1])  # decoder inputs of rows with that many points


def rows():
    return [points(1, n, seed=n)[0] for n in LENGTHS]


def close(got, want, atol=1e-11):
    assert got.shape == want.shape
    assert torch.equal(got.isfinite(), want.isfinite())
    there = want.isfinite()
    assert (got[there] - want[there]).abs().max() <= atol


@pytest.mark.parametrize("kind", ["lstm", "two layers, two glimpses", "blend"])
@pytest.mark.parametrize("clip", [None, 3.0])
@torch.no_grad()
def test_logits_are_those_of_a_loop_over_the_equations(kind, clip):
    model = build(kind, logit_clip=clip)
    values, mask = padded(rows())
    logits = model(values, mask, torch.tensor(IDS)).logits
    for index, (row, ids) in enumerate(zip(rows(), IDS, strict=True)):
        close(logits[index, :, : 1 + len(row)], naive_logits(model, row, ids))
        assert (logits[index, :, 1 + len(row) :] == -torch.inf).all()


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind, side):
    model = build(kind)
    values, mask = padded(rows(), side)
    shift = [(max(LENGTHS) - n) * (side == "left") for n in LENGTHS]  # ids are columns
    ids = [[i and i + more for i in row] for row, more in zip(IDS, shift, strict=True)]
    outputs = model(values, mask, torch.tensor(ids), use_cache=False)
    for index, (row, row_ids) in enumerate(zip(rows(), IDS, strict=True)):
        alone = model(row[None], decoder_input_ids=torch.tensor([row_ids])).logits[0]
        columns = mask[index].nonzero().flatten() + 1
        close(outputs.logits[index][:, [0, *columns.tolist()]], alone)
        assert (outputs.logits[index][:, 1:][:, mask[index] == 0] == -torch.inf).all()
        assert (outputs.encoder_last_hidden_state[index][mask[index] == 0] == 0).all()


@every_kind
@pytest.mark.parametrize("splits", [[1, 1, 1, 1, 1], [2, 3]])
@torch.no_grad()
def test_teacher_forcing_equals_decoding_through_a_cache(kind, splits):
    model = build(kind)
    values, mask = padded(rows())
    ids, cache, logits = torch.tensor(IDS), DynamicCache(), []
    encoded = model.get_encoder()(values, mask)
    for chunk in ids.split(splits, 1):
        outputs = model(None, mask, chunk, encoder_outputs=encoded, past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
    close(torch.cat(logits, 1), model(values, mask, ids, use_cache=False).logits)
    assert cache.get_seq_length() == 5


def test_a_cache_projects_the_memory_once():
    model, x = build("two layers, two glimpses"), points(2, 4)
    calls = []
    for module in (model.attention, *(glimpse.attention for glimpse in model.model.glimpses)):
        module.key_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate(x, max_new_tokens=5, min_new_tokens=5)
    assert len(calls) == 3
    model.generate(x, max_new_tokens=5, min_new_tokens=5, use_cache=False)
    assert len(calls) == 3 + 5 * 3


@torch.no_grad()
def test_decoding_a_set_follows_its_permutation_and_that_of_a_sequence_does_not():
    order = torch.tensor([3, 0, 4, 1, 2])
    x, ids = points(2, 5), torch.tensor([[0, 4, 1], [0, 2, 5]])
    moved = torch.where(ids == 0, 0, order.argsort()[(ids - 1).clamp(min=0)] + 1)  # the same points, at new columns
    for kind, follows in (("set", True), ("lstm", False)):
        model = build(kind)
        want = model(x, decoder_input_ids=ids).logits[..., [0, *(order + 1).tolist()]]
        difference = (model(x[:, order], decoder_input_ids=moved).logits - want).abs().max()
        assert (difference < 1e-12) == follows, f"{kind}: {difference}"


@torch.no_grad()
def test_items_may_be_ids_embeddings_or_values():
    model = build(item_vocab_size=11, input_size=4)
    ids, steps = torch.tensor([[3, 7, 3, 10]]), torch.tensor([[0, 2, 4]])
    table = model.get_input_embeddings()
    want = model(input_ids=ids, decoder_input_ids=steps).logits
    close(model(inputs_embeds=table(ids), decoder_input_ids=steps).logits, want, atol=0)
    close(model(table(ids), decoder_input_ids=steps).logits, want, atol=0)
    sequences = model.generate(input_ids=ids).tolist()
    assert model.generate(ids).tolist() == sequences
    assert model.generate(inputs_embeds=table(ids)).tolist() == sequences
    assert model.generate(input_values=table(ids)).tolist() == sequences


def definition_of_the_loss(logits, labels):
    """Negative log likelihoods of all labels but -100."""
    losses = []
    for row, targets in zip(logits, labels.tolist(), strict=True):
        losses += [-step.log_softmax(-1)[target] for step, target in zip(row, targets, strict=True) if target != -100]
    return torch.stack(losses)


LABELS = torch.tensor([[2, 5, 1, 2, 0], [3, 1, 0, -100, -100], [1, 0, -100, -100, -100]])
SHIFTED = torch.tensor([[0, 2, 5, 1, 2], [0, 3, 1, 0, 0], [0, 1, 0, 0, 0]])


@torch.no_grad()
def test_the_loss_is_the_mean_over_labels_and_step_t_predicts_label_t():
    model = build()
    values, mask = padded(rows())
    outputs = model(values, mask, labels=LABELS)
    close(outputs.logits, model(values, mask, SHIFTED).logits, atol=0)
    losses = definition_of_the_loss(outputs.logits, LABELS)
    assert outputs.loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    shared = model(values, mask, labels=LABELS, num_items_in_batch=torch.tensor(20)).loss
    assert shared.item() == pytest.approx(losses.sum().item() / 20, rel=1e-6)
    assert outputs.past_key_values is None
    given = model(values, mask, SHIFTED, labels=LABELS).loss
    assert given.item() == outputs.loss.item()


@torch.no_grad()
def test_label_smoothing_spreads_over_what_can_be_pointed_at():
    values, mask = padded(rows())
    outputs = build(label_smoothing=0.2)(values, mask, labels=LABELS)
    plain = definition_of_the_loss(outputs.logits, LABELS)
    uniform = torch.stack([
        -outputs.logits[row, step].log_softmax(-1)[: 1 + LENGTHS[row]].mean()
        for row, step in (LABELS != -100).nonzero().tolist()
    ])  # fmt: skip
    want = 0.8 * plain + 0.2 * uniform
    assert outputs.loss.item() == pytest.approx(want.mean().item(), rel=1e-6)
    shared = build(label_smoothing=0.2)(values, mask, labels=LABELS, num_items_in_batch=20).loss
    assert shared.item() == pytest.approx(want.sum().item() / 20, rel=1e-6)


@torch.no_grad()
def test_visited_items_can_be_left_out_under_teacher_forcing():
    model, plain, x = build(mask_visited_in_training=True), build(), points(1, 3)
    labels = torch.tensor([[2, 3, 1, 0]])
    logits = model(x, labels=labels).logits[0]
    gone = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).bool()
    assert torch.equal(logits == -torch.inf, gone)
    close(logits[~gone], plain(x, labels=labels).logits[0][~gone], atol=0)
    assert model(x, labels=labels).loss < 1e-6 + plain(x, labels=labels).loss
    close(model(x, decoder_input_ids=labels).logits, plain(x, decoder_input_ids=labels).logits, atol=0)
    with pytest.raises(ValueError, match=r"labels \(row 0 points at 2 again at step 3\) must not repeat an item"):
        model(x, labels=torch.tensor([[2, 3, 1, 2, 0]]))


@pytest.mark.parametrize("kind", ["lstm", "set"])
def test_a_training_step_can_be_recorded_in_a_graph(kind):
    """While a graph is recorded no value may be looked at; tensors without values show that none is."""
    with FakeTensorMode():
        config = PointerNetworkConfig(hidden_size=8, encoder_type=kind, max_num_points=4)
        model = PointerNetworkForConditionalGeneration(config).train()
        labels = torch.zeros(3, 5, dtype=torch.long)
        mask = torch.ones(3, 4) if kind == "set" else None  # to pack rows for an LSTM, their lengths must be known
        model(torch.zeros(3, 4, 2), mask, labels=labels).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


@every_kind
def test_a_row_without_items_has_finite_gradients_and_ends(kind):
    model = build(kind).train()
    values, mask = padded([*rows(), points(1, 2)[0]])
    mask[3] = 0
    outputs = model(values, mask, labels=torch.tensor([*LABELS.tolist(), [0, -100, -100, -100, -100]]))
    outputs.loss.backward()
    unused = ("embeddings.word_embeddings", "pooler")
    for key, parameter in model.named_parameters():
        if not any(name in key for name in unused):
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    assert (outputs.logits[3, :, 1:] == -torch.inf).all()
    assert outputs.logits[3, :, 0].isfinite().all()


def test_logits_stay_float32_in_half_precision_and_within_the_clip():
    for kind in KINDS:
        x = points(2, 4, dtype=torch.bfloat16)
        logits = build(kind, torch.bfloat16)(x, decoder_input_ids=torch.tensor([[0, 1], [0, 2]])).logits
        assert logits.dtype == torch.float32
        assert logits.isfinite().all()
    assert build(logit_clip=0.25, initializer_range=9.0)(points(2, 4)).logits.abs().max() <= 0.25


def test_attention_maps_of_encoder_and_glimpses_are_distributions():
    values, mask = padded(rows())
    outputs = build("set")(values, mask, torch.tensor(IDS), output_attentions=True)
    assert len(outputs.encoder_attentions) == 3
    assert len(outputs.cross_attentions) == 1
    assert outputs.cross_attentions[0].shape == (3, 1, 5, 6)
    for maps in (*outputs.encoder_attentions, *outputs.cross_attentions):
        assert torch.allclose(maps.sum(-1), torch.ones(()).double())
    assert (outputs.cross_attentions[0][..., 1:][:, 0].transpose(1, 2)[mask == 0] == 0).all()


def test_dropout_acts_in_training_only():
    model, x = build("two layers, two glimpses", dropout=0.5), points(2, 4)
    with torch.no_grad():
        assert torch.equal(model(x).logits, model(x).logits)
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("kind", ["lstm", "set", "blend"])
def test_initial_weights_are_uniform_within_their_range(kind):
    model = build(kind, initializer_range=0.08, hidden_size=32)
    values = torch.cat([parameter.flatten() for parameter in model.parameters()])
    assert values.abs().max() <= 0.08
    assert values.std().item() == pytest.approx(0.08 / 3**0.5, rel=0.05)
    normal = build(kind, initializer_range=0.08, hidden_size=32, init_distribution="normal")
    assert normal.attention.query_proj.weight.abs().max() > 0.2
    assert all(parameter.isfinite().all() for parameter in normal.parameters())


@every_kind
def test_saving_keeps_everything(kind, tmp_path):
    model = build(kind)
    model.generation_config.task = "tour"
    model.save_pretrained(tmp_path)
    loaded = PointerNetworkForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    got, want = loaded.config.to_dict(), model.config.to_dict()
    for name in PointerNetworkConfig.__annotations__.keys() - {"encoder_config"}:
        assert got[name] == want[name], name
    assert loaded.generation_config.task == "tour"
    with torch.no_grad():
        x, ids = points(2, 5), torch.tensor([[0, 1], [0, 3]])
        close(loaded(x, decoder_input_ids=ids).logits, model(x, decoder_input_ids=ids).logits)
    if kind == "transformer":
        assert isinstance(loaded.config.encoder_config, BertConfig)
        assert loaded.config.encoder_config.intermediate_size == 8


def check(message, *args, model=None, **kwargs):
    with pytest.raises(ValueError, match=message):
        (model or build())(*args, **kwargs)


def test_bad_items_are_named():
    x = points(2, 5)
    check(r"items are missing; pass one of input_values, input_ids and inputs_embeds")
    check(r"items are given as input_values and inputs_embeds; pass exactly one", x, inputs_embeds=x)
    check(r"input_values has shape \[2, 5, 3\] but the model takes \[batch, n, input_size=2\]", points(2, 5, size=3))
    check(r"inputs_embeds has shape \[5, 2\]", inputs_embeds=x[0])
    check(r"input_ids have shape \[2, 5, 2\]", input_ids=x.long(), model=build(item_vocab_size=5))
    check(r"input_ids need an embedding table, but item_vocab_size is None", input_ids=torch.tensor([[1, 2]]))
    check(
        r"items have shape \[2\]; pass \[batch, n, ...\]",
        input_ids=torch.tensor([1, 2]),
        model=build(item_vocab_size=5),
    )
    check(r"a row has 5 items but max_num_points is 4", x, model=build(max_num_points=4))
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])
    assert build(max_num_points=4)(x, mask).logits.shape == (2, 1, 6)  # padding is no item
    check(r"encoder_outputs \(tuple\) must hold final_state and item_values", encoder_outputs=(x,))


def test_bad_masks_are_named():
    x = points(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]])
    check(r"attention_mask \(row 1 is \[1, 1, 0, 1, 0\]\) has padding between items", x, mask)
    check(r"attention_mask \(row 0 is \[1, 0, 0, 0, 1\]\) has padding", x[:1], torch.tensor([[1, 0, 0, 0, 1]]))
    check(r"attention_mask has shape \[2, 4\] but the items are \[batch, n\] = \[2, 5\]", x, mask[:, :4])
    encoded = build().get_encoder()(x)
    check(r"attention_mask has shape \[2, 4\]", None, mask[:, :4], encoder_outputs=encoded)


def test_bad_targets_are_named():
    x, mask = points(2, 5), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    labels = torch.tensor([[1, 4, 0], [3, 0, -100]])
    check(r"labels \(row 0 has 4 at step 1\) must be ids of that row: 1 to 3 for its items", x, mask, labels=labels)
    labels = torch.tensor([[1, 3, 0], [3, 2, 0]])
    check(r"labels \(row 1 has 2 at step 1\) must be ids of that row: 3 to 5 for its items", x, mask, labels=labels)
    check(r"labels \(row 1 has 6 at step 0\)", x, labels=torch.tensor([[1, 0], [6, 0]]))
    check(r"labels \(row 0 has -1 at step 0\)", x, labels=torch.tensor([[-1, 0], [5, 0]]))
    check(r"labels \(row 0 has 1 at step 0\) .* none, for it has no items", x, mask * 0, labels=labels)
    check(
        r"labels \(torch.int64, shape \[3\]\) must be integers \[batch, T\] with batch 2",
        x,
        labels=torch.ones(3).long(),
    )
    check(r"labels \(torch.float32, shape \[2, 3\]\)", x, labels=torch.ones(2, 3))
    check(r"labels \(torch.int64, shape \[1, 2\]\)", x, labels=torch.ones(1, 2).long())
    check(r"decoder_input_ids \(row 1 has 6 at step 1\) must be", x, None, torch.tensor([[0, 5], [0, 6]]))
    check(
        r"labels \[2, 2\] and decoder_input_ids \[2, 1\] must have one shape",
        x,
        decoder_input_ids=torch.zeros(2, 1).long(),
        labels=torch.tensor([[1, 0], [2, 0]]),
    )


def test_a_cache_of_other_items_is_refused():
    model = build()
    cache = model(points(2, 5), use_cache=True).past_key_values
    check(
        r"past_key_values continues a batch of 2 with 5 items, but the items are \[batch, n\] = \[2, 4\]",
        points(2, 4),
        model=model,
        past_key_values=cache,
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": 2}, r"eos_token_id \(2\) must be 0"),
        ({"pad_token_id": 1}, r"pad_token_id \(1\) must be 0"),
        ({"hidden_size": 7, "encoder_type": "bilstm"}, r"hidden_size \(7\) must be even .* use hidden_size=8"),
        (
            {"encoder_type": "transformer"},
            r"encoder_type \('transformer'\) and encoder_config \(NoneType\) do not fit",
        ),
        ({"encoder_config": BertConfig()}, r"encoder_type \('lstm'\) and encoder_config \(BertConfig\) do not fit"),
        (
            {"encoder_type": "transformer", "encoder_config": {"hidden_size": 4}},
            r"\(\['hidden_size'\]\) has no model_type",
        ),
        ({"attention_mode": "blend"}, r"max_num_points \(None\) must be given for attention_mode='blend'"),
        ({"logit_clip": -1.0}, r"logit_clip \(-1.0\) must be positive"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must lie in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"label_smoothing \(-0.1\) must lie in \[0, 1\)"),
        ({"num_glimpses": -1}, r"num_glimpses \(-1\) must be at least 0"),
        ({"input_size": 0}, r"input_size \(0\) must be at least 1"),
    ],
)
def test_configurations_that_cannot_work_are_named(values, message):
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match=message):
        PointerNetworkConfig(**values)


def test_an_encoder_with_a_decoder_is_refused():
    with pytest.raises(ValueError, match=r"encoder_config \(t5\) has a decoder of its own"):
        PointerNetworkModel(PointerNetworkConfig(encoder_type="transformer", encoder_config=T5Config()))


def test_there_is_no_vocabulary_to_resize():
    model = build()
    assert model.get_output_embeddings() is None
    with pytest.raises(NotImplementedError, match="no vocabulary to resize: it is the items of each batch"):
        model.resize_token_embeddings(7)
    with pytest.raises(NotImplementedError, match="no output embeddings: its vocabulary is its input"):
        model.set_output_embeddings(torch.nn.Linear(2, 2))
