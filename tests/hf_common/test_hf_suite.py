"""transformers' own common model tests (`ModelTesterMixin`, `ConfigTester`), one test class per row of the registry.

The heads of a row that take the same main input share a class: `aaren` gives `AarenInputIdsTest` (the text heads) and
`AarenPastValuesTest` (the series head). What of the suite does not apply is listed in `EXCLUDED`, with the reason.
"""

import sys
import unittest
import warnings
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.testing_utils import torch_device

from undersong.registry import ARCHITECTURES, register

from .fetch import FetchError, fetch

# (model_type or main input, test of the suite) -> why it cannot hold there
EXCLUDED = {
    **{
        (main_input, test): "has no token embeddings to get, set or resize"
        for main_input in ("event_times", "states")
        for test in ("test_model_get_set_embeddings", "test_resize_tokens_embeddings")
    },
    ("past_values", "test_model_get_set_embeddings"): "a series has no token embeddings to get or set",
    ("past_values", "test_resize_tokens_embeddings"): "a series has no token embeddings to resize",
    ("past_values", "test_load_with_mismatched_shapes"): "loads through AutoModelForSequenceClassification, which is"
    " the text head of the same type; test_can_load_ignoring_mismatched_shapes covers the behaviour",
    ("pixel_values", "test_model_get_set_embeddings"): "patches are embedded by a convolution, not by an nn.Embedding",
    ("pixel_values", "test_resize_tokens_embeddings"): "images have no vocabulary to resize",
    ("node_features", "test_model_get_set_embeddings"): "nodes are vectors, without token embeddings to get or set",
    ("node_features", "test_resize_tokens_embeddings"): "nodes are vectors, without token embeddings to resize",
    ("node_features", "test_load_with_mismatched_shapes"): "loads through AutoModelForSequenceClassification;"
    " test_can_load_ignoring_mismatched_shapes covers the behaviour",
    ("node_features", "test_batching_equivalence"): "cuts inputs along their first dimension, which is that of nodes;"
    " tests/modeling/test_plstm_graph.py has a batch against its graphs one by one",
    ("input_values", "test_model_get_set_embeddings"): "items that are vectors have no token embeddings to get or set",
    ("input_values", "test_resize_tokens_embeddings"): "items that are vectors have no token embeddings to resize",
    ("input_values", "test_inputs_embeds"): "takes input_ids for granted",
    ("input_values", "test_inputs_embeds_matches_input_ids"): "takes input_ids for granted",
    ("pointer-network", "test_encoder_decoder_loss_no_double_shift"): "draws labels from config.vocab_size, but the"
    " vocabulary is the items of a batch; tests/modeling/test_pointer_network.py has the loss by its definition",
    **{
        (model_type, "test_training_gradient_checkpointing_use_reentrant_true"): "refused by name: gradients of the"
        " router would be lost; see tests/modeling/test_rmoe.py and test_attach_recurrent_router.py"
        for model_type in ("rmoe", "rmoe_mixtral", "rmoe_olmoe", "rmoe_qwen3_moe")
    },
    ("recformer", "test_retain_grad_hidden_states_attentions"): "asks for transformers' own sliding chunks, whose"
    " records of hidden states are cut from padded ones; tests/modeling/test_recformer.py has it for ours",
    **{
        (
            model_type,
            test,
        ): "refused by name: rows at the end would move the mask; tests/modeling/test_recommend.py has"
        " resize_item_embeddings"
        for model_type in ("bert4rec", "gsasrec")
        for test in (
            "test_resize_embeddings_untied",
            "test_resize_embeddings_untied_no_reinit_on_post_init",
            "test_resize_tokens_embeddings",
        )
    },
}
# Hidden states a stack gives, where they are not those of every layer and what goes in.
HIDDEN_STATES = {"pointer-network": 1}  # all layers of an LSTM are one call

