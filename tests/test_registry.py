"""`import undersong` makes the ecosystem know our types, costs little, and takes nothing away."""

import statistics
import subprocess
import sys
import time

import pytest

import undersong
from undersong.registry import ARCHITECTURES


def python(code, **kwargs):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


HEAVY = ("torch", "transformers", "kernels", "triton", "peft", "datasets", "evaluate", "numpy")


def test_import_loads_nothing_heavy():
    loaded = python("import undersong, sys; print(*{name.partition('.')[0] for name in sys.modules})").split()
    assert not set(HEAVY) & set(loaded)


def test_import_after_transformers_loads_no_torch_and_no_model():
    loaded = python("import transformers, undersong, sys; print(*sys.modules)").split()
    assert "torch" not in loaded
    assert not [name for name in loaded if name.startswith(("undersong.modeling", "transformers.models."))]


def test_import_costs_at_most_a_tenth_of_a_second_more_than_transformers():
    def seconds(code):
        begin = time.perf_counter()
        python(code)
        return time.perf_counter() - begin

    seconds("import transformers, undersong")  # writes the byte code
    with_ours, without = [], []
    for _ in range(5):  # interleaved, so that a busy machine slows both
        without.append(seconds("import transformers"))
        with_ours.append(seconds("import transformers, undersong"))
    extra = statistics.median(b - a for a, b in zip(without, with_ours, strict=True))
    assert extra <= 0.1, f"import undersong costs {extra:.3f} s more than import transformers"


@pytest.mark.parametrize(
    "first", ["import undersong, transformers", "from transformers import AutoModel; import undersong"]
)
def test_auto_classes_know_every_row_in_either_order(first):
    code = f"""
{first}
import transformers
from undersong.registry import ARCHITECTURES, is_stock_head
for row in ARCHITECTURES.values():
    config = transformers.AutoConfig.for_model(row.model_type, **row.tiny)
    assert type(config) is row.config_class(), type(config)
    for head in row.models:
        auto = getattr(transformers, head, None)
        if auto is not None and not is_stock_head(row, head):
            model = auto.from_config(config)
            assert type(model) is row.model_class(head), type(model)
print("known")
"""
    assert "known" in python(code)


def test_peft_is_told_in_either_order():
    check = "from peft.utils.constants import *; print(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING['aaren'])"
    assert "q_proj" in python(f"import undersong, peft; {check}")
    assert "q_proj" in python(f"import peft, undersong; {check}")


def test_stock_types_stay_stock():
    code = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, CONFIG_MAPPING
before = dict(CONFIG_MAPPING_NAMES)
import undersong
from undersong.registry import ARCHITECTURES
assert before == dict(CONFIG_MAPPING_NAMES)
from transformers import AutoConfig
for model_type in ("mamba", "mamba2", "llama", "bert"):
    assert type(AutoConfig.for_model(model_type)).__module__.startswith("transformers."), model_type
taken = [t for t, row in ARCHITECTURES.items() if t in before and not row.stock_owned]
assert not taken, f"transformers now has {taken} itself: rename ours or hand it over"
print("stock")
"""
    assert "stock" in python(code)


HEADS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification")
WHICH = f"""
import tempfile, transformers
def which(model_type):
    from undersong.registry import ARCHITECTURES
    config = transformers.AutoConfig.for_model(model_type, **ARCHITECTURES[model_type].tiny)
    autos = [getattr(transformers, head) for head in {HEADS}]
    built = [auto.from_config(config) for auto in autos]
    with tempfile.TemporaryDirectory() as folder:
        built[0].save_pretrained(folder)
        loaded = [auto.from_pretrained(folder) for auto in autos]
    assert [type(model) for model in built] == [type(model) for model in loaded]
    return [type(model).__name__ for model in built]
