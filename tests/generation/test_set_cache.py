"""Members read separately and remembered give what reading the whole prompt gives."""

import itertools

import pytest
import torch

from undersong.generation.set_cache import SetCache
from undersong.generation.set_generate import SetBasedGenerate, set_prefill
from undersong.generation.set_prompt import SetPrompt

from .letters import letter_tokenizer
from .tiny_models import FAMILIES, tiny_model

TOKENIZER = letter_tokenizer()
PASSAGES = ["abc", "d", "ef", "ghij"]


def encode(*prompts, **options):
    return SetPrompt.encode(TOKENIZER, [SetPrompt(p) for p in prompts], **options)


def assert_same_prefill(got, want):
    assert torch.equal(got[2], want[2])
    assert (got[1] - want[1]).abs().max() < 1e-5
    assert got[0].get_seq_length() == want[0].get_seq_length()


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_members_equal_the_joint_prefill(family):
    model, memory = tiny_model(family), SetCache()
    nested = ["x", ["ab", [["c", ["dd", "e"], "f"], "ghi"]], "jk", ["lmn", ["o", ["p", "q"]], "o"], " is"]
    encoding = encode(nested)
    with torch.no_grad():
        want = set_prefill(model, encoding)
        cold = set_prefill(model, encoding, set_cache=memory)
        computed = memory.misses
        warm = set_prefill(model, encoding, set_cache=memory)
    assert memory.misses == computed
    assert memory.hits == computed > 5
    for got in (cold, warm):
        assert_same_prefill(got, want)
        for ours, theirs in zip(got[0].layers, want[0].layers, strict=True):
            assert (ours.keys - theirs.keys).abs().max() < 1e-5
            assert (ours.values - theirs.values).abs().max() < 1e-5


def test_a_padded_batch_equals_the_joint_prefill():
    model, memory = tiny_model("llama"), SetCache()
    encoding = encode(["x", PASSAGES, "a long question"], ["x", PASSAGES[:2], "q"], ["plain text"])
    with torch.no_grad():
        want = set_prefill(model, encoding)
    for _ in range(2):
        got = set_prefill(model, encoding, set_cache=memory)
        assert_same_prefill(got, want)
        for row, first in enumerate((encoding.attention_mask == 0).sum(1).tolist()):
            for ours, theirs in zip(got[0].layers, want[0].layers, strict=True):
                assert (ours.keys[row, :, first:] - theirs.keys[row, :, first:]).abs().max() < 1e-5


def test_members_are_found_in_other_company_and_order():
    model, memory = tiny_model("qwen3"), SetCache()
    set_prefill(model, encode(["x", PASSAGES, "q"]), set_cache=memory)
    assert (memory.hits, memory.misses, len(memory)) == (0, 5, 5)  # the text before the set is remembered too
    other = encode(["x", ["ghij", "new", "d"], "another q"])
    with torch.no_grad():
        got, want = set_prefill(model, other, set_cache=memory), set_prefill(model, other)
    assert (memory.hits, memory.misses) == (3, 6)
    assert_same_prefill(got, want)


def test_what_a_member_depends_on_is_part_of_its_key():
    model, memory = tiny_model("llama"), SetCache()
    known = encode(["x", PASSAGES, "q"])
    set_prefill(model, known, set_cache=memory)
    for changed in (["y", PASSAGES, "q"], ["xx", PASSAGES, "q"], ["x", PASSAGES[:3], "-", PASSAGES, "q"]):
        hits, misses = memory.hits, memory.misses
        encoding = encode(changed)
        with torch.no_grad():
            assert_same_prefill(set_prefill(model, encoding, set_cache=memory), set_prefill(model, encoding))
        assert memory.misses > misses
        assert memory.hits - hits == (4 if len(changed) == 5 else 0)
    other = tiny_model("llama", seed=1)
    with torch.no_grad():
        assert_same_prefill(set_prefill(other, known, set_cache=memory), set_prefill(other, known))


