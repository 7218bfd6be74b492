"""The Auto class that transformers lacks: recommenders that rank a catalogue for the next item of a history."""

from collections import OrderedDict

from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES


class AutoModelForSequentialRecommendation(_BaseAutoModelClass):
    """Gives the recommender that fits a configuration: `from_pretrained`, `from_config` and `register` as usual.

    >>> from transformers import AutoConfig
    >>> config = AutoConfig.for_model("bert4rec", num_items=9, hidden_size=8)
    >>> type(AutoModelForSequentialRecommendation.from_config(config)).__name__
    'BertForSequentialRecommendation'
    """

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


__all__ = ["AutoModelForSequentialRecommendation"]
