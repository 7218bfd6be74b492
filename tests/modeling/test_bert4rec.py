"""BERT4Rec: equality with transformers' BertForMaskedLM, positions, and checkpoints of other code."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from undersong.modeling.bert4rec.configuration_bert4rec import SequentialRecConfig
from undersong.modeling.bert4rec.convert_bert4rec import convert_state_dict
from undersong.modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation

from .recommenders import SIZES, recommender

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = SIZES["num_items"] + 1


def stock_model(**options):
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "num_items"}
    model = BertForMaskedLM(BertConfig(**{"vocab_size": 32, "num_hidden_layers": 2} | sizes | options)).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    return model


def test_a_stock_masked_lm_loads_and_gives_the_same_states_and_item_logits(tmp_path):
    stock = stock_model()
    stock.save_pretrained(tmp_path)
    config = SequentialRecConfig(**SIZES, type_vocab_size=2, position_anchor="left")
    model, info = BertForSequentialRecommendation.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[3, 5, MASK, 7, 0, 0], [1, 2, 3, 4, 5, MASK]])
    with torch.no_grad():
        want = stock(ids, attention_mask=ids.ne(0), output_hidden_states=True)
        got = model.eval()(ids, output_hidden_states=True)
    valid = ids.ne(0)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert (ours - theirs)[valid].abs().max() < 1e-6
    assert (got.logits - want.logits[..., 1:MASK])[valid].abs().max() < 1e-6


def test_logits_of_all_ids_are_those_of_stock():
    stock = stock_model()
    model = recommender("bert4rec", type_vocab_size=2, position_anchor="left", logits_over_items_only=False)
    model.load_state_dict(stock.state_dict())
    ids = torch.tensor([[3, MASK, 8, 9]])
    labels = torch.tensor([[-100, 4, -100, 9]])
    with torch.no_grad():
        want = stock(ids, labels=labels)
        assert (model(ids).logits - want.logits).abs().max() < 1e-6
        assert (model(ids, labels=labels).loss - want.loss).abs() < 1e-6


def test_right_anchored_positions_put_the_next_item_last_for_every_length():
    model = recommender("bert4rec")
    ids = torch.tensor([[3, 5, MASK]])
    positions = torch.tensor([[9, 10, 11]])
    assert torch.equal(model(ids).logits, model(ids, position_ids=positions).logits)
    left = recommender("bert4rec", position_anchor="left")
    assert torch.equal(left(ids).logits, left(ids, position_ids=positions - 9).logits)


def test_order_matters_exactly_as_long_as_positions_do():
    model = recommender("bert4rec", dtype=torch.float64)
    one, other = torch.tensor([[3, 5, 8, MASK]]), torch.tensor([[5, 3, 8, MASK]])
    assert (model(one).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 1e-3
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.zero_()
    assert (model(one).logits[0, -1] - model(other).logits[0, -1]).abs().max() < 1e-12


def test_logits_to_keep_gives_the_last_or_the_named_positions():
    model = recommender("bert4rec")
    ids = torch.tensor([[3, MASK, 8, MASK]])
    every = model(ids).logits
    for keep, columns in ((1, [3]), (torch.tensor([1, 3]), [1, 3])):
        kept = model(ids, logits_to_keep=keep).logits
        assert kept.shape == (1, len(columns), 30)
        assert (kept - every[:, columns]).abs().max() < 1e-5


def test_all_ids_and_sampled_losses_exclude_each_other():
    with pytest.raises(Exception, match=r"logits_over_items_only \(False\) is for loss_type='ce'; with 'gbce'"):
        SequentialRecConfig(num_items=9, logits_over_items_only=False, loss_type="gbce")


def recbole_checkpoint(items=30, width=16, inner=24, length=12, layers=2):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.5

    def pair(name, *shape):
        return {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}

    state = {
        "item_embedding.weight": random(items + 2, width),
        "position_embedding.weight": random(length, width),
        "output_bias": random(items + 1),
        **pair("LayerNorm", width),
        **pair("output_ffn", width, width),
        **pair("output_ln", width),
    }
    for layer in range(layers):
        attention = f"trm_encoder.layer.{layer}.multi_head_attention"
        feed = f"trm_encoder.layer.{layer}.feed_forward"
        for name in ("query", "key", "value", "dense"):
            state |= pair(f"{attention}.{name}", width, width)
        state |= pair(f"{attention}.LayerNorm", width)
        state |= pair(f"{feed}.dense_1", inner, width) | pair(f"{feed}.dense_2", width, inner)
        state |= pair(f"{feed}.LayerNorm", width)
    return state


def recbole_scores(state, items, heads=2):
    """RecBole's arithmetic for one history without padding, the mask behind it: `[N + 1]`, padding first."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    x = state["item_embedding.weight"][items] + state["position_embedding.weight"][: len(items)]
    x = norm("LayerNorm", x)
    for layer in range(2):
        attention, feed = f"trm_encoder.layer.{layer}.multi_head_attention", f"trm_encoder.layer.{layer}.feed_forward"
        q, k, v = (
            linear(f"{attention}.{name}", x).unflatten(-1, (heads, -1)).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1)
        x = norm(f"{attention}.LayerNorm", linear(f"{attention}.dense", (weights @ v).transpose(0, 1).flatten(1)) + x)
        inner = linear(f"{feed}.dense_1", x)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = norm(f"{feed}.LayerNorm", linear(f"{feed}.dense_2", inner) + x)
    x = norm("output_ln", F.gelu(linear("output_ffn", x[-1])))
    return state["item_embedding.weight"][:-1] @ x + state["output_bias"]


