"""What every registered head promises as a transformers model: Auto classes, saving, loss, PEFT, checkpointing."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers

from undersong.registry.hooks import auto_class

from .cases import HEADS, OUTPUTS, ROWS, build, close, make_inputs, name, output_of, stock_class

every_head = pytest.mark.parametrize(("row", "head"), HEADS, ids=name)


def labels_for(model, inputs, mask):
    """Labels that the head's loss takes."""
    if "ConditionalGeneration" in type(model).__name__:
        return {"labels": pointers(mask, inputs["decoder_input_ids"].shape[1])}
    if any(word in type(model).__name__ for word in ("CausalLM", "MaskedLM", "PreTraining")):
        return {"labels": inputs["input_ids"]}
    if "SequentialRecommendation" in type(model).__name__:
        labels = inputs["input_ids"] % model.config.num_items + 1
        return {"labels": labels[:, 0] if hasattr(model, "set_items") else labels}  # of texts, one for a history
    if "ForPrediction" in type(model).__name__:
        shape = (len(mask), model.config.prediction_length, model.config.input_size)
        return {"labels": torch.linspace(-1, 1, shape[0] * shape[1] * shape[2]).view(shape).to(model.dtype)}
    if "EventForecasting" in type(model).__name__:
        return {}  # what comes next in a stream is its own label
    if "TokenClassification" in type(model).__name__:
        return {"labels": inputs["input_ids"] % model.config.num_labels}
    return {"labels": torch.arange(len(mask)) % model.config.num_labels}


def pointers(mask, steps):
    """The valid columns of every row in turn, the end (0), then -100."""
    labels = torch.full((len(mask), steps), -100)
    for row, valid in zip(labels, mask, strict=True):
        ids = [*(valid.nonzero().flatten() + 1)[: steps - 1].tolist(), 0]
        row[: len(ids)] = torch.tensor(ids)
    return labels


HEADS_WITH_LOSS = [(row, head) for row, head in HEADS if head not in ("AutoModel", "AutoBackbone")]


@every_head
def test_auto_class_gives_ours_and_round_trips(row, head, tmp_path):
    model = build(row, head)
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(config) is row.config_class()
    auto = auto_class(head) or type(model)
    if head == "AutoBackbone":
        auto = super(auto.__base__, auto)  # it asks the Hub for any name it is given; the other Auto classes' way
    if (stock := stock_class(row, head)) is not None:
        check_folders_go_both_ways(model, auto, stock, tmp_path)
        auto = type(model)
    assert type(auto.from_config(config) if auto is not type(model) else auto(config)) is type(model)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = make_inputs(model, 2, 7)
    # Not to the last bit: weights mapped from a file start at other addresses, and by those a matrix product rounds.
    with torch.no_grad():
        close(output_of(loaded.eval(), **inputs), output_of(model, **inputs), atol=1e-5)


def check_folders_go_both_ways(model, auto, stock, folder):
    """A head that transformers owns: Auto gives its class, which loads our folder as we load what it saves."""
    assert json.loads((folder / "config.json").read_text())["architectures"] == [stock.__name__]
    assert type(auto.from_config(model.config)) is stock
    theirs, info = auto.from_pretrained(folder, output_loading_info=True)
    assert type(theirs) is stock
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.save_pretrained(folder / "theirs")
    ours = type(model).from_pretrained(folder / "theirs")
    want = model.state_dict()
    for loaded in (theirs, ours):
        assert loaded.state_dict().keys() == want.keys()
        assert all(torch.equal(value, want[key]) for key, value in loaded.state_dict().items())


@every_head
def test_saved_file_holds_every_tensor_once(row, head, tmp_path):
    from safetensors import safe_open

    model = build(row, head, **({"tie_word_embeddings": True} if head == "AutoModelForCausalLM" else {}))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).nelement() for key in file.keys())  # noqa: SIM118 (safe_open is no dict)
    saved_buffers = sum(buffer.nelement() for key, buffer in model.named_buffers() if key in model.state_dict())
    assert stored == sum(parameter.nelement() for parameter in model.parameters()) + saved_buffers
    loaded = type(model).from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    if head == "AutoModelForCausalLM":
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize(("row", "head"), HEADS_WITH_LOSS, ids=name)
def test_loss_trains_and_masked_rows_stay_finite(row, head):
    model = build(row, head).train()
    inputs = make_inputs(model, 2, 6)
    mask = torch.tensor([[1] * 6, [0] * 6])
    loss = model(**inputs, attention_mask=mask, **labels_for(model, inputs, mask)).loss
    loss.backward()
    assert torch.isfinite(loss)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def checkpoints(case):
    return case[0].model_class(case[1]).supports_gradient_checkpointing


@pytest.mark.parametrize(("row", "head"), [case for case in HEADS if not checkpoints(case)], ids=name)
def test_gradient_checkpointing_is_refused_where_there_are_no_layers_to_run_again(row, head):
    model = build(row, head)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} does not support (gradient|activation) checkpointing"
    ):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize(("row", "head"), [case for case in HEADS_WITH_LOSS if checkpoints(case)], ids=name)
