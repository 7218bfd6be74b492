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
    ("past_values", "test_model_get_set_embeddings"): "a series has no token embeddings to get or set",
    ("past_values", "test_resize_tokens_embeddings"): "a series has no token embeddings to resize",
    ("past_values", "test_load_with_mismatched_shapes"): "loads through AutoModelForSequenceClassification, which is"
    " the text head of the same type; test_can_load_ignoring_mismatched_shapes covers the behaviour",
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
}
# Hidden states a stack gives, where they are not those of every layer and what goes in.
HIDDEN_STATES = {"pointer-network": 1}  # all layers of an LSTM are one call

# Heads no Auto class knows: the suite gives them labels and expectations of this one.
LIKE_AUTO = {"TimeSeriesClassification": "AutoModelForSequenceClassification"}


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


def _mask():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, :2] = 0  # one row with left padding
    return mask


BATCH, LENGTH = 3, 7
COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads")  # a Mamba has no attention heads
INPUTS = {"input_ids": _input_ids, "input_values": _input_values, "past_values": _past_values}


class CommonTester:
    """What the suite asks of a `model_tester`."""

    batch_size, seq_length, is_training = BATCH, LENGTH, True

    def __init__(self, row, main_input):
        self.row, self.main_input = row, main_input
        config = self.get_config()
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            if hasattr(config, name):
                setattr(self, name, getattr(config, name))
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
        self.config_tester = ConfigTester(self, config_class=row.config_class(), common_properties=common, **row.tiny)
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
                assert ("labels" in inputs) == (head != "AutoModel")

    body = {
        "__module__": __name__,
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
