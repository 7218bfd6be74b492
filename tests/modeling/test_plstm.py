"""pLSTM on sequences: the layer by its equations, weights of the authors, configuration, precision."""

import math
import re

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from undersong.modeling.plstm.configuration_plstm import PLSTMConfig
from undersong.modeling.plstm.convert_plstm import convert_state_dict
from undersong.modeling.plstm.modeling_plstm import PLSTMForCausalLM, PLSTMForTokenClassification

pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, INNER, SIZE, VOCABULARY = 4, 64, 32, 19


def normal(*shape, scale=1.0):
    return scale * torch.randn(shape, dtype=torch.float64)


def authors_state_dict(slices, J, gate_slices=None):
    """Random weights in the layout of the authors' language model of one layer.

    slices: that queries, keys and values read; gate_slices: that gates read, None for gates without weights.
    """
    torch.manual_seed(0)
    JT, JK, JV, JO, JQ = J
    block, mixer = "block_stack.blocks.0.", "block_stack.blocks.0.interaction_module."
    weights = {
        "token_embedding.weight": normal(VOCABULARY, SIZE),
        "post_blocks_norm.scale": normal(SIZE),
        "lm_head.weight": normal(VOCABULARY, SIZE),
        f"{block}norm.scale": normal(SIZE),
        f"{block}upproj.weight": normal(2 * INNER, SIZE, scale=0.2),
        f"{block}upproj.bias": normal(2 * INNER),
        f"{block}downproj.weight": normal(SIZE, INNER, scale=0.2),
        f"{block}downproj.bias": normal(SIZE),
        f"{mixer}conv._conv.weight": normal(INNER, 1, 4),
        f"{mixer}conv._conv.bias": normal(INNER),
        f"{mixer}mhnorm.scale": normal(HEADS, INNER // HEADS),
        f"{mixer}passthrough.scale": normal(INNER),
    }
    key_dim, value_dim = INNER // HEADS // JK, INNER // HEADS // JO
    for name, dim, tracking in (("query", key_dim, JQ), ("key", key_dim, JK), ("value_", value_dim, JV)):
        shape = max(1, HEADS // slices), dim // max(1, slices // HEADS), tracking, slices, INNER // slices
        weights[f"{mixer}{name}.weight"] = normal(*shape)
        weights[f"{mixer}{name}.bias"] = normal(HEADS, dim, tracking)
    gates = {"source": (JT, JK, JV), "mark": (JO, JQ, JT), "direct": (JO, JQ, JK, JV)}
    for name, shape in gates.items():
        weights[f"{mixer}{name}.bias"] = normal(HEADS, *shape)
        if gate_slices is not None:
            shape = HEADS // gate_slices, gate_slices, *shape, INNER // gate_slices
            weights[f"{mixer}{name}.weight"] = normal(*shape, scale=0.1)
    for name, shape in (("inproj", (JT, JT)), ("eigenvalues", (JT,)), ("outproj", (JT, JT))):
        if JT > 1 or name == "eigenvalues":
            weights[f"{mixer}transition.{name}_bias"] = normal(HEADS, *shape)
            weights[f"{mixer}transition.{name}_weight"] = normal(HEADS, 1, *shape, INNER, scale=0.02)
    return weights


def rms(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale


def authors_logits(weights, ids):
    """Their model, written out from the paper's equations on their layout, one token after the other."""
    get = {key.rpartition("blocks.0.")[2]: value for key, value in weights.items()}
    x = get["token_embedding.weight"][ids]
    u, z = (rms(x, get["norm.scale"]) @ get["upproj.weight"].T + get["upproj.bias"]).chunk(2, -1)
    part = {key.removeprefix("interaction_module."): value for key, value in get.items()}
    taps = part["conv._conv.weight"]
    c = F.conv1d(F.pad(u.mT, (3, 0)), taps, part["conv._conv.bias"], groups=INNER).mT

    def heads(name, given):
        weight = part[f"{name}.weight"]
        out = torch.einsum("hkjsx,btsx->bthskj", weight, given.unflatten(-1, (weight.shape[3], -1)))
        return out.reshape(*given.shape[:2], *part[f"{name}.bias"].shape) + part[f"{name}.bias"]

    def affine(weight, bias):
        if weight is None:
            return bias.expand(*ids.shape, *bias.shape)
        flat = weight.flatten(2, -2)
        out = torch.einsum("gsjx,btsx->btgsj", flat, c.unflatten(-1, (flat.shape[1], -1)))
        return out.reshape(*ids.shape, *bias.shape) + bias

    def gate(name):
        return affine(part.get(f"{name}.weight"), part[f"{name}.bias"]).sigmoid()

    def transition(name):
        return affine(part[f"transition.{name}_weight"], part[f"transition.{name}_bias"])

    Q, K, V = heads("query", c), heads("key", c), heads("value_", u)
    S, M, D = gate("source"), gate("mark"), gate("direct")
    T = torch.tanh(5 * transition("eigenvalues"))[..., None]
    if "transition.inproj_bias" in part:
        one, two = (torch.matrix_exp((a - a.mT).contiguous()) for a in (transition("outproj"), transition("inproj")))
        T = (one * T.mT) @ two
    C, outputs = 0, []
    for t in range(ids.shape[1]):
        C = torch.zeros(len(ids), HEADS, Q.shape[3], V.shape[3], T.shape[-1], dtype=x.dtype) if t == 0 else C
        y = torch.einsum("bhdj,bhoji,bhdvi->bhvo", Q[:, t], M[:, t], C)
        y = y + torch.einsum("bhojkl,bhdj,bhdk,bhvl->bhvo", D[:, t], Q[:, t], K[:, t], V[:, t])
        C = torch.einsum("bhin,bhdvn->bhdvi", T[:, t], C)
        C = C + torch.einsum("bhikl,bhdk,bhvl->bhdvi", S[:, t], K[:, t], V[:, t])
        outputs.append(y.flatten(2) / math.sqrt(Q.shape[3]))
    y = rms(torch.stack(outputs, 1), part["mhnorm.scale"]).flatten(2) + part["passthrough.scale"] * c
    x = x + (y * F.silu(z)) @ get["downproj.weight"].T + get["downproj.bias"]
    logits = rms(x, get["post_blocks_norm.scale"]) @ get["lm_head.weight"].T
    return 10 * torch.tanh(logits / 10)


@pytest.mark.parametrize(
    ("slices", "J", "gate_slices"),
    [(16, (4, 1, 4, 4, 1), None), (1, (4, 1, 4, 4, 1), 1), (4, (1, 1, 1, 1, 1), 2), (2, (2, 2, 4, 4, 2), 4)],
    ids=["defaults", "dense", "numbers", "all"],
)
def test_weights_of_the_authors_give_what_their_equations_say(slices, J, gate_slices):
    weights = authors_state_dict(slices, J, gate_slices)
    JT, JK, JV, JO, JQ = J
    config = PLSTMConfig(
        vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=1, num_attention_heads=HEADS, transition_dim=JT,
        key_tracking_dim=JK, value_tracking_dim=JV, output_tracking_dim=JO, query_tracking_dim=JQ,
        qkv_block_size=INNER // slices,
    )  # fmt: skip
    model = PLSTMForCausalLM(config).double().eval()
    model.load_state_dict(convert_state_dict(weights, config))
    ids = torch.randint(VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, authors_logits(weights, ids), atol=1e-9, rtol=0)


def test_foreign_weights_are_refused_by_name():
    config = PLSTMConfig(vocab_size=VOCABULARY, hidden_size=SIZE, num_hidden_layers=1)
    weights = authors_state_dict(4, (4, 1, 4, 4, 1))
    message = "reads 4 slices, but qkv_block_size (4) makes 16; use qkv_block_size=16."
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_state_dict(weights, config)
    with pytest.raises(ValueError, match=re.escape("'block_stack.blocks.0.norm2.scale' has no counterpart in PLSTM")):
        convert_state_dict({"block_stack.blocks.0.norm2.scale": torch.ones(4)}, config)


def build(cls=PLSTMForCausalLM, **overrides):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": SIZE, "num_hidden_layers": 2, "gate_initializer_range": 0.1}
    return cls(PLSTMConfig(**{**sizes, **overrides})).eval()


def test_logits_are_capped_and_need_not_be():
    ids = torch.tensor([[1, 2, 3, 4]])
    capped, free = build(initializer_range=0.5, logit_softcap=2.0), build(initializer_range=0.5, logit_softcap=None)
    with torch.no_grad():
        got, want = capped(ids).logits, free(ids).logits
    assert got.abs().max() <= 2.0 < want.abs().max()
    torch.testing.assert_close(got, 2 * torch.tanh(want / 2))


def test_a_model_in_half_precision_keeps_the_biases_of_its_gates(tmp_path):
    build().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert type(model) is PLSTMForCausalLM
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    gates = ("source", "mark", "direct", "transition.eigenvalues")
    assert kept == {f"model.layers.{n}.mixer.{gate}.bias" for n in range(2) for gate in gates}
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


def test_the_state_has_a_fixed_size():
    model = build()
    with torch.no_grad():
        for length in (1, 50):
            cache = model(torch.ones(2, length, dtype=torch.long), use_cache=True).past_key_values
            conv, state = cache.layers[0].read("conv", "state")
            assert conv.shape == (2, INNER, 4)
            assert state.shape == (2, HEADS, 16, 4, 4)


def test_the_token_head_labels_every_token():
    model = build(PLSTMForTokenClassification, num_labels=5)
    ids = torch.tensor([[1, 2, 3]])
    output = model(ids, labels=torch.tensor([[4, -100, 0]]))
    assert output.logits.shape == (1, 3, 5)
    want = F.cross_entropy(output.logits[0, [0, 2]], torch.tensor([4, 0]))
    torch.testing.assert_close(output.loss, want)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads (3) times output_tracking_dim (4) must divide the inner "
         "size (64: expand * hidden_size rounded up to 64)"),
        ({"key_tracking_dim": 3}, "num_attention_heads (4) times key_tracking_dim (3) must divide the inner size (64"),
        ({"qkv_block_size": 5}, "qkv_block_size (5) must divide the inner size (64)"),
        ({"qkv_block_size": 32, "num_attention_heads": 16}, None),
        ({"transition_dim": 0}, "transition_dim (0) must be at least 1; use transition_dim=1."),
        ({"conv_kernel": 0}, "conv_kernel (0) must be at least 1; use conv_kernel=1."),
    ],
)  # fmt: skip
def test_sizes_are_checked_when_the_configuration_is_made(arguments, message):
    if message is None:
        assert PLSTMConfig(hidden_size=SIZE, **arguments).sub_heads == 2
        return
    with pytest.raises(Exception, match=re.escape(message)):
        PLSTMConfig(hidden_size=SIZE, **arguments)