# Heads no Auto class knows: the suite gives them labels and expectations of this one.
LIKE_AUTO = {
    "TimeSeriesClassification": "AutoModelForSequenceClassification",
    "GraphClassification": "AutoModelForSequenceClassification",
    "EventForecasting": "AutoModelForTimeSeriesPrediction",
    "AutoModelForSequentialRecommendation": "AutoModelForMaskedLM",
    "AutoModelForPreTraining": "AutoModelForTokenClassification",  # a label for each token
}

WITHOUT_LABELS = (
    "AutoModel",
    "AutoBackbone",
    "EventForecasting",
)  # what comes next in a stream of events is its own label


def _input_ids(config):
    return {"input_ids": torch.randint(1, config.vocab_size, (BATCH, LENGTH)), "attention_mask": _mask()}


def _past_values(config):
    return {"past_values": torch.rand(BATCH, LENGTH, config.input_size), "attention_mask": _mask()}


def _input_values(config):
    inputs = {"input_values": torch.rand(BATCH, LENGTH, config.input_size), "attention_mask": _mask()}
    if config.is_encoder_decoder:
        ids = torch.randint(1, LENGTH + 1, (BATCH, LENGTH))
        ids[:, 0] = config.decoder_start_token_id
        inputs["decoder_input_ids"] = ids
    return inputs


def _event_times(config):
    times = (torch.rand(BATCH, LENGTH) + 0.1).cumsum(1)
    types = torch.randint(config.num_event_types, (BATCH, LENGTH))
    return {"event_times": times, "event_types": types, "attention_mask": _mask()}


def _states(config):
    sizes = {"states": config.state_dim, "actions": config.act_dim, "returns_to_go": 1}
    inputs = {name: torch.rand(BATCH, LENGTH, size) for name, size in sizes.items()}
    return {**inputs, "timesteps": torch.arange(LENGTH).repeat(BATCH, 1), "attention_mask": _mask()}


def _node_features(config):
    """Paths, one behind the other; a node counts as a token."""
    nodes = BATCH * LENGTH
    index = torch.arange(nodes - 1).repeat(2, 1) + torch.tensor([[0], [1]])
    index = index[:, index[1] % LENGTH > 0]
    return {
        "node_features": torch.rand(nodes, config.node_feature_dim),
        "edge_index": index,
        "edge_attr": torch.rand(index.shape[1], config.edge_feature_dim),
        "batch": torch.arange(nodes) // LENGTH,
    }


def _pixel_values(config):
    return {"pixel_values": torch.rand(BATCH, config.num_channels, config.image_size, config.image_size)}


def _mask():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, :2] = 0  # one row with left padding
    return mask


BATCH, LENGTH = 3, 7
# Tokens that make LENGTH: a step of an episode is a return, a state and an action; all graphs are one row of nodes.
TOKENS = {"states": 3, "node_features": BATCH}
COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # a Mamba has no attention heads
INPUTS = {
    "pixel_values": _pixel_values,
    "input_ids": _input_ids,
    "input_values": _input_values,
    "past_values": _past_values,
    "node_features": _node_features,
    "event_times": _event_times,
    "states": _states,
}


