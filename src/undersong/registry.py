"""One table, a row per architecture, and what makes the ecosystem know it.

Auto registration, PEFT's target modules, cards, the command line and the common tests all read `ARCHITECTURES`.
Adding an architecture is a folder under `modeling/` and a row here.

Nothing here imports torch, transformers or peft. `register()` puts a hook behind the modules that own the tables
(`transformers.models.auto.configuration_auto`, `peft.utils.constants`) and fills them when they are loaded, or at
once when they are loaded already. Model classes follow when the first config of their type is built.
"""

import functools
import importlib
import sys
import warnings
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the project knows about one `model_type`.

    Attributes:
        config: `"package.module:Class"` of the configuration.
        models: model class per Auto class name. A head that no Auto class fits is listed under its task, such as
            `"TimeSeriesClassification"`; exports name it in `auto_map["AutoModel"]`.
        lora_targets: module names that PEFT adapts by default; `feedforward_targets` is the part of them inside the
            feed-forward block (IA3 scales those at their input).
        causal, recurrent, seq2seq, stock_owned, has_cache: traits the common tests choose by.
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
    tiny: dict = field(default_factory=dict)

    def config_class(self):
        return _load(self.config)

    def model_class(self, head):
        """The class registered for an Auto class name or task; KeyError lists what there is."""
        if head not in self.models:
            raise KeyError(f"{self.model_type} has no head {head!r}; it has {', '.join(self.models)}")
        return _load(self.models[head])


_AAREN = "undersong.modeling.aaren.modeling_aaren"
_ROWS = [
    Architecture(
        model_type="aaren",
        config="undersong.modeling.aaren.configuration_aaren:AarenConfig",
        models={
            "AutoModel": f"{_AAREN}:AarenModel",
            "AutoModelForCausalLM": f"{_AAREN}:AarenForCausalLM",
            "AutoModelForSequenceClassification": f"{_AAREN}:AarenForSequenceClassification",
            "TimeSeriesClassification": f"{_AAREN}:AarenForTimeSeriesClassification",
        },
        title="Aaren",
        summary="Attention with one learned query per layer as a recurrence: parallel training, O(1) state.",
        paper="Attention as an RNN",
        arxiv="2405.13956",
        citation="""@article{feng2024attention,
  title   = {Attention as an {RNN}},
  author  = {Feng, Leo and Tung, Frederick and Hajimirsadeghi, Hossein and
             Ahmed, Mohamed Osama and Bengio, Yoshua and Mori, Greg},
  journal = {arXiv preprint arXiv:2405.13956},
  year    = {2024}
}""",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        feedforward_targets=("down_proj",),
        modalities=("text", "series"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "input_size": 3,
        },
    ),
]
ARCHITECTURES: dict[str, Architecture] = {row.model_type: row for row in _ROWS}


def _load(path):
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _CallAfterExec(Loader):
    def __init__(self, loader, callback):
        self.loader, self.callback = loader, callback

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        # leave no trace: inspect, pickle and reload see the module's own loader
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.callback()


class _AfterImport(MetaPathFinder):
    """Calls a function right after a named module was executed for the first time."""

    def __init__(self, callbacks):
        self.callbacks = callbacks

    def find_spec(self, fullname, path=None, target=None):
        callback = self.callbacks.get(fullname)
        if callback is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallAfterExec(spec.loader, callback)
                return spec
        return None


def _register_configs():
    """Runs when transformers' Auto tables load: our config classes join them, model classes follow lazily."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    for row in ARCHITECTURES.values():
        if row.stock_owned:
            continue
        ours = row.config_class()
        owner = None
        if row.model_type in CONFIG_MAPPING:  # not .get(): this lazy mapping only answers to []
            owner = CONFIG_MAPPING[row.model_type]
        if owner is None:
            AutoConfig.register(row.model_type, ours)
            _register_models_with_first_config(row, ours)
        elif owner is not ours:
            # never replace a type behind the user's back, whoever was first
            warnings.warn(
                f"model_type {row.model_type!r} already belongs to {owner.__module__}.{owner.__name__}; Auto classes"
                f" keep giving that one. Use undersong.{ours.__name__} and its model classes directly for ours.",
                stacklevel=2,
            )


def _register_models_with_first_config(row, config_class):
    # Wrapped from outside, so that nothing of it is in the source that exports carry.
    original = config_class.__post_init__

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        config_class.__post_init__ = original
        register_models(row)
        return original(self, *args, **kwargs)

    config_class.__post_init__ = __post_init__


def register_models(row):
    """Registers every model class of a row with its Auto class (imports torch and the modeling file)."""
    import transformers

    for head, path in row.models.items():
        auto_class = getattr(transformers, head, None)
        if auto_class is not None:
            auto_class.register(row.config_class(), _load(path), exist_ok=True)


# The PEFT tables that do not hold projections to adapt: layer norms, prefix tuning, and those IA3 wants apart.
_PEFT_NOT_PROJECTIONS = ("LNTUNING", "PREFIX_TUNING", "IA3_FEEDFORWARD", "BEFT")


def _register_peft():
    """Runs when PEFT's tables load: `LoraConfig()` and its relatives know our default target modules."""
    constants = sys.modules["peft.utils.constants"]
    tables = {
        name: table
        for name, table in vars(constants).items()
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and isinstance(table, dict)
    }
    for row in ARCHITECTURES.values():
        for name, table in tables.items():
            if not any(kind in name for kind in _PEFT_NOT_PROJECTIONS):
                table.setdefault(row.model_type, list(row.lora_targets))
        tables["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"].setdefault(
            row.model_type, list(row.feedforward_targets)
        )


_CALLBACKS = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "peft.utils.constants": _register_peft,
}


def register():
    """Makes transformers and PEFT know every row. Idempotent; called by `import undersong`."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport(_CALLBACKS))
    for name, callback in _CALLBACKS.items():
        if name in sys.modules:
            callback()
