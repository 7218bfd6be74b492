"""The promises of a recurrent model (design: "Recurrent models"), for every row of the registry.

In float64, so that equality is tested at 1e-9 and no tolerance hides a wrong state.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from .cases import RECURRENT, build, close, make_inputs, name

pytestmark = pytest.mark.parametrize("row", RECURRENT, ids=name)
MODELS = {}


def model_of(row):
    if row.model_type not in MODELS:
        MODELS[row.model_type] = build(row, dtype=torch.float64)
    return MODELS[row.model_type]


def run(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs)


def compacted(model, ids, mask):
    """Every row alone, without its padding; zeros at the padding."""
    rows = []
    for row_ids, row_mask in zip(ids, mask.bool(), strict=True):
        hidden = torch.zeros(ids.shape[1], model.config.hidden_size, dtype=model.dtype)
        if row_mask.any():
            hidden[row_mask] = run(model, row_ids[row_mask][None], use_cache=False).last_hidden_state[0]
        rows.append(hidden)
    return torch.stack(rows)


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_any_split_equals_the_full_pass(row, lengths):
    model = model_of(row)
    ids = make_inputs(model, 2, sum(lengths))["input_ids"]
    want = run(model, ids, use_cache=False).last_hidden_state
    cache, chunks = DynamicCache(), []
    for chunk in ids.split(lengths, dim=1):
        chunks.append(run(model, chunk, past_key_values=cache, use_cache=True).last_hidden_state)
    close(torch.cat(chunks, 1), want)
    assert cache.get_seq_length() == sum(lengths)


@settings(max_examples=20, deadline=None)
@given(data=st.data(), length=st.integers(1, 12), batch=st.integers(1, 3))
def test_padding_anywhere_equals_the_compacted_row_for_any_split(row, data, length, batch):
    model = model_of(row)
    ids = make_inputs(model, batch, length)["input_ids"]
    bits = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    mask = torch.tensor(bits).view(batch, length).long()
    want = compacted(model, ids, mask)
    valid = mask.bool().unsqueeze(-1)

    full = run(model, ids, attention_mask=mask, use_cache=False).last_hidden_state
    close(full * valid, want)
    split = data.draw(st.integers(0, length))
    cache, chunks = None, []
    for begin, end in ((0, split), (split, length)):
        if begin == end:
            continue
        outputs = run(model, ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        chunks.append(outputs.last_hidden_state)
    close(torch.cat(chunks, 1) * valid, want)


@pytest.mark.parametrize("sides", ["left", "right", "middle", "whole row"])
def test_named_paddings(row, sides):
    model = model_of(row)
    ids = make_inputs(model, 2, 8)["input_ids"]
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, {"left": slice(0, 3), "right": slice(5, 8), "middle": slice(2, 5), "whole row": slice(0, 8)}[sides]] = 0
    got = run(model, ids, attention_mask=mask).last_hidden_state
    assert torch.isfinite(got).all()
    close(got * mask.unsqueeze(-1), compacted(model, ids, mask))
    # what stands at the padding is of no consequence
    other = torch.where(mask.bool(), ids, (ids + 1) % model.config.vocab_size)
    again = run(model, other, attention_mask=mask).last_hidden_state
    close(again * mask.unsqueeze(-1), got * mask.unsqueeze(-1))


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(1, 8), min_size=2, max_size=5))
def test_packed_equals_separate_however_it_is_said(row, lengths):
    model = model_of(row)
    ids = make_inputs(model, 1, sum(lengths))["input_ids"]
    want = torch.cat([run(model, part, use_cache=False).last_hidden_state for part in ids.split(lengths, dim=1)], 1)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    for packing in ({"position_ids": position_ids}, {"seq_idx": seq_idx}, {"cu_seq_lens_q": offsets}):
        close(run(model, ids, **packing).last_hidden_state, want)


def test_packed_rows_of_a_padded_batch_equal_separate(row):
    model = model_of(row)
    ids = make_inputs(model, 2, 9)["input_ids"]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0], [0, 0, 0, 1, 2, 3, 0, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    got = run(model, ids, position_ids=position_ids, attention_mask=mask).last_hidden_state
    for which, begin, end in ((0, 0, 3), (0, 3, 7), (1, 2, 6), (1, 6, 9)):
        close(got[which, begin:end], run(model, ids[which : which + 1, begin:end]).last_hidden_state[0])


def test_position_ids_of_left_padding_are_not_packing(row):
    """generate() gives left-padded rows 0, 0, 0, 1, 2."""
    model = model_of(row)
    ids = make_inputs(model, 1, 5)["input_ids"]
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    got = run(model, ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 0, 1, 2]]), use_cache=True)
    close(got.last_hidden_state[:, 2:], run(model, ids[:, 2:]).last_hidden_state)
    assert got.past_key_values.layers[0].valid_tokens.tolist() == [3]


def test_ambiguous_or_impossible_packing_raises(row):
    model = model_of(row)
    ids = make_inputs(model, 1, 6)["input_ids"]
    with pytest.raises(ValueError, match=r"position_ids go from 4 to 2 inside a row"):
        run(model, ids, position_ids=torch.tensor([[0, 3, 4, 2, 3, 4]]))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q describes one packed row but batch is 2"):
        run(model, ids.expand(2, -1), cu_seq_lens_q=torch.tensor([0, 3, 6], dtype=torch.int32))
    with pytest.raises(ValueError, match="exclude each other"):
        run(model, ids, attention_mask=torch.ones_like(ids), cu_seq_lens_q=torch.tensor([0, 6], dtype=torch.int32))
    cache = run(model, ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot continue a cache"):
        run(model, ids, position_ids=torch.tensor([[6, 7, 8, 0, 1, 2]]), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        run(model, ids, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="attention_mask covers 5 positions but the input has 6"):
        run(model, ids, attention_mask=torch.ones(1, 5))


def test_batch_rows_are_independent(row):
    model = model_of(row)
    ids = make_inputs(model, 3, 7)["input_ids"]
    together = run(model, ids).last_hidden_state
    for index in range(3):
        close(run(model, ids[index : index + 1]).last_hidden_state[0], together[index])


@pytest.mark.parametrize("change", ["reorder", "repeat", "select"])
def test_cache_rows_can_be_reordered_repeated_selected(row, change):
    model = model_of(row)
    ids = make_inputs(model, 3, 6)["input_ids"]
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]])
    rows = {"reorder": [2, 2, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 0]}[change]
    cache = run(model, ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    if change == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
    else:
        cache.batch_select_indices(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    got = run(model, ids[rows, 5:], attention_mask=mask[rows], past_key_values=cache).last_hidden_state
    close(got, run(model, ids, attention_mask=mask).last_hidden_state[rows, 5:])


def test_state_has_a_fixed_size_and_reset_forgets(row):
    model = model_of(row)

    def size(cache):
        return sum(state.nelement() for layer in cache.layers for state in layer.states.values())

    short = run(model, make_inputs(model, 2, 3)["input_ids"], use_cache=True).past_key_values
    long_ids = make_inputs(model, 2, 60, seed=1)["input_ids"]
    cache = run(model, long_ids, use_cache=True).past_key_values
    assert size(short) == size(cache) > 0
    cache.reset()
    assert cache.get_seq_length() == 0
    again = run(model, long_ids, past_key_values=cache, use_cache=True)
    close(again.last_hidden_state, run(model, long_ids, use_cache=False).last_hidden_state, atol=0)
    with pytest.raises(RuntimeError, match="needs a cache that can roll back"):
        cache.crop(-1)
    assert not cache.is_croppable


def test_gradients_flow_through_a_carried_state(row):
    model = build(row, dtype=torch.float64)
    ids = make_inputs(model, 2, 8)["input_ids"]
    weight = torch.randn(2, 8, model.config.hidden_size, dtype=torch.float64)

    def gradients(*lengths):
        model.zero_grad()
        cache, loss = None, 0.0
        for chunk, chunk_weight in zip(ids.split(lengths, 1), weight.split(lengths, 1), strict=True):
            outputs = model(input_ids=chunk, past_key_values=cache, use_cache=True)
            cache, loss = outputs.past_key_values, loss + (outputs.last_hidden_state * chunk_weight).sum()
        loss.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    whole, chunked = gradients(8), gradients(3, 1, 4)
    for key, gradient in whole.items():
        close(chunked[key], gradient, atol=1e-8 * max(1.0, gradient.abs().max().item()))


def test_half_precision_keeps_float32_states(row):
    # smaller weights than elsewhere: a norm per head (pLSTM) amplifies rounding where what the head reads is near 0
    full, half = build(row, initializer_range=0.1), build(row, initializer_range=0.1).to(torch.bfloat16)
    ids = make_inputs(full, 2, 24)["input_ids"]
    outputs = run(half, ids, use_cache=True)
    assert outputs.last_hidden_state.dtype == torch.bfloat16
    assert {state.dtype for layer in outputs.past_key_values.layers for state in layer.states.values()} == {
        torch.float32
    }
    want = run(full, ids).last_hidden_state
    error = (outputs.last_hidden_state.float() - want).norm() / want.norm()
    assert error < 0.03, f"bfloat16 differs from float32 by {error:.3f} of its norm"


def test_foreign_caches_are_refused_by_name(row):
    from transformers import StaticCache

    model = model_of(row)
    ids = make_inputs(model, 1, 4)["input_ids"]
    with pytest.raises(ValueError, match=r"past_key_values \(StaticCache\) cannot hold a recurrent state"):
        run(model, ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="already holds a DynamicLayer with content at layer 0"):
        run(model, ids, past_key_values=cache)


def test_the_self_attention_part_of_an_encoder_decoder_cache_is_adopted(row):
    from transformers import EncoderDecoderCache

    model = model_of(row)
    ids = make_inputs(model, 2, 6)["input_ids"]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    run(model, ids[:, :4], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 4
    got = run(model, ids[:, 4:], past_key_values=cache, use_cache=True).last_hidden_state
    close(got, run(model, ids, use_cache=False).last_hidden_state[:, 4:])


def test_a_cache_under_gradient_checkpointing_is_refused(row):
    model = build(row).train()
    model.gradient_checkpointing_enable()
    ids = make_inputs(model, 1, 4)["input_ids"]
    with pytest.raises(ValueError, match="past_key_values cannot be used while gradient checkpointing trains"):
        model(input_ids=ids, past_key_values=DynamicCache())