"""
STOCK_OWNED = [row.model_type for row in ARCHITECTURES.values() if row.stock_owned]
NAMES = {"mamba": "Mamba", "mamba2": "Mamba2"}


def expected(model_type, ours):
    name, fast = NAMES[model_type], "Fast" * ours
    heads = [f"{fast}{name}Model", f"{fast}{name}ForCausalLM"]
    return heads + [f"Fast{name}ForSequenceClassification", f"Fast{name}ForTokenClassification"]


@pytest.mark.parametrize("model_type", STOCK_OWNED)
@pytest.mark.parametrize(
    "first", ["import undersong", "from transformers import AutoModel, MambaModel, Mamba2Model; import undersong"]
)
def test_a_type_of_transformers_stays_its_own_until_it_is_overridden(model_type, first):
    code = f"""
{first}
{WHICH}
stock, ours = {expected(model_type, False)}, {expected(model_type, True)}
assert which({model_type!r}) == stock, which({model_type!r})
undo = undersong.register(override=({model_type!r},))
assert which({model_type!r}) == ours, which({model_type!r})
with undersong.register(override=[{model_type!r}]):
    assert which({model_type!r}) == ours
assert which({model_type!r}) == ours, "the inner override gave back more than it took"
undo()
assert which({model_type!r}) == stock
undo()
assert which({model_type!r}) == stock
print("right")
"""
    assert "right" in python(code)


@pytest.mark.parametrize("model_type", STOCK_OWNED)
def test_overriding_may_be_the_very_first_thing(model_type):
    code = f"import undersong; undersong.register(override={model_type!r})\n{WHICH}\nprint(which({model_type!r}))"
    assert str(expected(model_type, True)) in python(code)


def test_overriding_one_type_leaves_the_others():
    code = f"import undersong; undersong.register(override='mamba')\n{WHICH}\nprint(which('mamba2'))"
    assert str(expected("mamba2", False)) in python(code)


def test_a_head_that_transformers_grows_is_left_to_it():
    code = f"""
import undersong
from transformers.models.auto import modeling_auto
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["mamba"] = "MambaModel"  # as if it had that head
{WHICH}
print(which("mamba"))
"""
    assert str([*expected("mamba", False)[:3], "MambaModel"]) in python(code)


def test_what_cannot_be_overridden_is_named():
    for name in ("aaren", "llama"):
        with pytest.raises(
            ValueError, match=rf"override \('{name}'\) must name types of transformers .*: mamba, mamba2"
        ):
            undersong.register(override=("mamba", name))


def test_a_type_that_somebody_else_registered_first_stays_theirs():
    code = """
import warnings
from transformers import AutoConfig, PreTrainedConfig
class Theirs(PreTrainedConfig):
    model_type = "aaren"
AutoConfig.register("aaren", Theirs)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import undersong
assert type(AutoConfig.for_model("aaren")) is Theirs
assert [w for w in caught if "already belongs to __main__.Theirs" in str(w.message)], caught
assert undersong.AarenConfig().hidden_size == 512
print("theirs")
"""
    assert "theirs" in python(code)


def test_registering_twice_changes_nothing():
    finders = list(sys.meta_path)
    undersong.registry.register()
    assert sys.meta_path == finders


def test_the_import_hook_leaves_no_trace_in_the_modules_it_waits_for():
    code = """
import undersong
import inspect
from transformers.models.auto import configuration_auto as module
assert type(module.__loader__).__name__ == "SourceFileLoader", module.__loader__
assert module.__spec__.loader is module.__loader__
assert "CONFIG_MAPPING" in inspect.getsource(module)
print("clean")
"""
    assert "clean" in python(code)


def test_public_names_resolve_and_unknown_ones_say_so():
    for name in undersong.__all__:
        assert getattr(undersong, name) is not None, name
    assert set(undersong.__all__) <= set(dir(undersong))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        undersong.nonsense  # noqa: B018


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=lambda row: row.model_type)
def test_rows_are_complete(row):
    assert row.config_class().model_type == row.model_type
    assert all((row.arxiv, row.citation, row.summary, row.lora_targets, row.tiny))
    with pytest.raises(KeyError, match="has no head 'AutoModelForNothing'"):
        row.model_class("AutoModelForNothing")
