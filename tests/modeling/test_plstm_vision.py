"""pLSTM on images: gates by their equations, grids of any shape, padding, the Trainer, and the authors' weights."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoBackbone, AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from undersong.data.arrow_pointing import ArrowPointingDataset
from undersong.modeling.plstm_vision.configuration_plstm_vision import PLSTMVisionConfig
from undersong.modeling.plstm_vision.convert_plstm_vision import convert_state_dict
from undersong.modeling.plstm_vision.modeling_plstm_vision import (
    PLSTMVisionBackbone,
    PLSTMVisionForImageClassification,
    PLSTMVisionModel,
    PropagationGates,
)

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def build(cls=PLSTMVisionModel, **options):
    torch.manual_seed(0)
    return cls(PLSTMVisionConfig(**TINY, **{"initializer_range": 0.3} | options)).double().eval()


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 20), (12, 8), (32, 32)])
@pytest.mark.parametrize("pooling", ["corners", "mean"])
def test_any_grid_of_patches(height, width, pooling):
    model = build(pooling=pooling)
    outputs = model(images(height, width))
    assert outputs.last_hidden_state.shape == (2, height * width // 16, 32)
    grid = outputs.last_hidden_state.view(2, height // 4, width // 4, 32)
    want = grid.mean((1, 2)) if pooling == "mean" else torch.cat(
        [grid[:, 0, 0], grid[:, -1, 0], grid[:, 0, -1], grid[:, -1, -1]], -1
    )  # fmt: skip
    assert torch.equal(outputs.pooler_output, want)


@pytest.mark.parametrize("pooling", ["corners", "mean"])
@pytest.mark.parametrize("block_mode", ["P", "D"])
def test_padding_around_an_image_changes_nothing(pooling, block_mode):
    model = build(pooling=pooling, block_mode=block_mode, use_position_embeddings=False)
    image = images(8, 12)
    padded = images(16, 20)
    padded[:, :, 4:12, 8:20] = image
    mask = torch.zeros(2, 4, 5, dtype=torch.long)
    mask[:, 1:3, 2:] = 1
    got, want = model(padded, attention_mask=mask.flatten(1)), model(image)
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=0, atol=1e-10)
    inside = got.last_hidden_state.view(2, 4, 5, -1)[:, 1:3, 2:].flatten(1, 2)
    torch.testing.assert_close(inside, want.last_hidden_state, rtol=0, atol=1e-10)


def test_propagation_gates_follow_their_equations():
    for variant in ("reference", "bounded"):
        config = PLSTMVisionConfig(**TINY, initializer_range=0.5, pmode_variant=variant)
        model = PLSTMVisionModel(config).double()
        gates = model.layers[0].mixer.gates
        assert isinstance(gates, PropagationGates)
        x = images(4, 4)[:, 0, :, :1] * torch.linspace(-2, 2, 32, dtype=torch.float64)  # [2, 4, 32]
        (S_r, S_d), (T_r, T_d), (M,) = gates(x)
        orientation = gates.orientation
        alpha = (orientation.bias + 0.5 * (x @ orientation.weight.T) / 32).sigmoid().unflatten(-1, (2, 4))
        g, s, m = (gate(x).unflatten(-1, (2, 4)) for gate in (gates.transition, gates.source, gates.mark))
        want = (
            (alpha * s, 1 - alpha * s, alpha * g, 1 - alpha * g, m)
            if variant == "reference"
            else (alpha * s, (1 - alpha) * s, alpha * g.abs(), (1 - alpha) * g.abs(), m)
        )
        for got, expected in zip((S_r, S_d, T_r, T_d, M), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        if variant == "bounded":
            assert (T_r.abs() + T_d.abs()).max() <= 1


def test_authors_initial_values():
    config = PLSTMVisionConfig(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, image_size=16, patch_size=4)
    model = PLSTMVisionForImageClassification(config)
    mixers = [layer.mixer for layer in model.model.layers]
    assert mixers[0].gates.orientation.bias.tolist() == [-2.0, 0.0, 2.0] * 4
    assert not mixers[0].gates.orientation.weight.any()
    for gate, bias in ((mixers[0].gates.source, -4), (mixers[1].gates.mark_l, -4), (mixers[1].gates.transition_rd, 1)):
        assert (gate.bias == bias).all()
        assert not gate.proj.weight.any()
    assert (mixers[1].direct.bias == -6).all()
    assert mixers[0].q_proj.weight.std().item() == pytest.approx((2 / (5 * 48)) ** 0.5, rel=0.05)
    assert model.classifier.weight.abs().max() < 1e-4


def test_position_embeddings_are_interpolated_unless_refused():
    model = build()
    image = images(16, 16)
    assert torch.equal(model(image).pooler_output, model(image, interpolate_pos_encoding=False).pooler_output)
    with pytest.raises(ValueError, match=r"pixel_values \(8 x 16\) must be 16 x 16, the config's image_size"):
        model(images(8, 16), interpolate_pos_encoding=False)


def test_backbone_gives_the_stages_asked_for():
    config = PLSTMVisionConfig(**TINY, out_features=["stem", "stage2"])
    model = AutoBackbone.from_config(config).eval()
    assert type(model) is PLSTMVisionBackbone
    pixels = images(12, 16).float()
    outputs = model(pixels)
    assert [tuple(x.shape) for x in outputs.feature_maps] == [(2, 32, 3, 4)] * 2
    last = model.model(pixels).last_hidden_state
    assert torch.equal(outputs.feature_maps[1].flatten(2).mT, last)


def test_drop_path_leaves_branches_out_in_training_only():
    model = build(drop_path_rate=0.9, block_mode="D")
    image = images(8, 8, batch=64)
    quiet = model(image).last_hidden_state
    assert torch.equal(quiet, build(block_mode="D")(image).last_hidden_state)
    model.train()
    first, second = (model.layers[i].drop_path for i in (0, 1))
    assert (first.rate, second.rate) == (0.0, 0.9)
    x = torch.ones(10_000, 1)
    dropped = second(x)
    assert dropped.unique().tolist() == pytest.approx([0.0, 10.0], rel=1e-5)
    assert dropped.mean().item() == pytest.approx(1, abs=0.1)


def test_trainer_takes_a_step_on_pictures(tmp_path):
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    data = ArrowPointingDataset(8, image_size=96, radius=(7.5, 15), arrow_length=(7.5, 15), padding=15,
                                processor=processor)  # fmt: skip
    options = TINY | {"image_size": 96, "patch_size": 16}
    model = PLSTMVisionForImageClassification(PLSTMVisionConfig(**options, num_labels=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    arguments = TrainingArguments(tmp_path, max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                                  dataloader_pin_memory=False)  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    assert all((value != before[key]).any() for key, value in model.state_dict().items())
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path / "saved")) is type(model)


def reference_state_dict(config):
    """Random weights under the authors' names and shapes, projections in a slice for each head."""
    size, heads = config.hidden_size, config.num_attention_heads
    shapes = {
        "patch_embed.proj.weight": (size, 3, 4, 4),
        "patch_embed.proj.bias": (size,),
        "pos_embed.embed": (1, 4, 4, size),
        "norm.scale": (size,),
        "head.weight": (2, 4 * size),
        "head.bias": (2,),
    }
    for block in (0, 1):
        start = f"block_stack.blocks.0.block{block}."
        shapes |= {f"{start}{norm}.scale": (size,) for norm in ("norm", "norm2")}
        shapes |= {f"{start}upproj.weight": (4 * size, size), f"{start}upproj.bias": (4 * size,)}
        shapes |= {f"{start}downproj.weight": (size, 4 * size), f"{start}downproj.bias": (size,)}
        start += "interaction_module."
        for name in ("query", "key", "value_"):
            shapes[f"{start}{name}.weight"] = (1, size // heads, 1, heads, size // heads)
            shapes[f"{start}{name}.bias"] = (heads, size // heads, 1)
        shapes |= {f"{start}mhnorm.scale": (heads, size // heads), f"{start}outprojection.weight": (size, size)}
        shapes[f"{start}direct.bias"] = (heads, 1, 1, 1, 1)
        gates = ["source", "mark"] if block == 0 else ["source_r", "source_d", "mark_l", "mark_u"]
        shapes |= {f"{start}{gate}.bias": (4 * heads, 1, 1, 1) for gate in gates}
        for transition in ["transition"] if block == 0 else ["transition_r", "transition_d", "transition_rd"]:
            shapes[f"{start}{transition}.eigenvalues_bias"] = (4 * heads, 1)
            shapes[f"{start}{transition}.eigenvalues_weight"] = (1, 4 * heads, 1, size // (4 * heads))
    start = "block_stack.blocks.0.block0.interaction_module.orientation_"
    shapes |= {f"{start}bias": (4, heads), f"{start}weight": (4, heads, size)}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_authors_weights_find_their_places():
    """(Outputs equal those of their package to 1e-5; it is not installed here.)"""
    model = PLSTMVisionForImageClassification(PLSTMVisionConfig(**TINY))
    theirs = reference_state_dict(model.config)
    model.load_state_dict(convert_state_dict(theirs, model.config))
    mixer = model.model.layers[0].mixer
    start = "block_stack.blocks.0.block0.interaction_module."
    x = torch.randn(5, 32)
    want = torch.einsum("hkjsx,nsx->nhskj", theirs[f"{start}query.weight"], x.view(5, 2, 16)).flatten(1)
    torch.testing.assert_close(mixer.q_proj(x), want + theirs[f"{start}query.bias"].flatten(), rtol=1e-4, atol=1e-5)
    z = torch.einsum("hsjx,nsx->nhsj", theirs[f"{start}transition.eigenvalues_weight"], x.view(5, 8, 4)).flatten(1)
    want = torch.tanh(5 * (z + theirs[f"{start}transition.eigenvalues_bias"].flatten()))
    torch.testing.assert_close(mixer.gates.transition(x), want, rtol=1e-4, atol=1e-5)
    assert not mixer.gates.source.proj.weight.any()


def test_foreign_weights_without_a_place_are_refused():
    config = PLSTMVisionConfig(**TINY)
    with pytest.raises(ValueError, match=r"'cls_token' has no counterpart in PLSTMVisionConfig"):
        convert_state_dict({"cls_token": torch.ones(1)}, config)
    key = "block_stack.blocks.0.block0.interaction_module.transition.eigenvalues_weight"
    with pytest.raises(
        ValueError, match=r"reads 1 slices of the input, but gate_sub_heads \(None\) makes 8; use gate_s"
    ):
        convert_state_dict({key: torch.ones(8, 1, 1, 32)}, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 3}, r"num_hidden_layers \(3\) must be even for block_mode='PD'.*; use 4"),
        (
            {"hidden_size": 33},
            r"hidden_size \(33\) must be divisible by num_attention_heads \(2\); use hidden_size=40",
        ),
        (
            {"hidden_size": 36},
            r"hidden_size \(36\) must be divisible by num_attention_heads \* orientations \(8\); .*=40",
        ),
        ({"gate_sub_heads": 3}, r"gate_sub_heads \(3\) must divide num_attention_heads \* orientations \(8\)"),
        ({"image_size": 18}, r"image_size \(18 x 18\) must be divisible by patch_size \(4\)"),
        ({"image_size": (16, 10)}, r"image_size \(16 x 10\) must be divisible by patch_size \(4\)"),
        ({"orientations": 5}, r"orientations \(5\) must lie in 1\.\.4"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate \(1\.0\) must lie in \[0, 1\)"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio \(0\.0\) must give a width of at least 1"),
        ({"num_channels": 0}, r"num_channels \(0\) must be at least 1"),
    ],
)
def test_configurations_that_make_no_model(options, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        PLSTMVisionConfig(**TINY | options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 18, 16), r"pixel_values \(18 x 16\) must have sides divisible by patch_size \(4\)"),
        ((2, 1, 16, 16), r"pixel_values \(\[2, 1, 16, 16\]\) must be \[batch, 3, height, width\]"),
        ((3, 16, 16), r"pixel_values \(\[3, 16, 16\]\) must be"),
    ],
)
def test_images_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.ones(shape, dtype=torch.float64))


def test_a_mask_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"attention_mask \(\[2, 4\]\) must be \[batch, patches\] = \[2, 16\] .* 4 x 4"
    ):
        build()(images(16, 16), attention_mask=torch.ones(2, 4))
