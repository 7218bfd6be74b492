"""Aaren against what the paper and plain attention say, and its own heads."""

import pytest
import torch
import torch.nn.functional as F

from undersong import AarenConfig, AarenForCausalLM, AarenForTimeSeriesClassification, AarenModel


def tiny(**overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    return AarenConfig(**{**sizes, "initializer_range": 0.3, **overrides})


def test_parameter_count_of_the_paper():
    """Appendix of arXiv 2405.13956: 3,152,384 for the Transformer block, and 512 more for the query token."""
    config = AarenConfig(
        vocab_size=3, hidden_size=512, num_attention_heads=8, intermediate_size=2048, num_hidden_layers=1
    )
    layers = AarenModel(config).layers
    transformer = torch.nn.TransformerEncoderLayer(512, 8, 2048)
    assert sum(p.numel() for p in transformer.parameters()) == 3_152_384
    assert sum(p.numel() for p in layers.parameters()) == 3_152_896


def test_every_output_is_ordinary_attention_of_the_learned_query_over_its_prefix():
    model = AarenModel(tiny()).double()
    attention = model.layers[0].self_attn
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    got = attention(x)

    def heads(projection, y):
        return projection(y).unflatten(-1, (4, 4)).transpose(1, 2)

    query = heads(attention.q_proj, attention.query_token.expand(2, 1, 16))
    for t in range(7):
        prefix = x[:, : t + 1]
        want = F.scaled_dot_product_attention(query, heads(attention.k_proj, prefix), heads(attention.v_proj, prefix))
        want = attention.o_proj(want.transpose(1, 2).flatten(2))
        torch.testing.assert_close(got[:, t : t + 1], want, rtol=0, atol=1e-12)


def test_zero_query_gives_the_running_mean():
    attention = AarenModel(tiny()).double().layers[0].self_attn
    torch.nn.init.zeros_(attention.query_token)
    torch.nn.init.zeros_(attention.q_proj.bias)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    values = attention.v_proj(x)
    want = attention.o_proj(values.cumsum(1) / torch.arange(1, 7).view(1, 6, 1))
    torch.testing.assert_close(attention(x), want, rtol=0, atol=1e-12)


def test_one_layer_without_positions_ignores_the_order_of_the_past():
    model = AarenModel(tiny(num_hidden_layers=1, position_embedding_type="none")).double().eval()
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    swapped = torch.tensor([[9, 3, 7, 5, 11]])
    torch.testing.assert_close(
        model(ids).last_hidden_state[:, -1], model(swapped).last_hidden_state[:, -1], rtol=0, atol=1e-12
    )
    ordered = AarenModel(tiny(num_hidden_layers=1)).double().eval()
    assert not torch.allclose(ordered(ids).last_hidden_state[:, -1], ordered(swapped).last_hidden_state[:, -1])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "none"])
def test_variants_are_causal(norm_first, positions):
    model = AarenModel(tiny(norm_first=norm_first, position_embedding_type=positions)).double().eval()
    ids = torch.randint(1, 17, (1, 9))
    changed = ids.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 17
    before, after = model(ids).last_hidden_state, model(changed).last_hidden_state
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_learned_positions_name_the_limit():
    model = AarenModel(tiny(position_embedding_type="learned", max_position_embeddings=4))
    assert model(torch.ones(1, 4, dtype=torch.long)).last_hidden_state.shape == (1, 4, 16)
    with pytest.raises(ValueError, match=r"position 4 is beyond max_position_embeddings \(4\)"):
        model(torch.ones(1, 5, dtype=torch.long))


def test_config_errors_name_field_value_and_fix():
    with pytest.raises(Exception, match=r"hidden_size \(100\) must be divisible by num_attention_heads \(12\).*108"):
        AarenConfig(hidden_size=100, num_attention_heads=12)
    with pytest.raises(Exception, match=r"hidden_size \(15\) must be even"):
        AarenConfig(hidden_size=15, num_attention_heads=3)
    with pytest.raises(Exception, match="position_embedding_type"):
        AarenConfig(position_embedding_type="rotary")
    assert AarenConfig(hidden_size=64).intermediate_size == 256


def test_needs_exactly_one_kind_of_input():
    model = AarenModel(tiny())
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()


def test_logits_to_keep_and_labels():
    model = AarenForCausalLM(tiny()).eval()
    ids = torch.randint(1, 17, (2, 6))
    full = model(ids, labels=ids)
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full.logits[:, -2:])
    want = F.cross_entropy(full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(full.loss, want)


class TestTimeSeriesClassification:
    def model(self, **overrides):
        return AarenForTimeSeriesClassification(tiny(input_size=3, num_labels=5, **overrides)).double().eval()

    def test_padding_does_not_matter(self):
        model, x = self.model(), torch.randn(1, 6, 3, dtype=torch.float64)
        padded = torch.cat([torch.full((1, 2, 3), 7.0, dtype=torch.float64), x], 1)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
        torch.testing.assert_close(model(padded, attention_mask=mask).logits, model(x).logits, rtol=0, atol=1e-12)

    def test_missing_values_count_as_zero_and_missing_steps_as_padding(self):
        model, x = self.model(), torch.randn(1, 5, 3, dtype=torch.float64)
        observed = torch.ones(1, 5, 3)
        observed[0, 1, 2] = 0
        observed[0, 3] = 0
        zeroed = x.clone()
        zeroed[0, 1, 2] = 0
        want = model(zeroed[:, [0, 1, 2, 4]]).logits
        torch.testing.assert_close(model(x, past_observed_mask=observed).logits, want, rtol=0, atol=1e-12)

    def test_a_series_without_a_valid_step_gives_the_bias(self):
        model = self.model()
        logits = model(torch.randn(1, 4, 3, dtype=torch.float64), attention_mask=torch.zeros(1, 4)).logits
        assert torch.equal(logits[0], model.score.bias)

    def test_labels_and_target_values_are_the_same(self):
        model, x = self.model(), torch.randn(2, 4, 3, dtype=torch.float64)
        labels = torch.tensor([1, 4])
        want = F.cross_entropy(model(x).logits, labels)
        torch.testing.assert_close(model(x, labels=labels).loss, want)
        torch.testing.assert_close(model(x, target_values=labels).loss, want)

    def test_wrong_channels_are_named(self):
        with pytest.raises(ValueError, match=r"past_values has shape \(2, 4, 1\).*input_size=3"):
            self.model()(torch.randn(2, 4, 1, dtype=torch.float64))
