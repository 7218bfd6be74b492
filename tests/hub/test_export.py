"""Export: flat, self-contained, bit-equal, and careful with what is not its own."""

import ast
import json
import subprocess
import sys
import types

import pytest
import torch
from transformers import dynamic_module_utils
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from undersong import registry
from undersong.hub import export
from undersong.hub._flatten import CannotFlatten, flatten

from .fresh_process import load_elsewhere
from .toy import Toy

IDS = torch.arange(12).reshape(2, 6) % 11
MODELING = "modeling/toy/modeling_toy.py"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    toys = []

    def make(**edits):
        toys.append(Toy(tmp_path, monkeypatch, edits))
        return toys[-1]

    yield make
    for each in toys:
        each.remove()


# --- what is collected and how it is rewritten


def test_the_closure_is_found_by_imports_and_renamed_flat(toy):
    package = toy()
    closure = flatten(package.ToyForCausalLM, package.ToyConfig)
    assert sorted(closure.files) == [
        "configuration_toy.py",
        "helpers.py",
        "modeling_toy.py",
        "parts_scale.py",
        "parts_table.py",
    ]
    assert closure.names[f"{package.name}._helpers"] == "helpers"


def test_only_import_statements_change(toy):
    package = toy()
    original = (package.folder / MODELING).read_text().splitlines()
    flat = flatten(package.ToyForCausalLM).files["modeling_toy.py"].splitlines()
    changed = [(old, new) for old, new in zip(original, flat, strict=True) if old != new]
    assert changed == [
        (f"from {package.name} import scaled, SCALE as THE_SCALE  # re-exported: two names, one home",
         "from .parts_scale import scaled, SCALE as THE_SCALE  # re-exported: two names, one home"),
        ("from ...parts.table import (", "from .parts_table import ("),
        (f"from {package.name}._helpers import shift as moved", "from .helpers import shift as moved"),
    ]  # fmt: skip


def test_names_from_several_homes_become_one_line_each(toy):
    package = toy(**{"__init__.py": lambda text: text + "from ._helpers import shift\n"})
    path = package.folder / MODELING
    path.write_text(
        f"def late():\n    from {package.name} import SCALE as a, shift as b; return a, b\n\n\n{path.read_text()}"
    )
    flat = flatten(package.ToyForCausalLM).files["modeling_toy.py"]
    assert "    from .parts_scale import SCALE as a\n    from .helpers import shift as b; return a, b\n" in flat
    ast.parse(flat)


def test_transformers_loader_sees_exactly_the_closure(toy, tmp_path):
    package = toy()
    folder = export(package.model(), tmp_path / "out")
    seen, queue = set(), ["modeling_toy", "configuration_toy"]
    while queue:
        name = queue.pop()
        if name not in seen:
            seen.add(name)
            queue += get_relative_imports(folder / f"{name}.py")
            assert package.name not in get_imports(folder / f"{name}.py")
    assert seen == {path.stem for path in folder.glob("*.py")}


# --- what cannot be flattened

