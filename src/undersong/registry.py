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


_AAREN = "undersong.modeling.aaren.modeling_aaren"
_MAMBA = "undersong.modeling.mamba.modeling_mamba"
_MAMBA2 = "undersong.modeling.mamba2.modeling_mamba2"
_POINTER = "undersong.modeling.pointer_network.modeling_pointer_network"
_RMOE = "undersong.modeling.rmoe.modeling_rmoe"
_SET2SET = "undersong.modeling.set2set.modeling_set2set"
_S4D = "undersong.modeling.s4d.modeling_s4d"
_S5 = "undersong.modeling.s5.modeling_s5"
_RMOE_CITATION = """@inproceedings{qiu2025layerwise,
  title     = {Layerwise Recurrent Router for Mixture-of-Experts},
  author    = {Qiu, Zihan and Huang, Zeyu and Cheng, Shuang and Zhou, Yizhi and Wang, Zili and
               Titov, Ivan and Fu, Jie},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025}
}"""
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
    Architecture(
        model_type="mamba",
        config="transformers.models.mamba.configuration_mamba:MambaConfig",
        models={
            "AutoModel": f"{_MAMBA}:FastMambaModel",
            "AutoModelForCausalLM": f"{_MAMBA}:FastMambaForCausalLM",
            "AutoModelForSequenceClassification": f"{_MAMBA}:FastMambaForSequenceClassification",
            "AutoModelForTokenClassification": f"{_MAMBA}:FastMambaForTokenClassification",
        },
        title="Mamba",
        summary="transformers' Mamba, same checkpoints: right for padding, packing and chunks, fast on any device.",
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        citation="""@article{gu2023mamba,
  title   = {Mamba: Linear-Time Sequence Modeling with Selective State Spaces},
  author  = {Gu, Albert and Dao, Tri},
  journal = {arXiv preprint arXiv:2312.00752},
  year    = {2023}
}""",
        # dt_proj works too, but only in our classes: transformers' own reads its weight past the adapter
        lora_targets=("in_proj", "x_proj"),
        stock_owned=True,
        tiny={"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    Architecture(
        model_type="mamba2",
        config="transformers.models.mamba2.configuration_mamba2:Mamba2Config",
        models={
            "AutoModel": f"{_MAMBA2}:FastMamba2Model",
            "AutoModelForCausalLM": f"{_MAMBA2}:FastMamba2ForCausalLM",
            "AutoModelForSequenceClassification": f"{_MAMBA2}:FastMamba2ForSequenceClassification",
            "AutoModelForTokenClassification": f"{_MAMBA2}:FastMamba2ForTokenClassification",
        },
        title="Mamba-2",
        summary="transformers' Mamba-2, same checkpoints: right for padding, packing and chunks, fast on any device.",
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space"
        " Duality",
        arxiv="2405.21060",
        citation="""@inproceedings{dao2024transformers,
  title     = {Transformers are {SSM}s: Generalized Models and Efficient Algorithms
               Through Structured State Space Duality},
  author    = {Dao, Tri and Gu, Albert},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2024}
}""",
        lora_targets=("in_proj",),
        stock_owned=True,
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,  # with more, transformers 5.22 computes something else
            "chunk_size": 8,
        },
    ),
    Architecture(
        model_type="s4d",
        config="undersong.modeling.s4d.configuration_s4d:S4DConfig",
        models={
            "AutoModel": f"{_S4D}:S4DModel",
            "AutoModelForCausalLM": f"{_S4D}:S4DForCausalLM",
            "AutoModelForSequenceClassification": f"{_S4D}:S4DForSequenceClassification",
            "TimeSeriesClassification": f"{_S4D}:S4DForTimeSeriesClassification",
        },
        title="S4D",
        summary="A diagonal state space in every channel: trains as a long convolution, decodes with an O(1) state.",
        paper="On the Parameterization and Initialization of Diagonal State Space Models",
        arxiv="2206.11893",
        citation="""@inproceedings{gu2022parameterization,
  title     = {On the Parameterization and Initialization of Diagonal State Space Models},
  author    = {Gu, Albert and Gupta, Ankit and Goel, Karan and R{\\'e}, Christopher},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2022}
}""",
        lora_targets=("out_proj",),
        modalities=("text", "series"),
        tiny={"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "input_size": 3},
    ),
    Architecture(
        model_type="s5",
        config="undersong.modeling.s5.configuration_s5:S5Config",
        models={
            "AutoModel": f"{_S5}:S5Model",
            "AutoModelForCausalLM": f"{_S5}:S5ForCausalLM",
            "AutoModelForSequenceClassification": f"{_S5}:S5ForSequenceClassification",
            "TimeSeriesClassification": f"{_S5}:S5ForTimeSeriesClassification",
        },
        title="S5",
        summary="One diagonal state space a layer, by parallel scan: O(1) state, steps of any size between tokens.",
        paper="Simplified State Space Layers for Sequence Modeling",
        arxiv="2208.04933",
        citation="""@inproceedings{smith2023simplified,
  title     = {Simplified State Space Layers for Sequence Modeling},
  author    = {Smith, Jimmy T. H. and Warrington, Andrew and Linderman, Scott W.},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023}
}""",
        lora_targets=("out_proj",),
        modalities=("text", "series"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_blocks": 2,
            "input_size": 3,
        },
    ),
    Architecture(
        model_type="pointer-network",
        config="undersong.modeling.pointer_network.configuration_pointer_network:PointerNetworkConfig",
        models={
            "AutoModel": f"{_POINTER}:PointerNetworkModel",
            "AutoModelForSeq2SeqLM": f"{_POINTER}:PointerNetworkForConditionalGeneration",
        },
        title="Pointer network",
        summary="Answers with positions of its own input: hulls, tours, orders, selections, by stock generate().",
        paper="Pointer Networks",
        arxiv="1506.03134",
        citation="""@inproceedings{vinyals2015pointer,
  title     = {Pointer Networks},
  author    = {Vinyals, Oriol and Fortunato, Meire and Jaitly, Navdeep},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2015}
}""",
        lora_targets=("key_proj", "query_proj"),
        modalities=("points", "text"),
        causal=False,
        seq2seq=True,
        example='inputs = {"input_values": torch.rand(1, 10, model.config.input_size)}  # [batch, items, numbers]',
        tiny={"input_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_glimpses": 1},
    ),
    Architecture(
        model_type="set2set",
        config="undersong.modeling.set2set.configuration_set2set:Set2SetConfig",
        models={
            "AutoModel": f"{_SET2SET}:Set2SetModel",
            "AutoModelForSequenceClassification": f"{_SET2SET}:Set2SetForSequenceClassification",
        },
        title="Set2Set",
        summary="Encodes sets, of vectors or of token ids, whatever the order of their elements.",
        paper="Order Matters: Sequence to sequence for sets",
        arxiv="1511.06391",
        citation="""@inproceedings{vinyals2016order,
  title     = {Order Matters: Sequence to sequence for sets},
  author    = {Vinyals, Oriol and Bengio, Samy and Kudlur, Manjunath},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2016}
}""",
        lora_targets=("dense",),
        modalities=("points", "text"),
        causal=False,
        recurrent=False,
        has_cache=False,
        tiny={"vocab_size": 99, "hidden_size": 32, "read_hidden_sizes": [24], "num_process_steps": 3},
    ),
    Architecture(
        model_type="rmoe",
        config="undersong.modeling.rmoe.configuration_rmoe:RMoEConfig",
        models={
            "AutoModel": f"{_RMOE}:RMoEModel",
            "AutoModelForCausalLM": f"{_RMOE}:RMoEForCausalLM",
            "AutoModelForSequenceClassification": f"{_RMOE}:RMoEForSequenceClassification",
            "AutoModelForTokenClassification": f"{_RMOE}:RMoEForTokenClassification",
        },
        title="RMoE",
        summary="A mixture of experts whose router carries a state up the layers, through one cell all layers share.",
        paper="Layerwise Recurrent Router for Mixture-of-Experts",
        arxiv="2408.06793",
        citation=_RMOE_CITATION,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        recurrent=False,
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "router_hidden_size": 16,
            "max_position_embeddings": 128,
        },
    ),
    *(
        Architecture(
            model_type=f"rmoe_{family}",
            config=f"undersong.modeling.rmoe_{family}.configuration_rmoe_{family}:RMoE{name}Config",
            models={
                head: f"undersong.modeling.rmoe_{family}.modeling_rmoe_{family}:RMoE{name}{suffix}"
                for head, suffix in (("AutoModel", "Model"), ("AutoModelForCausalLM", "ForCausalLM"))
            },
            title=f"{title} with a recurrent router",
            summary=f"{title} after attach_recurrent_router: experts are chosen with a memory of layers below.",
            paper="Layerwise Recurrent Router for Mixture-of-Experts",
            arxiv="2408.06793",
            citation=_RMOE_CITATION,
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
            recurrent=False,
            tiny={
                "vocab_size": 99,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_experts_per_tok": 2,
                "recurrent_router": {"router_hidden_size": 16, "router_type": "gru", "mode": "residual"},
                "max_position_embeddings": 128,
                **tiny,
            },
        )
        for family, name, title, tiny in (
            ("mixtral", "Mixtral", "Mixtral", {"num_local_experts": 4}),
            ("olmoe", "Olmoe", "OLMoE", {"num_experts": 4, "eos_token_id": 2}),
            ("qwen3_moe", "Qwen3Moe", "Qwen3-MoE", {"num_local_experts": 4, "moe_intermediate_size": 16}),
        )
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


def _register_configs_unless_it_is_early():
    # The model tables bring the configuration tables half-way through their own import. Configurations that derive
    # from transformers' own need them whole; when they are, `_register_configs` runs after them.
    modeling = sys.modules.get("transformers.models.auto.modeling_auto")
    if modeling is None or not modeling.__spec__._initializing:
        _register_configs()


_registering = False  # importing a configuration of ours may import the model tables, whose hook leads here again


def _register_configs():
    """Runs when transformers' Auto tables load: our config classes join them, model classes follow lazily."""
    global _registering
    if _registering:
        return
    _registering = True
    try:
        _register_every_config()
    finally:
        _registering = False


def _register_every_config():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    for row in ARCHITECTURES.values():
        if row.stock_owned:
            continue  # its config is transformers': that module's own hook registers the heads
        ours = row.config_class()
        owner = None
        if row.model_type in CONFIG_MAPPING:  # not .get(): this lazy mapping only answers to []
            owner = CONFIG_MAPPING[row.model_type]
        if owner is None:
            AutoConfig.register(row.model_type, ours)
            _register_models_with_first_config(row)
        elif owner is not ours:
            # never replace a type behind the user's back, whoever was first
            warnings.warn(
                f"model_type {row.model_type!r} already belongs to {owner.__module__}.{owner.__name__}; Auto classes"
                f" keep giving that one. Use undersong.{ours.__name__} and its model classes directly for ours.",
                stacklevel=2,
            )


def _register_models_with_first_config(row):
    # Wrapped from outside, so that nothing of it is in the source that exports carry.
    config_class = row.config_class()
    original = config_class.__post_init__

    @functools.wraps(original)
    def __post_init__(self, *args, **kwargs):
        config_class.__post_init__ = original
        register_models(row)
        return original(self, *args, **kwargs)

    config_class.__post_init__ = __post_init__


def register_models(row):
    """Registers the model classes of a row with their Auto classes (imports torch and the modeling file).

    Of a type that transformers owns, only the heads that transformers lacks.
    """
    for head, auto_class in _auto_classes(row):
        if not is_stock_head(row, head):
            auto_class.register(row.config_class(), row.model_class(head), exist_ok=True)


def is_stock_head(row, head):
    """Whether transformers has a class of its own for this head of the row's type."""
    import transformers

    auto_class = getattr(transformers, head, None)
    # its table of names by model type, which registrations do not change
    return row.stock_owned and auto_class is not None and row.model_type in auto_class._model_mapping._model_mapping


def _auto_classes(row):
    import transformers

    return [(head, getattr(transformers, head)) for head in row.models if hasattr(transformers, head)]


class Override:
    """Undoes `register(override=...)`: call it, or leave the `with` block."""

    def __init__(self, rows):
        self._replaced = []
        for row in rows:
            for head, auto_class in _auto_classes(row):
                if is_stock_head(row, head):
                    table = auto_class._model_mapping._extra_content  # what register() fills, asked first
                    self._replaced.append((table, row.config_class(), table.get(row.config_class())))
                    auto_class.register(row.config_class(), row.model_class(head), exist_ok=True)

    def __call__(self):
        """Gives the heads back to whom they belonged; a second call does nothing."""
        while self._replaced:
            table, config_class, before = self._replaced.pop()
            if before is None:
                table.pop(config_class, None)
            else:
                table[config_class] = before

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self()


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
    "transformers.models.auto.configuration_auto": _register_configs_unless_it_is_early,
    "transformers.models.auto.modeling_auto": _register_configs,
    "peft.utils.constants": _register_peft,
} | {
    row.config.partition(":")[0]: functools.partial(_register_models_with_first_config, row)
    for row in ARCHITECTURES.values()
    if row.stock_owned
}


