"""Checkpoints in the authors' three layouts load into our classes."""

import pytest
import torch

from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.convert_recformer import convert_state_dict
from undersong.modeling.recformer.modeling_recformer import RecformerModel
from undersong.modeling.recformer.modeling_recformer_heads import (
    RecformerForPreTraining,
    RecformerForSequentialRecommendation,
)

CONFIG = RecformerConfig(
    vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=40, attention_window=4,
)  # fmt: skip


@pytest.fixture
def source():
    torch.manual_seed(0)
    state = RecformerForPreTraining(CONFIG).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items() if not name.startswith("lm_head.decoder")}


def published(source):
    """Their recommender: a buffer of positions, the language head, a table of items."""
    extra = {"longformer.embeddings.position_ids": torch.arange(40)[None], "item_embedding.weight": torch.zeros(5, 8)}
    decoder = {"lm_head.decoder.weight": source["longformer.embeddings.word_embeddings.weight"]}
    return {**source, **extra, **decoder}


def check(model, want, prefix=""):
    for name, value in model.state_dict().items():
        if not name.startswith("lm_head.decoder"):
            assert torch.equal(value, want[prefix + name]), name


def test_the_recommender_loads(source):
    state = convert_state_dict(published(source), CONFIG)
    model = RecformerForPreTraining(CONFIG)
    model.load_state_dict(state)
    check(model, source)
    model = RecformerForSequentialRecommendation(CONFIG)
    model.load_state_dict({name: x for name, x in state.items() if name.startswith("longformer.")})
    check(model, source)


def test_the_bare_encoder_loads(source):
    bare = {n.removeprefix("longformer."): x for n, x in source.items() if n.startswith("longformer.")}
    state = convert_state_dict({**bare, "embeddings.position_ids": torch.arange(40)[None]}, CONFIG)
    model = RecformerModel(CONFIG)
    model.load_state_dict({name.removeprefix("longformer."): x for name, x in state.items()})
    check(model, source, "longformer.")


def test_a_training_checkpoint_gets_its_frozen_words_back(source):
    words = source.pop("longformer.embeddings.word_embeddings.weight")
    wrapped = {f"_forward_module.model.{name}": value for name, value in source.items()}
    model = RecformerForPreTraining(CONFIG)
    model.load_state_dict(convert_state_dict(wrapped, CONFIG, word_embeddings=words))
    assert torch.equal(model.get_input_embeddings().weight, words)
    check(model, {**source, "longformer.embeddings.word_embeddings.weight": words})
    with pytest.raises(ValueError, match="has no word embeddings, since training left them as they were; pass"):
        convert_state_dict(wrapped, CONFIG)


def test_what_does_not_fit_is_named(source):
    with pytest.raises(ValueError, match="'bert.pooler' is no name of a Recformer checkpoint"):
        convert_state_dict({"bert.pooler": torch.zeros(1)}, CONFIG)
    source["longformer.embeddings.item_position_embeddings.weight"] = torch.zeros(32, 8)
    with pytest.raises(ValueError, match=r"item_position_embeddings \(\[32, 8\]\) must be \[51, 8\]"):
        convert_state_dict(source, CONFIG)
