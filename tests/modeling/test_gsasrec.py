"""gSASRec: causality, the authors' block and their checkpoints."""

import math

import pytest
import torch
from torch.nn import functional as F

from undersong.modeling.gsasrec.configuration_gsasrec import GSASRecConfig
from undersong.modeling.gsasrec.convert_gsasrec import convert_state_dict
from undersong.modeling.gsasrec.modeling_gsasrec import GSASRecForSequentialRecommendation

from .recommenders import SIZES, recommender

pytestmark = pytest.mark.usefixtures("one_thread")
AUTHORS = SIZES | {"intermediate_size": 16, "block_type": "sasrec"}


@pytest.mark.parametrize("block_type", ["pre_norm", "sasrec"])
def test_a_later_item_never_changes_earlier_outputs(block_type):
    model = recommender("gsasrec", block_type=block_type)
    ids = torch.tensor([[0, 3, 5, 8, 2, 9]])
    changed = ids.clone()
    changed[0, 4] = 20
    one, other = model(ids).logits, model(changed).logits
    assert torch.equal(one[:, :4], other[:, :4])
    assert (one[:, 4:] - other[:, 4:]).abs().amax((0, 2)).min() > 1e-3


def test_padded_positions_are_finite_and_hold_nothing():
    model = recommender("gsasrec")
    ids = torch.tensor([[0, 0, 3], [0, 0, 0]])
    states = model.model(ids).last_hidden_state
    assert (states[ids == 0] - model.model.norm.bias).abs().max() < 1e-6


def test_defaults_of_the_two_blocks():
    assert (GSASRecConfig(hidden_size=64).intermediate_size, GSASRecConfig().hidden_act) == (256, "gelu")
    authors = GSASRecConfig(hidden_size=64, block_type="sasrec")
    assert (authors.intermediate_size, authors.hidden_act) == (64, "relu")
    with pytest.raises(Exception, match=r"hidden_size \(10\) must be divisible .*\(4\); use .*hidden_size=12"):
        GSASRecConfig(hidden_size=10, num_attention_heads=4)


def checkpoint(items=30, width=16, length=12, blocks=2, reuse=False):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.5

    def pair(name, *shape):
        return {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}

    state = {"item_embedding.weight": random(items + 2, width), "position_embedding.weight": random(length, width)}
    for block in range(blocks):
        name = f"transformer_blocks.{block}"
        for norm in ("first_norm", "second_norm"):
            state |= pair(f"{name}.{norm}", width)
        for linear in ("query_proj", "key_proj", "val_proj"):
            state |= pair(f"{name}.multihead_attention.{linear}", width, width)
        state |= pair(f"{name}.dense1", width, width) | pair(f"{name}.dense2", width, width)
    state |= pair("seq_norm", width)
    return state if reuse else state | {"output_embedding.weight": random(items + 2, width)}


def authors_states(state, items, heads=2, length=12):
    """The authors' arithmetic for one history at the end of a full row: states `[len(items), width]`."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    x = state["item_embedding.weight"][items] + state["position_embedding.weight"][length - len(items) :]
    later = torch.ones(len(items), len(items)).triu(1).bool()
    for block in range(2):
        name = f"transformer_blocks.{block}"
        queries = norm(f"{name}.first_norm", x)
        q, k, v = (
            linear(f"{name}.multihead_attention.{what}", y).unflatten(-1, (heads, -1)).transpose(0, 1)
            for what, y in (("query_proj", queries), ("key_proj", x), ("val_proj", x))
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(later, -torch.inf).softmax(-1)
        y = norm(f"{name}.second_norm", (weights @ v).transpose(0, 1).flatten(1) + queries)
        x = y + linear(f"{name}.dense2", linear(f"{name}.dense1", y).relu())
    return norm("seq_norm", x)


@pytest.mark.parametrize("reuse", [False, True])
def test_a_checkpoint_of_the_authors_scores_as_there(reuse):
    reference = checkpoint(reuse=reuse)
    config = GSASRecConfig(**AUTHORS, tie_word_embeddings=reuse)
    model = GSASRecForSequentialRecommendation(config).eval()
    model.load_state_dict(convert_state_dict(reference, config))
    items = torch.tensor([4, 9, 30, 1])
    table = reference["item_embedding.weight" if reuse else "output_embedding.weight"]
    want = authors_states(reference, items) @ table[1:31].T
    with torch.no_grad():
        got = model(torch.tensor([[0, 0, *items]])).logits[0, 2:]
    assert (got - want).abs().max() < 1e-4


def test_what_is_no_checkpoint_of_theirs_is_refused():
    config = GSASRecConfig(**AUTHORS)
    with pytest.raises(ValueError, match=r"block_type \('pre_norm'\) must be 'sasrec'"):
        convert_state_dict(checkpoint(), GSASRecConfig(**SIZES))
    with pytest.raises(ValueError, match=r"item_embedding.weight has 22 rows, but num_items \(30\) needs 32.* to 20"):
        convert_state_dict(checkpoint(items=20), config)
    with pytest.raises(ValueError, match="holds 'lm_head.weight', which the authors' gSASRec does not have"):
        convert_state_dict({"lm_head.weight": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="has no 'item_embedding.weight'"):
        convert_state_dict({"seq_norm.weight": torch.ones(16)}, config)
