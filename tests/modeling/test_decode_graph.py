"""decode_graph gives what the model gives without it.

On the CPU the recording is replaced by running the step again on the same buffers, which is all that a replay does;
the real thing is in test_decode_graph_gpu.py.
"""

import copy

import pytest
import torch
from transformers import Mamba2Config, MambaConfig
from transformers.cache_utils import Cache

import undersong
from undersong.modeling import decode_graph as module
from undersong.modeling.decode_graph import decode_graph
from undersong.modeling.mamba.modeling_mamba import FastMambaForCausalLM
from undersong.modeling.mamba2.modeling_mamba2 import FastMamba2ForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread", "rerun_instead_of_recording")
SIZES = {"vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "eos_token_id": None, "pad_token_id": 0}
IDS = torch.tensor([[5, 3, 8, 2], [7, 7, 1, 4]])


@pytest.fixture
def rerun_instead_of_recording(monkeypatch):
    def capture(run, device):
        outputs = run()

        def replay():
            for name, value in run().items():
                if isinstance(value, torch.Tensor):
                    outputs[name].copy_(value)

        return replay, outputs

    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(module, "_require_device", lambda model: None)


def build(kind):
    torch.manual_seed(0)
    if kind == "aaren":
        model = undersong.AarenForCausalLM(undersong.AarenConfig(**SIZES, num_attention_heads=2))
    elif kind == "mamba":
        model = FastMambaForCausalLM(MambaConfig(**SIZES))
    else:
        model = FastMamba2ForCausalLM(Mamba2Config(**SIZES, num_heads=4, head_dim=8, n_groups=2, state_size=8))
    return model.eval()


@pytest.fixture(params=["aaren", "mamba", "mamba2"])
def model(request):
    return build(request.param)


@pytest.fixture
def mamba():
    return build("mamba")


def prefilled(model, ids=IDS):
    with torch.no_grad():
        outputs = model(ids, use_cache=True)
    return cache_of(outputs)


def cache_of(outputs):
    return next(value for value in outputs.values() if isinstance(value, Cache))


@torch.no_grad()
def step(model, cache, tokens, **kwargs):
    return model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True, **kwargs).logits[:, -1]


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True}]
)
def test_generate_gives_the_same_tokens(model, options):
    options = {"max_new_tokens": 6, "do_sample": False} | options
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    torch.manual_seed(1)
    want = model.generate(IDS, attention_mask=mask, **options)
    torch.manual_seed(1)
    with decode_graph(model) as graphs:
        got = model.generate(IDS, attention_mask=mask, **options)
    assert torch.equal(got, want)
    assert (graphs.captured, graphs.replayed, graphs.eager) == (1, 5, 1)


def test_records_once_a_batch_size(mamba):
    with decode_graph(mamba) as graphs:
        for rows in (2, 1, 2, 1):
            mamba.generate(IDS[:rows], max_new_tokens=4, do_sample=False)
    assert (graphs.captured, graphs.replayed, graphs.eager) == (2, 12, 4)


def test_later_steps_copy_no_states(model):
    cache, tokens = prefilled(model), torch.tensor([1, 2])
    with decode_graph(model):
        step(model, cache, tokens)
        held = [dict(layer.states) for layer in cache.layers]
        step(model, cache, tokens)
        for layer, states in zip(cache.layers, held, strict=True):
            assert all(layer.states[name] is states[name] for name in states)
    assert cache.get_seq_length() == 6
    assert cache.layers[-1].valid_tokens.tolist() == [6, 6]