def register(*, override=()):
    """Makes transformers and PEFT know every row. Idempotent; called by `import undersong`.

    Args:
        override: model types of transformers' own, such as `("mamba", "mamba2")`, whose heads the Auto classes are to
            give as ours from now on. Nothing is overridden by default.

    Returns:
        With `override`, an `Override`: call it, or use it as a context manager, to give the heads back. Else None.

    Raises:
        ValueError: `override` names a type that is not transformers' own or that undersong has no classes for.

    >>> from transformers import AutoModelForCausalLM, MambaConfig
    >>> config = MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1)
    >>> with register(override=("mamba",)):
    ...     type(AutoModelForCausalLM.from_config(config)).__name__
    'FastMambaForCausalLM'
    >>> type(AutoModelForCausalLM.from_config(config)).__name__
    'MambaForCausalLM'
    """
    override = (override,) if isinstance(override, str) else tuple(override)
    stock_owned = [row.model_type for row in ARCHITECTURES.values() if row.stock_owned]
    for model_type in override:
        if model_type not in stock_owned:
            raise ValueError(
                f"override ({model_type!r}) must name types of transformers that undersong has classes for:"
                f" {', '.join(stock_owned)}; other types need no override."
            )
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(_CALLBACKS))
        for name, callback in _CALLBACKS.items():
            if name in sys.modules:
                callback()
    return Override([ARCHITECTURES[model_type] for model_type in override]) if override else None
