"""What a row of the registry says about an architecture."""

import importlib
from dataclasses import dataclass, field


def _load(path):
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the project knows about one `model_type`.

    Attributes:
        config: `"package.module:Class"` of the configuration.
        models: model class per Auto class name. A head that no Auto class fits is listed under its task, such as
            `"TimeSeriesClassification"`; exports name it in `auto_map["AutoModel"]`.
        lora_targets: module names that PEFT adapts by default; `feedforward_targets` is the part of them inside the
            feed-forward block (IA3 scales those at their input).
        causal, recurrent, seq2seq, has_cache: traits the common tests choose by.
        stock_owned: the type, its configuration and some of its heads are transformers'. Auto classes keep giving
            transformers' class for those heads and ours for the rest; `register(override=...)` changes that.
        example: Python line that makes `inputs` for the card's example, where they are not token ids.
        tiny: configuration arguments of the smallest model that exercises every part, for tests.
    """

    model_type: str
    config: str
    models: dict[str, str]
    title: str
    summary: str
    paper: str
    arxiv: str
    citation: str
    lora_targets: tuple[str, ...]
    feedforward_targets: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ("text",)
    causal: bool = True
    recurrent: bool = True
    seq2seq: bool = False
    stock_owned: bool = False
    has_cache: bool = True
    license: str = "apache-2.0"
    example: str | None = None
    tiny: dict = field(default_factory=dict)

    def config_class(self):
        return _load(self.config)

    def model_class(self, head):
        """The class registered for an Auto class name or task; KeyError lists what there is."""
        if head not in self.models:
            raise KeyError(f"{self.model_type} has no head {head!r}; it has {', '.join(self.models)}")
        return _load(self.models[head])