def test_two_conversations_take_turns(model):
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    want = []
    caches = prefilled(model), prefilled(model, IDS.flip(1))
    for turn in tokens:
        want += [step(model, cache, turn) for cache in caches]
    caches = prefilled(model), prefilled(model, IDS.flip(1))
    got = []
    with decode_graph(model) as graphs:
        for turn in tokens[:3]:
            got += [step(model, cache, turn) for cache in caches]
    got += [step(model, cache, tokens[3]) for cache in caches]  # and go on without graphs
    assert graphs.captured == 1
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_a_copied_cache_keeps_its_moment(mamba):
    cache, tokens = prefilled(mamba), torch.tensor([1, 2])
    with decode_graph(mamba):
        step(mamba, cache, tokens)
        kept = copy.deepcopy(cache)
        want = step(mamba, cache, tokens)
        step(mamba, cache, tokens)
        torch.testing.assert_close(step(mamba, kept, tokens), want)


def test_padding_in_a_step(model):
    tokens = torch.tensor([1, 2])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    caches = prefilled(model), prefilled(model)
    want = step(model, caches[0], tokens, attention_mask=mask)
    with decode_graph(model) as graphs:
        got = step(model, caches[1], tokens, attention_mask=mask)
    assert graphs.replayed == 1
    torch.testing.assert_close(got, want)
    for layers in zip(caches[0].layers, caches[1].layers, strict=True):
        for name, state in layers[0].states.items():
            torch.testing.assert_close(layers[1].states[name], state)
    assert caches[1].layers[0].valid_tokens.tolist() == [4, 5]


def test_results_are_not_overwritten_by_the_next_step(mamba):
    cache = prefilled(mamba)
    with decode_graph(mamba):
        first = step(mamba, cache, torch.tensor([1, 2]))
        kept = first.clone()
        step(mamba, cache, torch.tensor([3, 4]))
    assert torch.equal(first, kept)


def test_states_carried_through_inference_mode(mamba):
    with torch.inference_mode():
        want = mamba.generate(IDS, max_new_tokens=5, do_sample=False)
        with decode_graph(mamba) as graphs:
            got = mamba.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(got, want)
    assert graphs.replayed == 4


@pytest.mark.parametrize(
    "case", ["gradients", "training", "labels", "hidden states", "two tokens", "no cache", "autocast", "tuple"]
)
def test_what_does_not_fit_runs_as_always(mamba, case):
    cache = None if case == "no cache" else prefilled(mamba)
    ids = torch.tensor([[1, 2], [3, 4]]) if case == "two tokens" else torch.tensor([[1], [2]])
    kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    kwargs |= {"labels": ids} if case == "labels" else {}
    kwargs |= {"output_hidden_states": True} if case == "hidden states" else {}
    kwargs |= {"return_dict": False} if case == "tuple" else {}
    mamba.train(case == "training")
    with (
        torch.set_grad_enabled(case == "gradients"),
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        decode_graph(mamba) as graphs,
    ):
        outputs = mamba(**kwargs)
    assert (graphs.captured, graphs.eager) == (0, 1)
    if case == "gradients":
        assert outputs.logits.requires_grad
    if case == "hidden states":
        assert len(outputs.hidden_states) == 3


def test_forward_comes_back_whatever_happens(mamba):
    def stop():
        assert "forward" in vars(mamba)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), decode_graph(mamba):
        stop()
    assert "forward" not in vars(mamba)

    def own(*args, **kwargs):
        return type(mamba).forward(mamba, *args, **kwargs)

    mamba.forward = own
    with decode_graph(mamba):
        pass
    assert mamba.forward is own


def test_a_recording_that_fails_leaves_the_cache_alone(mamba, monkeypatch):
    def fail(run, device):
        run()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, "capture", fail)
    cache, tokens = prefilled(mamba), torch.tensor([1, 2])
    want = step(mamba, copy.deepcopy(cache), tokens)
    with decode_graph(mamba), pytest.raises(RuntimeError, match="out of memory"):
        step(mamba, cache, tokens)
    torch.testing.assert_close(step(mamba, cache, tokens), want)


def test_without_cuda_it_says_so(mamba, monkeypatch):
    monkeypatch.undo()
    with (
        pytest.raises(RuntimeError, match="decode_graph needs a model on a CUDA device, it is on cpu; move it, or"),
        decode_graph(mamba),
    ):
        pass