class CommonTester:
    """What the suite asks of a `model_tester`."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True

    def __init__(self, row, main_input):
        self.row, self.main_input = row, main_input
        self.seq_length = TOKENS.get(main_input, 1) * LENGTH
        config = self.get_config()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
        if main_input == "pixel_values":
            self.encoder_seq_length = (config.image_size // config.patch_size) ** 2
        self.expected_num_hidden_layers = HIDDEN_STATES.get(row.model_type, config.num_hidden_layers + 1)

    def get_config(self):
        return self.row.config_class()(**{"pad_token_id": 0, **self.row.tiny})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        inputs = INPUTS[self.main_input](config)
        return config, {name: tensor.to(torch_device) for name, tensor in inputs.items()}


def auto_names(head):
    """The table `model_type -> class name` behind an Auto class; the suite chooses labels and checks by class name."""
    return getattr(transformers, LIKE_AUTO.get(head, head))._model_mapping._model_mapping


def make_test_class(row, main_input, heads):
    """A `unittest.TestCase` with the whole suite for those heads of a row."""
    classes = {head: row.model_class(head) for head in heads}
    generative = any(cls.can_generate() for cls in classes.values())
    bases = (ModelTesterMixin, *([GenerationTesterMixin] if generative else []), unittest.TestCase)

    def setUp(self):
        self.model_tester = CommonTester(row, main_input)
        common = [name for name in COMMON if hasattr(self.model_tester.get_config(), name)]
        has_text = hasattr(self.model_tester, "vocab_size")
        self.config_tester = ConfigTester(
            self, config_class=row.config_class(), has_text_modality=has_text, common_properties=common, **row.tiny
        )
        if row.stock_owned:  # the suite loads through Auto classes and expects the class under test
            self.enterContext(register(override=(row.model_type,)))
        for head, cls in classes.items():
            self.enterContext(patch.dict(auto_names(head), {row.model_type: cls.__name__}))

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_every_head_gets_labels(self):
        """The suite passes over heads whose loss it cannot feed; none of ours may slip through that way."""
        for head, cls in classes.items():
            with self.subTest(head):
                _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
                inputs = self._prepare_for_class(inputs, cls, return_labels=True)
                assert ("labels" in inputs) == (head not in WITHOUT_LABELS)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = ModelTesterMixin._prepare_for_class(self, inputs_dict, model_class, return_labels=return_labels)
        if "labels" in inputs and "items" in row.modalities:
            inputs["labels"] = inputs["labels"] + 1  # the suite's labels are 0, which is padding among items
        elif "labels" in inputs and model_class is classes.get("AutoModelForSequentialRecommendation"):
            inputs["labels"] = inputs["labels"][:, 0] + 1  # of texts, one item for a history
        if return_labels and model_class is classes.get("AutoModelForTimeSeriesPrediction"):
            config = self.model_tester.get_config()  # the suite has no labels for forecasts
            inputs["labels"] = torch.zeros(BATCH, config.prediction_length, config.input_size, device=torch_device)
        return inputs

    body = {
        "__module__": __name__,
        "_prepare_for_class": _prepare_for_class,
        "setUp": setUp,
        "test_config": test_config,
        "test_every_head_gets_labels": test_every_head_gets_labels,
        "all_model_classes": tuple(classes.values()),
        "pipeline_model_mapping": {},
        "has_attentions": False,
        # the suite dates a model by the copyright year of its file, and passes over files without one
        "test_can_init_all_missing_weights_before_2023": True,
    }
    for (scope, test), reason in EXCLUDED.items():
        if scope in (row.model_type, main_input):
            body[test] = unittest.skip(reason)(getattr(ModelTesterMixin, test))
    name = f"{row.model_type.title().translate(_NO_MARKS)}{main_input.title().replace('_', '')}Test"
    return type(name, bases, body)


_NO_MARKS = str.maketrans("", "", "_-")


def grouped_heads(row):
    groups = {}
    for head in row.models:
        groups.setdefault(row.model_class(head).main_input_name, []).append(head)
    return groups.items()


try:
    sys.path.append(str(fetch()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decorators of tests that are skipped here warn while they look for hardware
        from hf_tests.generation.test_utils import GenerationTesterMixin
        from hf_tests.test_configuration_common import ConfigTester
        from hf_tests.test_modeling_common import ModelTesterMixin
except FetchError as error:
    message = str(error)

    def test_the_suite_of_transformers_is_there():
        pytest.fail(message)
else:
    for _row in ARCHITECTURES.values():
        for _main_input, _heads in grouped_heads(_row):
            _class = make_test_class(_row, _main_input, _heads)
            globals()[_class.__name__] = _class
    del _class