REFUSED = {
    "from . import configuration_toy": "imports from the package itself",
    "import {name}.parts.scale as s": r"`import \w+.parts.scale` cannot be written as a flat sibling",
    "import {name}.parts": "cannot be written as a flat sibling",
    "from ..toy.configuration_toy import *": "star import of",
    "from {name}.parts import scale": r"imports the module \w+.parts.scale; use `from \w+.parts.scale import <name>`",
    "if True: from ...parts.scale import SCALE": "must stand on a line of its own",
    "import importlib; importlib.import_module('{name}.parts.scale')": "imports at run time what export cannot follow",
    "import importlib; importlib.import_module('.scale', '{name}.parts')": "imports at run time",
    "__import__(str('json'))": "`__import__` imports at run time",
    "HERE = __file__": "`__file__` points at files that an exported folder does not hold",
    "import importlib.resources as r; r.files('{name}')": "reads package data",
    "import pytest": "`pytest` is imported outside a try block",
    "from _pytest import config": "`_pytest` is imported outside a try block",
    "'''\nfrom .elsewhere import thing\n'''": "`from .elsewhere import` is not an import statement",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_flattened_is_refused_with_its_line(toy, tmp_path, line):
    package = toy()
    model = package.model()
    path = package.folder / MODELING
    path.write_text(line.replace("{name}", package.name) + "\n" + path.read_text())
    with pytest.raises(CannotFlatten, match=REFUSED[line]) as error:
        export(model, tmp_path / "out")
    assert f"{package.name}.modeling.toy.modeling_toy" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_modules_with_one_flat_name_are_refused(toy):
    package = toy(
        **{
            "parts/_scale.py": lambda _: "A = 1\n",
            MODELING: lambda text: "from ...parts._scale import A\n" + text,
        }
    )
    with pytest.raises(CannotFlatten, match=r"parts\._scale and .*parts\.scale both become parts_scale\.py"):
        flatten(package.ToyForCausalLM)


def test_classes_without_a_source_file_are_refused(toy, tmp_path, monkeypatch):
    package = toy()

    class Local(package.ToyForCausalLM):
        pass

    with pytest.raises(CannotFlatten, match="Local is defined inside a function"):
        flatten(Local)
    Main = type("Main", (package.ToyForCausalLM,), {"__module__": "__main__"})
    with pytest.raises(CannotFlatten, match="class Main is defined in __main__, which has no importable file"):
        export(Main(package.ToyConfig()), tmp_path / "out")
    made = types.ModuleType("made_at_run_time")
    made.Made = type("Made", (package.ToyForCausalLM,), {"__module__": made.__name__})
    monkeypatch.setitem(sys.modules, made.__name__, made)
    with pytest.raises(CannotFlatten, match="module made_at_run_time has no Python source file"):
        flatten(made.Made)
    Hidden = type("Hidden", (package.ToyForCausalLM,), {"__module__": package.ToyForCausalLM.__module__})
    with pytest.raises(CannotFlatten, match="Hidden is not what its module holds under that name"):
        flatten(Hidden)


def test_a_layer_that_the_source_does_not_build_is_refused(toy, tmp_path):
    model = toy().model()
    model.model.mix = type("Patched", (torch.nn.Linear,), {"__module__": "__main__"})(8, 8)
    with pytest.raises(
        ValueError, match=r"layer model\.mix is a __main__\.Patched, which the source of ToyForCausalLM"
    ):
        export(model, tmp_path / "out")


def test_models_that_are_not_ours_to_export_are_refused(toy, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    package = toy()
    adapted = get_peft_model(package.model(), LoraConfig(target_modules=["mix"]))
    with pytest.raises(TypeError, match=r"carries PEFT adapters.*merge_and_unload"):
        export(adapted, tmp_path / "out")
    injected = package.model()
    injected.add_adapter(LoraConfig(target_modules=["mix"]))
    with pytest.raises(TypeError, match="carries PEFT adapters"):
        export(injected, tmp_path / "out")
    export(adapted.merge_and_unload(), tmp_path / "merged")
    with pytest.raises(TypeError, match=r"model \(Linear\) must be a transformers PreTrainedModel"):
        export(torch.nn.Linear(1, 1), tmp_path / "out")
    stock = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM\) is one of transformers' own"):
        export(stock, tmp_path / "out")
    with pytest.raises(ValueError, match=r"tokenizer \(.*Mine\) must be of one of transformers' own"):
        export(package.model(), tmp_path / "out", tokenizer=type("Mine", (), {})())
    assert not (tmp_path / "out").exists()


# --- the folder


def test_auto_map_and_architectures(toy, tmp_path):
    package = toy()
    config = json.loads((export(package.model(), tmp_path / "lm") / "config.json").read_text())
    assert config["architectures"] == ["ToyForCausalLM"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
    }
    config = json.loads((export(package.model("ToyForSeriesTagging"), tmp_path / "tags") / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_toy.ToyForSeriesTagging"
    config = json.loads((export(package.model("ToyModel"), tmp_path / "base") / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_toy.ToyModel"
    assert str(tmp_path) not in (tmp_path / "lm" / "config.json").read_text()


def test_nothing_outside_the_folder_changes(toy, tmp_path):
    package = toy()
    model = package.model()
    before = dict(vars(model.config))
    modules = set(sys.modules)
    export(model, tmp_path / "out")
    assert vars(model.config) == before
    assert package.ToyForCausalLM._auto_class is None
    assert package.ToyConfig._auto_class is None
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert not [name for name in set(sys.modules) - modules if name.startswith(package.name)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", "plain", package.name])


def test_a_class_registered_for_auto_still_exports_flat(toy, tmp_path):
    package = toy()
    model = package.model()
    package.ToyForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    before = dict(vars(model.config))
    folder = export(model, tmp_path / "out")
    assert (folder / "modeling_toy.py").read_text() == flatten(package.ToyForCausalLM).files["modeling_toy.py"]
    assert vars(model.config) == before
    assert package.ToyForCausalLM._auto_class == "AutoModelForCausalLM"
    export(package.model("ToyForSeriesTagging"), tmp_path / "heir")
    assert "_auto_class" not in vars(package.ToyForSeriesTagging)


def test_overwrite_replaces_its_own_files_and_nothing_else(toy, tmp_path):
    package = toy()
    folder = tmp_path / "out"
    export(package.model(), folder)
    with pytest.raises(FileExistsError, match=r"is not empty; pass overwrite=True"):
        export(package.model(), folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs" / "deep").mkdir(parents=True)
    (folder / "runs" / "deep" / "log").write_text("mine too")
    (folder / "helpers_link").symlink_to("helpers.py")
    (folder / "runs" / "back").symlink_to("deep", target_is_directory=True)
    path = package.folder / MODELING
    path.write_text(
        path.read_text().replace("from ...parts.table import (", "OFFSETS = (").replace("OFFSETS,", "1.0,")
    )
    export(package.model(), folder, overwrite=True)
    assert not (folder / "parts_table.py").exists()  # written by the first export, no longer needed
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "runs" / "back" / "log").read_text() == "mine too"
    assert (folder / "helpers_link").is_symlink()
    assert (folder / "runs" / "back").is_symlink()
    (folder / "helpers.py").write_text("edited by hand")
    (folder / "parts_scale.py").write_text("edited by hand")
    (package.folder / "parts" / "scale.py").write_text("SCALE = 1.0\n\n\ndef scaled(x):\n    return x\n")
    path.write_text(path.read_text().replace(f"from {package.name}._helpers import shift as moved", "moved = scaled"))
    export(package.model(), folder, overwrite=True)
    assert (folder / "helpers.py").read_text() == "edited by hand"  # no longer needed, but no longer what we wrote
    assert "return x" in (folder / "parts_scale.py").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", package.name])


def test_overwrite_never_mixes_two_sets_of_weights(toy, tmp_path):
    package = toy()
    folder = tmp_path / "out"
    package.model().save_pretrained(folder, max_shard_size="0.3KB")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds weights that this export does not replace \(model[-.]"):
        export(package.model(), folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failed_export_leaves_the_old_folder(toy, tmp_path, monkeypatch):
    package = toy()
    folder = export(package.model(), tmp_path / "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = package.model()
    monkeypatch.setattr(model, "save_pretrained", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export(model, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", package.name])
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"file\) is a file; name a folder"):
        export(package.model(), tmp_path / "file")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="holds the working directory"):
        export(package.model(), folder, overwrite=True)


def test_the_card_can_be_given(toy, tmp_path):
    package = toy()
    text = "---\nlicense: mit\n---\n# Mine\n"
    (tmp_path / "card.md").write_text(text)
    assert (export(package.model(), tmp_path / "a", card=text) / "README.md").read_text() == text
    assert (export(package.model(), tmp_path / "b", card=tmp_path / "card.md") / "README.md").read_text() == text
    assert "# ToyForCausalLM" in (export(package.model(), tmp_path / "c") / "README.md").read_text()


# --- elsewhere


def test_reload_without_the_package_is_bit_equal(toy, tmp_path):
    package = toy()
    models = {
        "lm": (package.model(), "AutoModelForCausalLM"),
        "tags": (package.model("ToyForSeriesTagging", tie_word_embeddings=False), "AutoModel"),
        "half": (package.model().to(torch.bfloat16), "AutoModelForCausalLM"),
    }
    jobs = {
        name: {"model": export(model, tmp_path / name), "auto_class": auto_class, "inputs": {"input_ids": IDS}}
        for name, (model, auto_class) in models.items()
    }
    absent = ("undersong", package.name)
    outputs, facts = load_elsewhere(jobs, tmp_path / "elsewhere", absent=absent)
    for name, (model, _) in models.items():
        with torch.no_grad():
            assert torch.equal(outputs[f"{name}.logits"], model(IDS).logits), name
        assert facts[name]["class"] == type(model).__name__
        assert facts[name]["module"].startswith("transformers_modules.")
        assert facts[name]["dtype"] == str(model.dtype)


@pytest.fixture
def own_remote_code(tmp_path, monkeypatch):
    """Remote code goes into a folder of its own, and what was loaded before is back afterwards."""

    def take():
        names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
        return {name: sys.modules.pop(name) for name in names}

    before = take()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != dynamic_module_utils.HF_MODULES_CACHE])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    take()
    sys.modules.update(before)


@pytest.mark.usefixtures("own_remote_code")
def test_what_was_loaded_as_remote_code_exports_again(toy, tmp_path):
    from transformers import AutoModelForCausalLM

    package = toy()
    first = export(package.model(), tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True)
    again = export(loaded, tmp_path / "second")
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in again.iterdir()} == names
    for name in names - {"README.md", "undersong_export.json"}:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name


AAREN = registry.ARCHITECTURES["aaren"]
AAREN_CLOSURE = {
    "aaren_layers.py",
    "cache.py",
    "compat.py",
    "configuration_aaren.py",
    "modeling_aaren.py",
    "ops_cumulative_softmax_average.py",
    "ops_dispatch.py",
    "ops_validate.py",
    "sequences.py",
}


def aaren(head, dtype=torch.float32):
    torch.manual_seed(0)
    return AAREN.model_class(head)(AAREN.config_class()(**AAREN.tiny, num_labels=5)).to(dtype).eval()


def aaren_inputs(head):
    torch.manual_seed(1)
    if head == "TimeSeriesClassification":
        return {"past_values": torch.randn(2, 9, AAREN.tiny["input_size"])}
    return {"input_ids": torch.randint(3, 99, (2, 9))}


def test_aaren_exports_its_closure_and_lists_its_heads(tmp_path):
    folder = export(aaren("AutoModelForCausalLM"), tmp_path / "lm")
    assert {path.name for path in folder.glob("*.py")} == AAREN_CLOSURE
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_aaren.AarenConfig",
        "AutoModel": "modeling_aaren.AarenModel",
        "AutoModelForCausalLM": "modeling_aaren.AarenForCausalLM",
        "AutoModelForSequenceClassification": "modeling_aaren.AarenForSequenceClassification",
    }
    folder = export(aaren("TimeSeriesClassification"), tmp_path / "series")
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_aaren.AarenConfig",
        "AutoModel": "modeling_aaren.AarenForTimeSeriesClassification",
    }


def test_aaren_is_bit_equal_without_undersong(tmp_path):
    jobs, want = {}, {}
    for name, head, dtype in [
        ("lm", "AutoModelForCausalLM", torch.float32),
        ("half", "AutoModelForCausalLM", torch.bfloat16),
        ("series", "TimeSeriesClassification", torch.float32),
    ]:
        model, inputs = aaren(head, dtype), aaren_inputs(head)
        auto_class = head if head.startswith("Auto") else "AutoModel"
        jobs[name] = {"model": export(model, tmp_path / name), "auto_class": auto_class, "inputs": inputs}
        with torch.no_grad():
            want[name] = model(**inputs).logits
    # `kernels` is optional too: the layers then keep their torch forward
    outputs, facts = load_elsewhere(jobs, tmp_path / "elsewhere", absent=("undersong", "kernels"))
    for name in jobs:
        assert torch.equal(outputs[f"{name}.logits"], want[name]), name
        assert facts[name]["module"].startswith("transformers_modules.")
        assert facts[name]["dtype"] == str(want[name].dtype)


def test_with_undersong_the_same_folder_needs_no_remote_code(tmp_path):
    from transformers import AutoModelForCausalLM

    model, inputs = aaren("AutoModelForCausalLM"), aaren_inputs("AutoModelForCausalLM")
    folder = export(model, tmp_path / "lm")
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_published_aaren_loads_from_the_hub_at_a_revision(tmp_path, hub):
    from undersong.hub import publish

    inputs = aaren_inputs("AutoModelForCausalLM")
    place = {"endpoint": hub.endpoint, "token": hub.token}
    first, second = aaren("AutoModelForCausalLM"), aaren("AutoModelForCausalLM")
    with torch.no_grad():
        second.model.embed_tokens.weight.mul_(1.5)
    commit = publish(first, "me/aaren", **place).commit
    publish(second, "me/aaren", update=True, **place)
    jobs = {
        "old": {"model": "me/aaren", "auto_class": "AutoModelForCausalLM", "inputs": inputs, "revision": commit},
        "new": {"model": "me/aaren", "auto_class": "AutoModelForCausalLM", "inputs": inputs},
    }
    outputs, facts = load_elsewhere(jobs, tmp_path / "elsewhere", env=hub.env())
    with torch.no_grad():
        assert torch.equal(outputs["old.logits"], first(**inputs).logits)
        assert torch.equal(outputs["new.logits"], second(**inputs).logits)
    assert not torch.equal(outputs["old.logits"], outputs["new.logits"])
    assert commit in facts["old"]["module"]


def test_importing_the_room_is_light():
    code = (
        "import sys, undersong.hub, undersong.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_the_functions_are_not_hidden_by_their_modules():
    import importlib

    import undersong

    for name in ("export", "publish", "build_kernel"):
        importlib.import_module(f"undersong.hub.{name}")
        assert isinstance(getattr(undersong.hub, name), types.FunctionType)
    assert undersong.export is export
