"""LightNet's models beyond the common promises: both directions, position encodings, foreign checkpoints, images."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from undersong.modeling.lightnet.configuration_lightnet import LightNetConfig
from undersong.modeling.lightnet.modeling_lightnet import (
    LightNetForCausalLM,
    LightNetForMaskedLM,
    LightNetForSequenceClassification,
    LightNetModel,
)
from undersong.modeling.lightnet_layers import LightNetAttention
from undersong.modeling.lightnet_positions import GridToeplitzEncoding, LinearizedRelativePosition, ToeplitzAxis
from undersong.modeling.lightnet_vision.configuration_lightnet_vision import LightNetVisionConfig
from undersong.modeling.lightnet_vision.modeling_lightnet_vision import (
    LightNetVisionForImageClassification,
    LightNetVisionModel,
)
from undersong.ops.lightnet_attention import lightnet_attention

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "expand_ratio": 8,
    "intermediate_size": 32,
    "gate_low_rank_dim": 8,
    "initializer_range": 0.3,
}


def text(cls=LightNetModel, **options):
    torch.manual_seed(0)
    return cls(LightNetConfig(vocab_size=50, **{**SIZES, **options})).double().eval()


def vision(cls=LightNetVisionModel, **options):
    torch.manual_seed(0)
    config = LightNetVisionConfig(image_size=8, patch_size=2, num_channels=1, **{**SIZES, **options})
    return cls(config).double().eval()


def hidden(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).last_hidden_state


def ids(batch=2, length=9):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(0))


def close(got, want, atol=1e-10):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= atol, (got - want).abs().max()


# Text


def test_output_is_gated_norm_of_the_attention():
    """o_proj(rms(o) * silu(g)) with o the closed form."""
    torch.manual_seed(0)
    config = LightNetConfig(**SIZES)
    attn = LightNetAttention(config, 0, causal=True, axes=1).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, v = (proj(x).unflatten(-1, (2, 8)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    o = torch.zeros_like(v)
    for t in range(6):
        khat = k[:, : t + 1].softmax(1)
        o[:, t] = 8**-0.5 * torch.einsum("bhc,bshc,bshv->bhv", torch.nn.functional.silu(q[:, t]), khat, v[:, : t + 1])
    o = o.flatten(2)
    normed = o * (o.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    close(attn(x), attn.o_proj(normed * torch.nn.functional.silu(attn.g_proj(x))))


def test_masked_lm_reads_both_ways_and_causal_lm_does_not():
    tokens, changed = ids(), ids()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    with torch.no_grad():
        masked, causal = text(LightNetForMaskedLM), text(LightNetForCausalLM)
        assert (masked(tokens).logits - masked(changed).logits)[:, 0].abs().max() > 1e-6
        close(causal(tokens).logits[:, :-1], causal(changed).logits[:, :-1])


@pytest.mark.parametrize("options", [{}, {"use_lrpe": True}, {"use_lrpe": True, "lrpe_type": "rotate"}], ids=str)
def test_both_ways_padding_and_packing_equal_rows_alone(options):
    model, tokens = text(is_causal=False, **options), ids(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 0, 1], [1] * 9])
    got = hidden(model, tokens, attention_mask=mask)
    close(got[0][mask[0].bool()], hidden(model, tokens[:1, mask[0].bool()])[0])
    close(got[1], hidden(model, tokens[1:])[0])
    packed = hidden(model, tokens[:1], cu_seq_lens_q=torch.tensor([0, 4, 9], dtype=torch.int32))
    close(packed, torch.cat([hidden(model, tokens[:1, :4]), hidden(model, tokens[:1, 4:])], 1))


def test_without_positions_both_ways_is_equivariant_to_permutations():
    model, tokens = text(is_causal=False), ids()
    order = torch.tensor([3, 1, 8, 0, 2, 7, 6, 5, 4])
    close(hidden(model, tokens[:, order]), hidden(model, tokens)[:, order])


def test_a_saved_masked_lm_opens_as_a_model_that_reads_both_ways(tmp_path):
    model = text(LightNetForMaskedLM)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    trunk = LightNetModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    close(hidden(trunk, ids()), hidden(model.model, ids()))


def test_a_config_is_left_open_for_other_heads():
    config = LightNetConfig(vocab_size=50, **SIZES)
    LightNetForMaskedLM(config)
    assert config.is_causal is None
    LightNetForCausalLM(config)


@pytest.mark.parametrize("kind", ["cosine", "rotate"])
@pytest.mark.parametrize("rank", [1, 3])
def test_generation_with_every_position_encoding(kind, rank):
    model = text(LightNetForCausalLM, use_lrpe=True, lrpe_type=kind, use_tpe=True, tpe_rank=rank)
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids(2, 5), attention_mask=mask, **options)
    assert got.tolist() == model.generate(ids(2, 5), attention_mask=mask, use_cache=False, **options).tolist()
    alone = model.generate(ids(2, 5)[:1, 3:], **options)
    assert got[0, 5:].tolist() == alone[0, 2:].tolist()


def test_tpe_may_replace_the_embedding():
    model = text(use_tpe=True, tpe_residual=False, num_hidden_layers=0)
    embedded = model.embeddings(ids())
    close(hidden(model, ids()), model.norm(model.tpe.along(embedded, 1)))


def test_groups_of_the_output_norm_are_normed_alone():
    norm = LightNetAttention(LightNetConfig(**SIZES, norm_num_groups=2), 0, True, 1).g_norm.double()
    x = torch.randn(3, 16, dtype=torch.float64)
    x[:, 8:] *= 100
    close(norm(x).unflatten(-1, (2, 8)).pow(2).mean(-1), torch.ones(3, 2, dtype=torch.float64), 1e-4)


def test_folders_of_flash_linear_attention_load_as_they_are(tmp_path):
    """Their config names and their tensor names, in a folder as they write it."""
    from safetensors.torch import save_file

    config = {
        "model_type": "lightnet", "architectures": ["LightNetForCausalLM"], "hidden_size": 16, "num_hidden_layers": 1,
        "num_heads": 2, "expand_ratio": 8, "hidden_ratio": 4, "intermediate_size": None, "hidden_act": "swish",
        "gate_low_rank_dim": 8, "norm_eps": 1e-6, "vocab_size": 50, "attn": None, "attn_mode": "chunk",
        "use_short_conv": False, "conv_size": 4, "elementwise_affine": True, "fuse_norm": True, "fuse_swiglu": True,
        "fuse_cross_entropy": True, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    layer, width = "model.layers.0.", 256
    shapes = {
        "model.embeddings.weight": (50, 16), layer + "attn_norm.weight": (16,), layer + "attn.q_proj.weight": (16, 16),
        layer + "attn.k_proj.weight": (16, 16), layer + "attn.v_proj.weight": (16, 16),
        layer + "attn.o_proj.weight": (16, 16), layer + "attn.g_proj.0.weight": (8, 16),
        layer + "attn.g_proj.1.weight": (16, 8), layer + "attn.g_norm.weight": (16,), layer + "mlp_norm.weight": (16,),
        layer + "mlp.gate_proj.weight": (width, 16), layer + "mlp.up_proj.weight": (width, 16),
        layer + "mlp.down_proj.weight": (16, width), "model.norm.weight": (16,), "lm_head.weight": (50, 16),
    }  # fmt: skip
    torch.manual_seed(0)
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, info = LightNetForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert (model.config.num_attention_heads, model.config.rms_norm_eps, model.config.num_heads) == (2, 1e-6, 2)
    assert LightNetConfig(hidden_size=256, num_heads=None).num_attention_heads == 2


def test_trainer_lowers_the_loss(tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LightNetConfig(vocab_size=50, **{**SIZES, "initializer_range": 0.02}, use_tpe=True)
    model = LightNetForCausalLM(config)
    row = {"input_ids": torch.arange(12), "labels": torch.arange(12)}
    options = TrainingArguments(tmp_path, max_steps=30, learning_rate=1e-2, report_to=[], use_cpu=True,
                                logging_steps=29, save_strategy="no", disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, options, train_dataset=[row] * 64)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 3.0 < 3.9  # log(50) = 3.9 is chance


def test_text_errors_name_value_and_fix():
    with pytest.raises(
        StrictDataclassClassValidationError,
        match=r"hidden_size \(100\) must be divisible by num_attention_heads \(12\).*=108",
    ):
        LightNetConfig(hidden_size=100, num_attention_heads=12)
    with pytest.raises(StrictDataclassClassValidationError, match=r"norm_num_groups \(3\)"):
        LightNetConfig(**SIZES, norm_num_groups=3)
    with pytest.raises(
        StrictDataclassClassValidationError,
        match=r"expand_ratio \(7\) must be divisible by 2 because lrpe_type 'rotate'",
    ):
        LightNetConfig(**{**SIZES, "expand_ratio": 7}, use_lrpe=True, lrpe_type="rotate")
    with pytest.raises(ValueError, match=r"num_attention_heads \(None\) and expand_ratio \(None\)"):
        LightNetConfig(num_attention_heads=None, expand_ratio=None)
    with pytest.raises(StrictDataclassClassValidationError, match=r"tpe_rank \(0\) must be at least 1"):
        LightNetConfig(**SIZES, use_tpe=True, tpe_rank=0)
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"use_short_conv \(True\) asks for short convolutions"
    ):
        LightNetConfig(**SIZES, use_short_conv=True)
    with pytest.raises(StrictDataclassClassValidationError, match=r"attn \(.*\) asks for layers of full attention"):
        LightNetConfig(**SIZES, attn={"layers": [1], "num_heads": 2})
    with pytest.raises(ValueError, match=r"is_causal \(True\) cannot make a masked language model"):
        text(LightNetForMaskedLM, is_causal=True)
    with pytest.raises(ValueError, match=r"is_causal \(False\) cannot make a causal language model"):
        text(LightNetForCausalLM, is_causal=False)
    model = text(is_causal=False)
    with pytest.raises(ValueError, match="past_key_values cannot be used with is_causal=False"):
        model(ids(), past_key_values=text()(ids(), use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        model(ids(), attention_mask=torch.ones(2, 1, 9, 9))


def test_a_bidirectional_classifier_sees_what_follows():
    model = text(LightNetForSequenceClassification, is_causal=False, pad_token_id=0, num_labels=3)
    with torch.no_grad():
        assert model(ids()).logits.shape == (2, 3)


# Positions


@pytest.mark.parametrize("kind", ["cosine", "rotate"])
@pytest.mark.parametrize("causal", [True, False])
def test_lrpe_sees_offsets_only(kind, causal):
    """All positions moved by the same amount on either axis: nothing changes, also where channels decay apart."""
    torch.manual_seed(0)
    lrpe = LinearizedRelativePosition(heads=2, dim=8, axes=2, kind=kind).double()
    q, k, v = (torch.randn(1, 12, 2, 8, dtype=torch.float64) for _ in range(3))
    positions = torch.cartesian_prod(torch.arange(3), torch.arange(4))[None]

    def output(positions):
        turned, phase = lrpe(q, positions)
        return lightnet_attention(turned, k, v, phase=phase, causal=causal)

    close(output(positions + torch.tensor([17, 5])), output(positions))
    assert (output(positions * 2) - output(positions)).abs().max() > 1e-3


def test_lrpe_weights_pairs_by_the_cosine_of_their_offset():
    lrpe = LinearizedRelativePosition(heads=1, dim=4, axes=1)
    torch.manual_seed(0)
    q, v = torch.randn(1, 5, 1, 4), torch.randn(1, 5, 1, 3)
    turned, phase = lrpe(q, torch.arange(5).view(1, 5, 1))
    o = lightnet_attention(turned, torch.zeros_like(q), v, phase=phase, causal=False, scale=1.0)
    offset = torch.arange(5)[:, None] - torch.arange(5)
    angles = 10000.0 ** (-torch.arange(4) / 4)
    weights = torch.einsum("tc,tsc->ts", q[0, :, 0], (offset[..., None] * angles).cos()) / 5
    close(o[0, :, 0], weights @ v[0, :, 0], 1e-5)


def test_lrpe_rotate_equals_rotary_queries_and_keys():
    lrpe = LinearizedRelativePosition(heads=1, dim=6, kind="rotate").double()
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 6, dtype=torch.float64) for _ in range(3))
    turned, phase = lrpe(q, torch.arange(5).view(1, 5, 1))
    got = lightnet_attention(turned, k, v, phase=phase, causal=False, scale=1.0)
    angle = torch.arange(5)[:, None] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)

    def rotate(x):
        a, b = x[0, :, 0].chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    want = (rotate(q) @ rotate(k.softmax(1)).T) @ v[0, :, 0]
    close(got[0, :, 0], want, 1e-6)  # theta is kept in float32


def test_tpe_on_one_axis_is_the_sum_over_positions_before():
    axis = ToeplitzAxis(4, heads=2, rank=2).double()
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    c = (axis.query * axis.key).unflatten(-1, (2, 2)).sum(-1)
    decay = axis.decay_logit.sigmoid()
    y = torch.zeros_like(x)
    for n in range(6):
        for m in range(n + 1):
            weight = (c * decay ** (n - m)).sum(0).repeat_interleave(2)
            y[:, n] += weight * x[:, m]
    want = axis.o_proj(axis.norm(y))
    close(axis.along(x, 1), want)
    close(axis.scan(x)[0], want)


def test_tpe_of_a_row_is_that_of_a_sequence_and_transposing_transposes():
    torch.manual_seed(0)
    grid = GridToeplitzEncoding(4, heads=2, axes=2).double()
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    row = GridToeplitzEncoding(4, heads=2, axes=1).double()
    close(row(x[:, 0]), row.axes[0].scan(x[:, 0])[0])
    swapped = GridToeplitzEncoding(4, heads=2, axes=2).double()
    swapped.axes[0].load_state_dict(grid.axes[1].state_dict())
    swapped.axes[1].load_state_dict(grid.axes[0].state_dict())
    close(swapped(x.transpose(1, 2)), grid(x).transpose(1, 2))


def test_tpe_in_both_directions_is_symmetric():
    torch.manual_seed(0)
    both = ToeplitzAxis(4, heads=2, bidirectional=True).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    close(both.along(x.flip(1), 1).flip(1), both.along(x, 1))


# Images


def test_any_height_and_width_and_every_patch_reads_all_others():
    model = vision()
    image = torch.rand(1, 1, 6, 10, dtype=torch.float64, requires_grad=True)
    model(image).last_hidden_state[0, 0].sum().backward()
    patches = image.grad[0, 0].unfold(0, 2, 2).unfold(1, 2, 2).abs().sum((2, 3))
    assert patches.shape == (3, 5)
    assert (patches > 0).all()


def test_without_positions_patches_have_no_order_and_with_them_they_do():
    image = torch.rand(1, 1, 4, 8, dtype=torch.float64)
    for options, moves in (({"use_lrpe": False, "use_tpe": False}, False), ({"use_tpe": False}, True), ({}, True)):
        model = vision(LightNetVisionForImageClassification, num_labels=3, **options)
        with torch.no_grad():
            difference = (model(image).logits - model(image.roll(2, 3)).logits).abs().max()
        assert (difference > 1e-4) == moves, options


def test_padding_patches_of_smaller_images_changes_nothing():
    model = vision(LightNetVisionForImageClassification, num_labels=3)
    small = torch.rand(1, 1, 4, 6, dtype=torch.float64)
    padded = torch.full((1, 1, 8, 8), 9.0, dtype=torch.float64)
    padded[:, :, :4, :6] = small
    mask = torch.zeros(1, 4, 4, dtype=torch.long)
    mask[:, :2, :3] = 1
    with torch.no_grad():
        close(model(padded, attention_mask=mask.flatten(1)).logits, model(small).logits)


def test_a_stock_image_processor_feeds_the_model():
    from transformers import AutoImageProcessor, ViTImageProcessor

    assert AutoImageProcessor  # the stock classes need no entry of ours
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    image = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    inputs = processor(image, return_tensors="pt")
    config = LightNetVisionConfig(image_size=8, patch_size=2, num_labels=3, **SIZES)
    model = LightNetVisionForImageClassification(config)
    assert model(**inputs, labels=torch.tensor([1])).loss.isfinite()


def test_image_errors_name_value_and_fix():
    with pytest.raises(
        StrictDataclassClassValidationError,
        match=r"image_size \(30\) must be divisible by patch_size \(16\).*image_size=32",
    ):
        LightNetVisionConfig(image_size=30)
    model = vision()
    with pytest.raises(
        ValueError, match=r"width \(7\) of pixel_values must be a positive multiple of patch_size \(2\)"
    ):
        model(torch.rand(1, 1, 4, 7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"pixel_values has shape \(1, 3, 4, 4\).*num_channels=1"):
        model(torch.rand(1, 3, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\) but there are 2 x 2 patches"):
        model(torch.rand(1, 1, 4, 4, dtype=torch.float64), attention_mask=torch.ones(1, 3))
