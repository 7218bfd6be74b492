"""A bool mask means the same under every attention implementation, and gathered caches equal fresh ones."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, StaticCache, T5Config, T5ForConditionalGeneration

from undersong.generation.masks import attention_window, check_custom_attention, gather_cache, to_model_mask

from .tiny_models import FAMILIES, VOCAB, tiny_model

FLEX = [family for family in FAMILIES if family not in ("gpt2", "gpt_neo")]  # these two have no flex attention


def random_mask(batch, queries, keys, seed=0):
    """Causal with holes; every query sees itself."""
    offset = keys - queries
    mask = torch.rand(batch, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.6
    return (mask.tril(offset) | torch.eye(keys, dtype=torch.bool)[offset:]).contiguous()


def tokens(batch, length, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_in_two_steps(model, ids, mask, first=7):
    """The first tokens into a cache, then the rest: both masks are custom."""
    cache = DynamicCache(config=model.config)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    parts = []
    for part in (slice(0, first), slice(first, None)):
        parts.append(
            model(
                ids[:, part],
                attention_mask=to_model_mask(mask[:, part, : part.stop], model),
                position_ids=positions[:, part],
                past_key_values=cache,
            ).logits
        )
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_equals_sdpa(family):
    ids, mask = tokens(2, 20), random_mask(2, 20, 20)
    eager = logits_in_two_steps(tiny_model(family, attention="eager"), ids, mask)
    sdpa = logits_in_two_steps(tiny_model(family), ids, mask[:, None].squeeze(1))
    assert (eager - sdpa).abs().max() < 1e-5
    changed = ids.clone()
    changed[:, 3] = 3 + (ids[:, 3] - 2) % (VOCAB - 3)
    unseen = mask.clone()
    unseen[:, 4:, 3] = False
    model = tiny_model(family)
    before, after = (logits_in_two_steps(model, x, unseen)[:, 4:] for x in (ids, changed))
    assert torch.equal(before, after), "a token that nobody sees must have no influence"


@pytest.mark.slow
@pytest.mark.parametrize("family", FLEX)
def test_flex_equals_sdpa(family):
    ids, mask = tokens(2, 20), random_mask(2, 20, 20)
    flex = logits_in_two_steps(tiny_model(family, attention="flex_attention"), ids, mask)
    sdpa = logits_in_two_steps(tiny_model(family), ids, mask)
    assert (flex - sdpa).abs().max() < 1e-5


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (128, 128), (150, 300), (40, 400)])
def test_block_mask_has_full_partial_and_empty_tiles(queries, keys):
    from torch.nn.attention.flex_attention import flex_attention

    model = tiny_model("llama", attention="flex_attention")
    allowed = random_mask(2, queries, keys)
    allowed[0, :, : keys // 2] = True
    allowed[1, :, : keys // 2] = queries == keys == 1  # whole tiles of nothing
    block_mask = to_model_mask(allowed, model)
    q, k, v = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (queries, keys, keys))
    with warnings.catch_warnings():  # uncompiled it is slow, says torch; compiling takes longer
        warnings.simplefilter("ignore")
        got = flex_attention(q, k, v, block_mask=block_mask)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
    assert (got - want).abs().max() < 1e-5


def test_additive_masks_have_the_models_dtype():
    model = tiny_model("llama").to(torch.bfloat16)
    mask = to_model_mask(torch.tensor([[[True, False], [True, True]]]), model)
    assert mask.dtype == torch.bfloat16
    assert mask.tolist() == [[[[0.0, torch.finfo(torch.bfloat16).min], [0.0, 0.0]]]]


@pytest.mark.parametrize(
    ("family", "windows"),
    [
        ("mistral", {"sliding_window": 6}),
        ("gemma3_text", {"sliding_window": 6}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ],
)
def test_windows_count_positions(family, windows):
    model = tiny_model(family, **windows)
    ids, causal = tokens(2, 20), torch.ones(2, 20, 20, dtype=torch.bool).tril()
    positions = torch.arange(20).expand(2, -1)
    with torch.no_grad():
        want = model(ids).logits
        got = model(ids, attention_mask=to_model_mask(causal, model, positions=(positions, positions))).logits
    assert (got - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match="allowed has 20 keys, but .* has layers that see 6; pass positions="):
        to_model_mask(causal, model)
    near = to_model_mask(causal[:, :6, :6], model)
    assert near.shape == (2, 1, 6, 6), "within the window no layer needs a mask of its own"


def test_windows_that_take_no_mask_are_refused():
    model = tiny_model("gpt_neo", window_size=6)
    assert attention_window(model) == 6
    positions = torch.arange(7).expand(1, -1)
    with pytest.raises(ValueError, match="7 keys, but GPTNeoForCausalLM has layers that see 6 and takes no mask"):
        to_model_mask(torch.ones(1, 7, 7).tril().bool(), model, positions=(positions, positions))


def test_models_without_a_window():
    assert attention_window(tiny_model("llama")) is None
    assert attention_window(tiny_model("qwen3")) is None
    assert attention_window(tiny_model("mistral")) is None


def test_models_that_cannot_are_named():
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        check_custom_attention(tiny_model("bloom"))
    small = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 2}
    with pytest.raises(ValueError, match="MambaForCausalLM has recurrent layers"):
        check_custom_attention(MambaForCausalLM(MambaConfig(**small)))
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        check_custom_attention(t5)
    flash = tiny_model("llama")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(
        ValueError, match=r"'flash_attention_2'\) of LlamaForCausalLM takes no custom masks; use 'sdpa'"
    ):
        to_model_mask(torch.ones(1, 1, 1).bool(), flash)


def test_masks_are_checked(monkeypatch):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"allowed \(torch.float32, shape \[1, 2, 2\]\) must be a bool tensor"):
        to_model_mask(torch.ones(1, 2, 2), model)
    with pytest.raises(ValueError, match=r"shape \[1, 3, 2, 2\]"):
        to_model_mask(torch.ones(1, 3, 2, 2).bool(), model)
    monkeypatch.setenv("UNDERSONG_DEBUG", "1")
    with pytest.raises(ValueError, match="a query without any key"):
        to_model_mask(torch.zeros(1, 2, 2).bool(), model)


# A draft of four tokens after six of prompt: 0 with the children 1 and 2, 3 a child of 2.
DRAFT_POSITIONS = [6, 7, 7, 8]
DRAFT_SEES = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@torch.no_grad()
def drafted(model, ids, cache):
    """The cache after six tokens and the draft."""
    model(ids[:, :6], past_key_values=cache)
    tree = torch.cat([torch.ones(4, 6), torch.tensor(DRAFT_SEES)], 1).bool().expand(len(ids), -1, -1)
    positions = torch.tensor([DRAFT_POSITIONS]).expand(len(ids), -1)
    keys = cache.get_mask_sizes(4, 0)[0]
    mask = to_model_mask(tree[:, :, -keys:], model)
    model(ids[:, 6:10], attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


@torch.no_grad()
def continued(model, cache, token, position):
    positions = torch.full((len(token), 1), position)
    return model(token[:, None], position_ids=positions, past_key_values=cache).logits[:, -1]


@pytest.mark.parametrize("accepted", [[0, 2, 3], [0, 1], [0], []])
@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_cache_equals_a_fresh_one(family, accepted):
    model, ids = tiny_model(family), tokens(2, 11)
    cache = drafted(model, ids, DynamicCache(config=model.config))
    gather_cache(cache, 6, torch.tensor(accepted, dtype=torch.long))
    assert cache.get_seq_length() == 6 + len(accepted)
    kept = torch.cat([ids[:, :6], ids[:, [6 + i for i in accepted]], ids[:, 10:]], 1)
    with torch.no_grad():
        want = model(kept).logits[:, -1]
    assert (continued(model, cache, ids[:, 10], 6 + len(accepted)) - want).abs().max() < 1e-5


def test_a_window_that_recorded_its_past_can_be_gathered():
    model, ids = tiny_model("mistral", sliding_window=9), tokens(1, 11)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    gather_cache(drafted_within_window(model, ids, cache), 6, torch.tensor([0, 2, 3]))
    kept = torch.cat([ids[:, :7], ids[:, 8:]], 1)
    with torch.no_grad():
        want = model(kept).logits[:, -1]
    assert (continued(model, cache, ids[:, 10], 9) - want).abs().max() < 1e-5


@torch.no_grad()
def drafted_within_window(model, ids, cache):
    """Like `drafted`, but all ten keys are within reach by position, so the window needs no part in the mask."""
    model(ids[:, :6], past_key_values=cache)
    tree = torch.cat([torch.ones(4, 6), torch.tensor(DRAFT_SEES)], 1).bool()[None]
    places = torch.tensor([[*range(6), *DRAFT_POSITIONS]])
    mask = to_model_mask(tree, model, positions=(places[:, 6:], places))
    model(ids[:, 6:10], attention_mask=mask, position_ids=places[:, 6:], past_key_values=cache)
    return cache


def test_gathering_is_checked():
    model, ids = tiny_model("llama"), tokens(1, 6)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"idx \(\[0, 2\]\) must lie in \[0, 2\) because the cache has 6 tokens"):
        gather_cache(cache, 4, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"StaticCache of \['StaticLayer'\]\) cannot drop tokens"):
        gather_cache(StaticCache(config=model.config, max_cache_len=8), 0, torch.tensor([0]))
    windowed = tiny_model("mistral", sliding_window=4)
    cache = DynamicCache(config=windowed.config)
    with torch.no_grad():
        windowed(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"keep_from \(2\) lies before the 3 tokens that a sliding layer still has"):
        gather_cache(cache, 2, torch.tensor([0, 2]))