def test_gradient_checkpointing_changes_nothing(row, head):
    inputs = make_inputs(build(row, head), 2, 9)
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    gradients = []
    for checkpointing in (False, True):
        model = build(row, head, dtype=torch.float64).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        double = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        model(**double, attention_mask=mask, use_cache=False, **labels_for(model, double, mask)).loss.backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, gradient in gradients[0].items():
        close(gradients[1][key], gradient, atol=1e-12)


@every_head
def test_default_lora_targets_all_matter(row, head):
    """Every default target is used by the forward: its adapter changes the output, trains, and merges exactly."""
    from peft import LoraConfig, get_peft_model

    inputs = make_inputs(build(row, head), 2, 6)
    with torch.no_grad():
        plain = output_of(build(row, head, dtype=torch.float64), **_double(inputs))
    for target in row.lora_targets:
        model = build(row, head, dtype=torch.float64)
        adapted = get_peft_model(model, LoraConfig(target_modules=[target], init_lora_weights=False, r=2)).double()
        output = output_of(adapted, **_double(inputs))
        assert (output - plain).abs().max() > 1e-4, f"an adapter on {target} changes nothing"
        output.pow(2).sum().backward()
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{key} gets no gradient"
                assert parameter.grad.abs().sum() > 0, f"{key} gets a zero gradient"
        with torch.no_grad():
            close(output_of(adapted.merge_and_unload(), **_double(inputs)), output.detach(), atol=1e-9)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_peft_knows_the_default_targets(row):
    from peft import IA3Config, LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    for config in (LoraConfig(), IA3Config()):
        adapted = get_peft_model(build(row), config)
        found = {
            key.rpartition(".")[2] for key, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)
        }
        assert found == {target.rpartition(".")[2] for target in row.lora_targets}


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_weights_that_are_missing_are_initialised_and_the_rest_kept(row, tmp_path):
    """A base checkpoint under a new head: loaded weights survive, the head starts fresh."""
    base = build(row)
    base.save_pretrained(tmp_path)
    for head in row.models:
        if head == "AutoModel":
            continue
        loaded = row.model_class(head).from_pretrained(tmp_path)
        if loaded.main_input_name != base.main_input_name:
            continue  # a backbone without the base's input embeddings
        inner = getattr(loaded, loaded.base_model_prefix)
        for key, value in base.state_dict().items():
            assert torch.equal(inner.state_dict()[key], value), key


@every_head
def test_initialisation_is_finite_and_from_the_config(row, head):
    """No weight is left as uninitialised memory or starts at an unreasonable size."""
    model = build(row, head, initializer_range=0.02)
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), key
        if "mixer" not in key:  # the parameters of a state space have scales of their own
            assert parameter.abs().max() < 1.5, f"{key} starts at {parameter.abs().max():.3g}"


@pytest.mark.parametrize(("row", "head"), [case for case in HEADS if stock_class(*case) is not None], ids=name)
def test_a_head_that_transformers_owns_starts_with_its_weights(row, head):
    model = build(row, head)
    torch.manual_seed(0)
    want = stock_class(row, head)(model.config).state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_exported_model_runs_without_undersong(row, tmp_path):
    """Design way 4: a self-contained folder, bit-equal in a process that cannot import undersong."""
    from undersong.hub import export

    for head in row.models:
        model, folder = build(row, head), tmp_path / head
        export(model, folder)
        with_ours = type(model).from_pretrained(folder).eval()  # the same file, read by the installed package
        inputs = make_inputs(model, 2, 7)
        with torch.no_grad():
            torch.save({"inputs": inputs, "want": output_of(with_ours, **inputs)}, tmp_path / "case.pt")
        auto = f"transformers.{head if hasattr(transformers, head) else 'AutoModel'}"
        auto = f"super({auto}.__base__, {auto})" if head == "AutoBackbone" else auto  # see the test of Auto classes
        stock = stock_class(row, head)
        code = f"""
            import sys
            class Blocked:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] == "undersong":
                        raise ModuleNotFoundError("undersong is not here")
            sys.meta_path.insert(0, Blocked())
            import torch, transformers
            torch.set_num_threads({torch.get_num_threads()})  # sums are cut by it
            case = torch.load({str(tmp_path / "case.pt")!r}, weights_only=True)
            model = {auto}.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()
            assert type(model).__name__ == {type(model).__name__!r}, type(model)
            with torch.no_grad():
                outputs = model(**case["inputs"])
            got = next(outputs[name] for name in {OUTPUTS} if name in outputs)
            got = got[-1] if isinstance(got, tuple) else got
            assert torch.equal(got, case["want"]), (got - case["want"]).abs().max()
            if {stock is not None}:  # a head of transformers' own: without remote code, it loads the same folder
                model = {auto}.from_pretrained({str(folder)!r}).eval()
                assert type(model).__name__ == {stock.__name__ if stock else None!r}, type(model)
                with torch.no_grad():
                    got = model(**case["inputs"])[0]
                assert (got - case["want"]).abs().max() < 1e-4
            assert "undersong" not in sys.modules
            print("bit-equal")
        """
        environment = {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
        }
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "bit-equal" in done.stdout


def _double(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