def test_entries_do_not_outlive_the_weights():
    model, memory = tiny_model("llama"), SetCache()
    encoding = encode(["x", PASSAGES, "q"])
    set_prefill(model, encoding, set_cache=memory)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
        assert_same_prefill(set_prefill(model, encoding, set_cache=memory), set_prefill(model, encoding))
    assert memory.hits == 0


def test_a_set_within_a_member_is_the_same_wherever_the_member_stands():
    model, memory = tiny_model("llama"), SetCache()
    inner = ["c", ["dd", "e"], "f"]
    set_prefill(model, encode(["x", [inner, "z"], "q"]), set_cache=memory)
    before = memory.hits
    set_prefill(model, encode(["x", [["a", ["bb", "e"]], inner], "q"]), set_cache=memory)
    assert memory.hits == before + 2  # the text before and the member, though its set has another number now
    different = encode(["x", [["c", ["d", "de"], "f"], "z"], "q"])  # the same tokens, cut otherwise
    with torch.no_grad():
        assert_same_prefill(set_prefill(model, different, set_cache=memory), set_prefill(model, different))


def test_the_least_recently_used_goes_first():
    model, memory = tiny_model("llama"), SetCache(max_tokens=8)
    for members in (["aa", "bb"], ["aa", "cc"], ["aa", "dd"]):
        set_prefill(model, encode(["x", members, "q"]), set_cache=memory)
        assert memory.tokens <= 8
    assert (memory.tokens, len(memory)) == (7, 4)  # x, aa, cc, dd
    misses = memory.misses
    set_prefill(model, encode(["x", ["aa", "cc"], "q"]), set_cache=memory)
    assert memory.misses == misses
    set_prefill(model, encode(["x", ["aa", "bb"], "q"]), set_cache=memory)
    assert memory.misses == misses + 1


def test_a_prompt_larger_than_the_memory_is_read_all_the_same():
    model, memory = tiny_model("llama"), SetCache(max_tokens=2)
    encoding = encode(["x", PASSAGES, "q"])
    with torch.no_grad():
        assert_same_prefill(set_prefill(model, encoding, set_cache=memory), set_prefill(model, encoding))
    assert memory.tokens <= 2
    memory.clear()
    assert (len(memory), memory.tokens, memory.hits, memory.misses) == (0, 0, 0, 0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate_writes_the_same_from_memory(options):
    model = tiny_model("llama")
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True} | options
    method = SetBasedGenerate(set_cache=SetCache())
    runs = []
    for order in list(itertools.permutations(PASSAGES))[::5]:
        encoding = encode(["x", order, "q"], ["y", PASSAGES[:2], "long q"])
        torch.manual_seed(0)
        runs.append(model.generate(**encoding.generate_kwargs(), custom_generate=method, **options))
    torch.manual_seed(0)
    want = model.generate(**encoding.generate_kwargs(), custom_generate=SetBasedGenerate(), **options)
    assert torch.equal(runs[0].sequences, want.sequences)
    assert (torch.stack(runs[0].logits) - torch.stack(want.logits)).abs().max() < 1e-5
    for run in runs[1:]:
        assert torch.equal(torch.stack(run.logits), torch.stack(runs[0].logits))
    assert method.set_cache.misses == 8


def test_what_is_not_remembered_is_refused():
    options = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 2}
    encoding = encode(["x", PASSAGES, "q"])
    with pytest.raises(ValueError, match=r"output_attentions \(True\) needs the whole prompt to be read"):
        tiny_model("llama", attention="eager").generate(
            **encoding.generate_kwargs(), custom_generate=SetBasedGenerate(set_cache=SetCache()), **options
        )


def test_a_memory_needs_room():
    with pytest.raises(ValueError, match=r"max_tokens \(0\) must be positive"):
        SetCache(max_tokens=0)
