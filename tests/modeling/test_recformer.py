"""Recformer's encoder: equal to transformers' Longformer, whatever the padding, backend or backbone."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LongformerConfig,
    LongformerModel,
    ModernBertConfig,
    ModernBertModel,
)

from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer import RecformerModel

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 200,
    "initializer_range": 0.3,
}
pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    return RecformerConfig(**{**SIZES, "attention_window": 8, "max_token_num": 150, **changes})


def build(**changes):
    torch.manual_seed(0)
    return RecformerModel(config(**changes)).eval()


def batch(lengths, width=None, seed=0, side="right"):
    """Histories of the given numbers of tokens, as a tokenizer makes them."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    inputs = {
        "input_ids": torch.full((len(lengths), width), 1),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.long),
        "token_type_ids": torch.full((len(lengths), width), 3),
        "item_position_ids": torch.full((len(lengths), width), 50),
    }
    for row, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        inputs["input_ids"][row, at] = torch.cat(
            [torch.zeros(1, dtype=torch.long), torch.randint(2, 99, (n - 1,), generator=generator)]
        )
        inputs["attention_mask"][row, at] = 1
        inputs["token_type_ids"][row, at] = torch.tensor([0, *([1, 2, 2] * n)][:n])
        inputs["item_position_ids"][row, at] = torch.tensor([0, *(min(50, 1 + i // 6) for i in range(n))][:n])
    return inputs


def stock_longformer(window=8):
    torch.manual_seed(0)
    stock = LongformerConfig(**SIZES, attention_window=window, pad_token_id=1, type_vocab_size=1, layer_norm_eps=1e-5)
    return LongformerModel(stock, add_pooling_layer=False).eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa_band", "flex_band"])
@pytest.mark.parametrize("lengths", [(37, 20, 5), (16, 16), (3, 2, 1)], ids=("ragged", "whole windows", "short"))
def test_without_its_own_embeddings_it_is_longformer(implementation, lengths):
    stock = stock_longformer()
    model = RecformerModel.from_encoder(stock, max_token_num=150).eval()
    model.set_attn_implementation(implementation)
    inputs = batch(lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    first = torch.zeros_like(ids)
    first[:, 0] = 1
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight[:] = stock.embeddings.token_type_embeddings.weight
        model.embeddings.item_position_embeddings.weight.zero_()
        want = stock(ids, attention_mask=mask, global_attention_mask=first, output_hidden_states=True)
        got = model(**inputs, output_hidden_states=True)
        pooled = model(**inputs, pooled_only=True).pooler_output
    valid = mask.bool()
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        torch.testing.assert_close(a[valid], b[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(got.pooler_output, want.last_hidden_state[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, want.last_hidden_state[:, 0], atol=1e-5, rtol=0)


def test_gradients_are_longformers():
    models = [build().double(), build().double()]
    models[1].set_attn_implementation("eager")
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for model in models:
        (model(**batch((37, 20, 5))).pooler_output @ direction).sum().backward()
    for (name, p), q in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, atol=1e-5, rtol=0, msg=name)  # its softmax is float32


def test_gradients_reach_the_recorded_hidden_states():
    outputs = build()(**batch((37, 20)), output_hidden_states=True)
    for state in outputs.hidden_states:
        state.retain_grad()
    outputs.pooler_output[:, 0].sum().backward()
    assert all(state.grad.abs().sum() > 0 for state in outputs.hidden_states)


def test_windows_may_differ_between_layers():
    model = build(attention_window=[4, 16])
    inputs = batch((60, 33))
    with torch.no_grad():
        outputs = {}
        for implementation in ("sdpa_band", "flex_band", "eager"):
            model.set_attn_implementation(implementation)
            outputs[implementation] = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    for got in outputs.values():
        torch.testing.assert_close(got, outputs["eager"], atol=1e-5, rtol=0)


def test_flex_band_agrees_over_many_blocks():
    """Sequences that begin and end inside, at and across the blocks of 128 tokens."""
    model = build(max_position_embeddings=600, max_token_num=590)
    inputs = batch((550, 3, 128, 129, 1, 127))
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        model.set_attn_implementation("flex_band")
        torch.testing.assert_close(model(**inputs).last_hidden_state, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("encoder_type", ["longformer", "bert", "modernbert"])
@pytest.mark.parametrize("pooler_type", ["cls", "avg"])
def test_padding_changes_no_vector(encoder_type, pooler_type):
    model = build(encoder_type=encoder_type, pooler_type=pooler_type)
    lengths = (40, 13, 2)
    with torch.no_grad():
        together = model(**batch(lengths, width=47)).pooler_output
        for row in range(3):
            padded = {name: x[row : row + 1] for name, x in batch(lengths, width=47).items()}
            alone = {name: x[:, : lengths[row]] for name, x in padded.items()}
            torch.testing.assert_close(model(**alone).pooler_output, together[row : row + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa_band", "eager"])
def test_left_padding_is_padding_too(implementation):
    model = build()
    model.set_attn_implementation(implementation)
    lengths = (30, 11)
    with torch.no_grad():
        right, left = (model(**batch(lengths, side=side)).pooler_output for side in ("right", "left"))
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_mean_pooling_weighs_every_token_once():
    model = build(pooler_type="avg")
    inputs = batch((12, 7))
    with torch.no_grad():
        outputs = model(**inputs)
    for row, n in enumerate((12, 7)):
        torch.testing.assert_close(outputs.pooler_output[row], outputs.last_hidden_state[row, :n].mean(0))


def test_a_row_of_padding_alone_is_finite():
    inputs = batch((9, 5))
    inputs["attention_mask"][1] = 0
    outputs = build()(**inputs)
    assert torch.isfinite(outputs.last_hidden_state).all()
    assert torch.isfinite(outputs.pooler_output).all()


@pytest.mark.parametrize(
    ("stock", "config_class"),
    [(BertModel, BertConfig), (ModernBertModel, ModernBertConfig)],
    ids=("bert", "modernbert"),
)
def test_other_encoders_start_as_what_they_are(stock, config_class, tmp_path):
    """With both new tables at zero, the hidden states are those of the stock encoder; saving keeps all of it."""
    torch.manual_seed(0)
    encoder = stock(config_class(**SIZES, pad_token_id=1)).eval()
    model = RecformerModel.from_encoder(encoder).eval()
    inputs = batch((20, 9))
    with torch.no_grad():
        fresh = model(**inputs).last_hidden_state
        model.save_pretrained(tmp_path)
        again = RecformerModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(again(**inputs).last_hidden_state, fresh)
        model.embeddings.token_type_embeddings.weight.zero_()
        model.embeddings.item_position_embeddings.weight.zero_()
        got = model(**inputs).last_hidden_state
        want = encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    valid = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[valid], want[valid], atol=1e-5, rtol=0)
    assert (fresh - got).abs().max() > 1e-3


def test_a_saved_longformer_loads_but_for_the_two_new_tables(tmp_path):
    stock = stock_longformer(window=16)
    stock.save_pretrained(tmp_path)
    model, info = RecformerModel.from_pretrained(tmp_path, attention_window=8, output_loading_info=True)
    assert type(model.config) is RecformerConfig
    assert model.config.attention_windows == [8, 8]
    assert set(info["missing_keys"]) == {"embeddings.item_position_embeddings.weight"}
    assert {key[0] for key in info["mismatched_keys"]} == {"embeddings.token_type_embeddings.weight"}
    for table in (model.embeddings.token_type_embeddings, model.embeddings.item_position_embeddings):
        assert torch.isfinite(table.weight).all()
        assert 0.2 < table.weight.std() < 0.4  # initializer_range
    for name, weight in stock.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], weight), name
    assert torch.equal(model.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_adapters_on_the_global_projections_take_the_called_path():
    from peft import LoraConfig, get_peft_model

    inputs = batch((25, 8))
    with torch.no_grad():
        plain = build()(**inputs).pooler_output
        for target in ("key_global", "value_global", "query_global"):
            adapted = get_peft_model(build(), LoraConfig(target_modules=[target], init_lora_weights=False, r=2)).eval()
            got = adapted(**inputs).pooler_output
            assert (got - plain).abs().max() > 1e-3, target
            torch.testing.assert_close(adapted.merge_and_unload()(**inputs).pooler_output, got, atol=1e-4, rtol=0)


def test_training_drops_attention_weights_and_flex_refuses_to():
    torch.manual_seed(0)
    model = build(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5).train()
    inputs = batch((30, 30))
    assert (model(**inputs).pooler_output - model(**inputs).pooler_output).abs().max() > 1e-3
    model.set_attn_implementation("flex_band")
    with pytest.raises(ValueError, match=r"dropout_p \(0.5\) must be 0 because FlexAttention drops no weights"):
        model(**inputs)


def test_two_runs_give_the_same_bits():
    inputs, results = batch((40, 13)), []
    for _ in range(2):
        model = build()
        output = model(**inputs).pooler_output
        output.square().sum().backward()
        results.append([output, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_type_ids": torch.full((1, 4), 4)}, r"token_type_ids holds 4, but token_type_size \(4\) allows 0..3"),
        ({"item_position_ids": torch.full((1, 4), 51)}, r"item_position_ids holds 51, but max_item_embeddings \(51\)"),
        ({"item_position_ids": torch.full((1, 4), -1)}, r"item_position_ids holds -1"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask \(\[1, 5\]\) must be \[batch, length\] = \[1, 4\]"),
        ({"output_attentions": True}, r"output_attentions \(True\) needs attn_implementation='eager'"),
        ({"inputs_embeds": torch.zeros(1, 4, 32)}, "exactly one of input_ids or inputs_embeds"),
    ],
)
def test_bad_inputs_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build()(**{"input_ids": torch.full((1, 4), 5), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 30}, r"hidden_size \(30\) must be divisible by num_attention_heads \(4\)"),
        ({"attention_window": 7}, r"attention_window \(7\) must be even and at least 2, half on each side; use 8"),
        ({"attention_window": [8]}, r"attention_window \(\[8\]\) must name one window or num_hidden_layers \(2\)"),
        ({"token_type_size": 3}, r"token_type_size \(3\) must be at least 4"),
        ({"max_item_embeddings": 1}, r"max_item_embeddings \(1\) must be at least 2"),
        ({"max_attr_num": 0}, r"max_attr_num \(0\) must be at least 1"),
        ({"max_token_num": 500}, r"max_token_num \(500\) must fit into the 198 positions"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        ({"mlm_weight": -0.1}, r"mlm_weight \(-0.1\) must not be negative"),
        ({"num_items": -2}, r"num_items \(-2\) must not be negative"),
        ({"num_negatives": 0}, r"num_negatives \(0\) must be positive, or -1"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(Exception, match=message):
        config(**change)


def test_the_published_sizes_are_the_defaults():
    published = RecformerConfig()
    assert (published.vocab_size, published.hidden_size, published.num_hidden_layers) == (50265, 768, 12)
    assert published.attention_windows == [64] * 12
    assert (published.max_attr_num, published.max_attr_length, published.max_item_embeddings) == (3, 32, 51)
    assert (published.max_token_num, published.max_position_embeddings, published.temperature) == (1024, 4098, 0.05)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match=r"attn_implementation \('sdpa'\) must be one of 'sdpa_band', 'flex_band'"):
        build().set_attn_implementation("sdpa")
    gpt2 = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="encoder is a 'gpt2'"):
        RecformerModel.from_encoder(gpt2)