def test_a_checkpoint_of_recbole_scores_as_there():
    reference = recbole_checkpoint()
    config = SequentialRecConfig(**SIZES, position_anchor="left")
    model = BertForSequentialRecommendation(config).eval()
    model.load_state_dict(convert_state_dict(reference, config))
    history = [4, 9, 30, 1]
    want = recbole_scores(reference, torch.tensor([*history, MASK]))[1:]
    best = model.recommend([history], k=30, exclude_seen=False)
    assert (best.scores[0] - want[best.item_ids[0] - 1]).abs().max() < 1e-4


def test_variables_of_the_authors_are_transposed_and_their_mask_is_found():
    stock = stock_model(vocab_size=34, type_vocab_size=1, hidden_act="gelu_pytorch_tanh")
    variables = {}
    for name, value in stock.state_dict().items():
        if name.startswith("cls.predictions.decoder") or name.endswith(("position_ids", "token_type_ids")):
            continue
        kernel = value.dim() == 2 and "embeddings" not in name
        name = name.replace("layer.", "layer_").replace(".", "/").replace("_embeddings/weight", "_embeddings")
        name = name.replace("cls/predictions/bias", "cls/predictions/output_bias")
        norm = "LayerNorm" in name
        name = name.replace("/weight", "/gamma" if norm else "/kernel")
        name = name.replace("/bias", "/beta") if norm else name
        variables[name] = (value.T if kernel else value).numpy()
    assert "bert/encoder/layer_1/attention/self/query/kernel" in variables
    config = SequentialRecConfig(**SIZES, position_anchor="left", hidden_act="gelu_pytorch_tanh")
    model = BertForSequentialRecommendation(config).eval()
    model.load_state_dict(convert_state_dict(variables, config, mask_row=33))
    with torch.no_grad():
        want = stock(torch.tensor([[3, 5, 33]])).logits[0, -1]
        got = model(torch.tensor([[3, 5, MASK]])).logits[0, -1]
    assert (got - want[1:31]).abs().max() < 1e-6
    for wrong in (None, 30, 34):
        with pytest.raises(ValueError, match=rf"mask_row \({wrong}\) must be the authors' id of \[MASK\], 31 to 33"):
            convert_state_dict(variables, config, mask_row=wrong)


def test_the_replication_begins_its_items_at_row_0():
    stock = stock_model(type_vocab_size=2)
    config = SequentialRecConfig(**SIZES, type_vocab_size=2, position_anchor="left")
    model = BertForSequentialRecommendation(config).eval()
    model.load_state_dict(convert_state_dict(stock.state_dict(), config, source="repro"))
    with torch.no_grad():
        want = stock(torch.tensor([[2, 4, 31]])).logits[0, -1]
        got = model(torch.tensor([[3, 5, MASK]])).logits[0, -1]
    assert (got - want[:30]).abs().max() < 1e-6


def test_what_is_no_known_checkpoint_is_refused():
    config = SequentialRecConfig(**SIZES)
    with pytest.raises(ValueError, match="names such as 'bert.x'.* neither RecBole's nor the authors'"):
        convert_state_dict({"bert.x": torch.ones(1)}, config)
    with pytest.raises(ValueError, match=r"source \('tf1'\) must be one of 'recbole', 'authors', 'repro'"):
        convert_state_dict({}, config, source="tf1")
    with pytest.raises(ValueError, match=r"word_embeddings.weight of the recbole checkpoint \(\[22, 16\]\) does not"):
        convert_state_dict(recbole_checkpoint(items=20) | {"output_bias": torch.ones(31)}, config)
    headless = {k: v for k, v in recbole_checkpoint().items() if k != "output_bias"}
    with pytest.raises(ValueError, match=r"output_bias \(missing\) must be \[num_items \+ 1\] = \[31\]"):
        convert_state_dict(headless, config)
