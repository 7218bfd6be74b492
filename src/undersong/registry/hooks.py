"""How transformers and PEFT come to know the rows of the registry.

Nothing here imports torch, transformers or peft. `register()` puts a hook behind the modules that own the tables
(`transformers.models.auto.configuration_auto`, `peft.utils.constants`) and fills them when they are loaded, or at
once when they are loaded already. Model classes follow when the first config of their type is built.
"""

import functools
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder

from .rows import ARCHITECTURES


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
    for head, cls in _auto_classes(row):
        if not is_stock_head(row, head):
            cls.register(row.config_class(), row.model_class(head), exist_ok=True)


def is_stock_head(row, head):
    """Whether transformers has a class of its own for this head of the row's type."""
    cls = auto_class(head)
    # its table of names by model type, which registrations do not change
    return row.stock_owned and cls is not None and row.model_type in cls._model_mapping._model_mapping


def auto_class(head):
    """The Auto class of a name: transformers' own, ours where transformers has none, or None."""
    import transformers

    if head == "AutoModelForSequentialRecommendation" and not hasattr(transformers, head):
        from ..modeling.auto_recommendation import AutoModelForSequentialRecommendation

        return AutoModelForSequentialRecommendation
    return getattr(transformers, head, None)


def _auto_classes(row):
    found = ((head, auto_class(head)) for head in row.models)
    return [(head, cls) for head, cls in found if cls is not None]


class Override:
    """Undoes `register(override=...)`: call it, or leave the `with` block."""

    def __init__(self, rows):
        self._replaced = []
        for row in rows:
            for head, cls in _auto_classes(row):
                if is_stock_head(row, head):
                    table = cls._model_mapping._extra_content  # what register() fills, asked first
                    self._replaced.append((table, row.config_class(), table.get(row.config_class())))
                    cls.register(row.config_class(), row.model_class(head), exist_ok=True)

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
