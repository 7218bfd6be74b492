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
from undersong.registry import ARCHITECTURES
for row in ARCHITECTURES.values():
    config = transformers.AutoConfig.for_model(row.model_type, **row.tiny)
    assert type(config).__module__.startswith("undersong."), type(config)
    for head in row.models:
        auto = getattr(transformers, head, None)
        if auto is not None:
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
