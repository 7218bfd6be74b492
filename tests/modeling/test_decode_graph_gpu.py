"""decode_graph with real CUDA graphs: the same tokens, and no step waits for the device."""

import pytest
import torch

from undersong.modeling.decode_graph import decode_graph

from ..gpu import no_waiting
from .test_decode_graph import IDS, build, cache_of

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["aaren", "mamba", "mamba2"])
def model(request):
    return build(request.param).cuda()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generate_gives_the_same_tokens(model, options):
    ids, mask = IDS.cuda(), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).cuda()
    options = {"max_new_tokens": 30, "do_sample": False, "attention_mask": mask} | options
    want = model.generate(ids, **options)
    with decode_graph(model) as graphs:
        for _ in range(2):
            assert torch.equal(model.generate(ids, **options), want)
    assert (graphs.captured, graphs.replayed, graphs.eager) == (1, 58, 2)


@torch.no_grad()
def test_a_step_never_waits_for_the_device(model):
    cache = cache_of(model(IDS.cuda(), use_cache=True))
    tokens = torch.ones(2, 1, dtype=torch.int64, device="cuda")
    with decode_graph(model):
        inputs = {"input_ids": tokens, "past_key_values": cache, "use_cache": True}
        model(**inputs)
        with no_waiting():
            model(**inputs)
            model.forward.__wrapped__(**inputs)  # nor does the step without a graph


@torch.no_grad()
def test_weights_may_change_in_place(model):
    cache = cache_of(model(IDS.cuda(), use_cache=True))
    inputs = {"input_ids": torch.ones(2, 1, dtype=torch.int64, device="cuda"), "past_key_values": cache}
    with decode_graph(model):
        before = model(**inputs, use_cache=True).logits
        model.get_output_embeddings().weight.mul_(0)
        after = model(**inputs, use_cache=True).logits
    assert before.abs().max() > 0
    assert after.abs().max() == 0
