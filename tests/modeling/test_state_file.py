"""State files: what a cache held comes back bit for bit, continues as the live cache does, in its own model only."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache
from transformers.cache_utils import Cache

from tests.common.cases import CAUSAL_LM, RECURRENT, build, make_inputs, name
from undersong.modeling import state_file
from undersong.modeling.cache import RecurrentStateLayer
from undersong.modeling.state_file import load_state, save_state, state_metadata

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [row for row in CAUSAL_LM if row in RECURRENT]
every_row = pytest.mark.parametrize("row", ROWS, ids=name)
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def filled(row, **changes):
    model = build(row, "AutoModelForCausalLM", **changes)
    ids = make_inputs(model, 2, 5)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=MASK, use_cache=True).past_key_values
    return model, ids, cache


def toy(dtype=torch.float32):
    """A cache of two layers without a model: odd shapes, states that are views, a layer that holds nothing."""
    layers = [RecurrentStateLayer(), RecurrentStateLayer(), RecurrentStateLayer()]
    layers[0].write(h=torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2))
    layers[1].write(a=torch.randn(6, 5)[::2], b=torch.full((3, 1), float("nan")))
    for layer in layers[:2]:
        layer.advance(7, torch.tensor([7, 0, 3]))
    return Cache(layers=layers)


def some_config(**changes):
    return ROWS[0].config_class()(**{**ROWS[0].tiny, **changes})


@every_row
def test_a_loaded_state_is_the_saved_one_bit_for_bit(row, tmp_path):
    model, _, cache = filled(row)
    loaded = load_state(save_state(cache, tmp_path / "state", model=model), model=model)
    assert len(loaded.layers) == len(cache.layers) > 0
    for got, want in zip(loaded.layers, cache.layers, strict=True):
        assert set(got.states) == set(want.states) != set()
        for key, state in want.states.items():
            assert got.states[key].dtype == state.dtype
            assert torch.equal(got.states[key], state)
        assert got.seen_tokens == want.seen_tokens == 5
        assert got.valid_tokens.tolist() == [3, 5]


@every_row
def test_continuing_a_loaded_state_equals_continuing_the_live_cache(row, tmp_path):
    model, ids, cache = filled(row)
    save_state(cache, tmp_path / "state", model=model)
    loaded = load_state(tmp_path / "state", model=model)
    more = make_inputs(model, 2, 3, seed=1)["input_ids"]
    mask = torch.cat([MASK, torch.ones_like(more)], 1)
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    # only the new tokens, since what came before is in the state
    got = model.generate(more, past_key_values=loaded, **options)
    want = model.generate(torch.cat([ids, more], 1), past_key_values=cache, **options)
    never_cached = model.generate(torch.cat([ids, more], 1), use_cache=False, **options)
    assert got[:, 3:].tolist() == want[:, 8:].tolist() == never_cached[:, 8:].tolist()


def test_another_process_continues(tmp_path):
    model, ids, cache = filled(ROWS[-1], dtype=torch.float64)
    model.save_pretrained(tmp_path / "model")
    save_state(cache, tmp_path / "state", model=model)
    more = make_inputs(model, 2, 2, seed=1)["input_ids"]
    with torch.no_grad():
        want = model(input_ids=more, past_key_values=cache).logits
    cls = type(model)
    code = f"""
import torch
from {cls.__module__} import {cls.__name__}
from undersong.modeling.state_file import load_state
torch.set_num_threads(1)
model = {cls.__name__}.from_pretrained("model").eval()
more = torch.tensor({more.tolist()})
logits = model(input_ids=more, past_key_values=load_state("state", model=model)).logits
torch.save(logits.detach(), "logits.pt")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_layout_survives(dtype, tmp_path):
    cache = toy(dtype)
    loaded = load_state(save_state(cache, tmp_path / "state", model=some_config()))
    assert loaded.layers[0].states["h"].dtype == dtype
    assert torch.equal(loaded.layers[0].states["h"], cache.layers[0].states["h"])
    assert torch.equal(loaded.layers[1].states["a"], cache.layers[1].states["a"])
    assert loaded.layers[1].states["b"].isnan().all()
    empty = loaded.layers[2]
    assert (empty.states, empty.seen_tokens, empty.valid_tokens) == ({}, 0, None)


def test_states_of_an_autograd_graph_are_saved_without_it(tmp_path):
    cache = toy()
    cache.layers[0].write(h=torch.ones(1, 2, requires_grad=True) * 2)
    loaded = load_state(save_state(cache, tmp_path / "state", model=some_config()))
    assert not loaded.layers[0].states["h"].requires_grad
    assert cache.layers[0].states["h"].requires_grad


def test_metadata_comes_back_as_it_was(tmp_path):
    kept = {"last_token": [3, 4], "title": "chapter – one", "nested": {"a": None, "b": 0.5}}
    path = save_state(toy(), tmp_path / "state", model=some_config(), **kept)
    assert state_metadata(path) == kept
    assert state_metadata(save_state(toy(), tmp_path / "none", model=some_config())) == {}


def test_nothing_is_replaced_unless_asked_for(tmp_path):
    path = save_state(toy(), tmp_path / "state", model=some_config(), step=1)
    with pytest.raises(FileExistsError, match=r"path \(.*state\) exists; pass overwrite=True"):
        save_state(toy(), path, model=some_config(), step=2)
    assert state_metadata(path) == {"step": 1}
    save_state(toy(), path, model=some_config(), overwrite=True, step=2)
    assert state_metadata(path) == {"step": 2}


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = save_state(toy(), tmp_path / "state", model=some_config(), step=1)
    before = path.read_bytes()

    def half(tensors, part, metadata):
        with open(part, "wb") as file:
            file.write(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr(state_file, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_state(toy(), path, model=some_config(), overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]


def test_another_model_is_refused_with_what_differs(tmp_path):
    path = save_state(toy(), tmp_path / "state", model=some_config())
    with pytest.raises(ValueError, match=r"state of another model: num_hidden_layers 2 \(model: 3\); load it with"):
        load_state(path, model=some_config(num_hidden_layers=3))
    from transformers import LlamaConfig

    with pytest.raises(ValueError, match=r"state of another model: model_type '\w+' \(model: 'llama'\)"):
        load_state(path, model=LlamaConfig())


def test_what_does_not_change_the_function_is_no_reason_to_refuse(tmp_path):
    path = save_state(toy(), tmp_path / "state", model=some_config())
    other = some_config(use_cache=False, initializer_range=0.5, pad_token_id=3, dtype=torch.bfloat16)
    assert load_state(path, model=other).get_seq_length() == 7


def test_caches_without_a_recurrent_state_are_refused(tmp_path):
    path = tmp_path / "state"
    with pytest.raises(ValueError, match="cache holds no state yet; run the model with use_cache=True"):
        save_state(Cache(layers=[RecurrentStateLayer()]), path, model=some_config())
    attention = DynamicCache()
    attention.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="cache holds a DynamicLayer at layer 0, but only RecurrentStateLayer"):
        save_state(attention, path, model=some_config())
    with pytest.raises(ValueError, match=r"cache \(dict\) must be a transformers Cache"):
        save_state({}, path, model=some_config())
    assert not path.exists()


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\) does not exist"):
        load_state(tmp_path / "nothing")
    save_file({"h": torch.ones(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="a safetensors file without a recurrent state of format 1"):
        load_state(tmp_path / "weights")
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"text\) is not a safetensors file"):
        state_metadata(tmp_path / "text")
