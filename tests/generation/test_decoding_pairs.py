"""Every pair of decoding methods on a tiny model: it equals the composition by hand, or it is refused by name."""

import contextlib
import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from undersong.generation import (
    DecodingConfig,
    GrammarRepetitionPenalty,
    JustReadTwice,
    SelfReinforcementCapLogitsProcessor,
    SetBasedGenerate,
    SetPrompt,
    generate,
    mbr_select,
)
from undersong.generation.decoding_pairs import METHODS, REFUSED, pair_table, pairs, refusal

from .tiny_code_model import byte_tokenizer, tiny_code_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = (
    "<|start_2d|>b = 2\nif a:\n    b = 3\n<|split_2d|>a = 1\n<|end_2d|>for c in b:\n    a = 4\nb = 2\na = 1\na = 1\n"
    "<document>for c in b:\n    a = 4\n</document>\nif a:\n    b = 3\na = 1\n",
    "<|start_2d|>a = 1\na = 1\n<|split_2d|>a = 1\n<|end_2d|>b = 2\nif a:\n    b = 3\nif a:\n    b = 3\n"
    "<document>b = 2\nc = a + b\na = 1\n</document>\nb = 2\nfor c in b:\n    a = 4\n",
    "<document>for c in b:\n    a = 4\nb = 2\n</document>\n<|start_2d|>b = 2\nc = a + b\n<|split_2d|>a = 1\n"
    "<|end_2d|>b = 2\n",
    "<|start_2d|>a = 1\n<|split_2d|>c = a + b\n<|end_2d|><document>a = 1\nb = 2\nb = 2\n</document>\n" + 3 * "b = 2\n",
    "<|start_2d|>b = 2\n<|split_2d|>c = a + b\n<|end_2d|><document>b = 2\nb = 2\nb = 2\n</document>\n" + 5 * "a = 1\n",
    "<|start_2d|>b = 2\n<|split_2d|>b = 2\n<|end_2d|><document>for c in b:\n    a = 4\nc = a + b\n</document>\n"
    + 5 * "c = a + b\n",
)
NEW_TOKENS = 40
CAP = {"penalty": 0.1, "min_match": 2}
GRAMMAR = {"language": "python", "beta": 1e-4}
MBR = 4
TOP_P = 0.8
IN_CONFIG = {
    "typical_mass": 0.3,
    "repetition_cap": CAP,
    "grammar_penalty": GRAMMAR,
    "set_prompting": True,
    "read_times": 2,
    "mbr": MBR,
}
# methods that decide which tokens come out: each must make a difference in every pair it composes in
DECIDING = (*IN_CONFIG, "top_p", "do_sample", "num_beams")
SAMPLED = {"typical_mass", "top_p", "mbr", "do_sample"}
PAGED = {
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256),
    "warmup": False,
    "eos_token_id": -1,
}
COMPOSING = [pair for pair in pairs() if pair not in REFUSED]


@pytest.fixture(scope="module")
def tokens_of(models, tokenizer):
    """`ours`, remembered: many pairs without one of their methods are the same."""
    known = {}

    def tokens_of(active, prompt):
        key = frozenset(active), prompt
        if key not in known:
            known[key] = ours(active, models, tokenizer, prompt)[0]
        return known[key]

    return tokens_of


class Collector(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1

    def new_tokens(self):
        return [token for value in self.puts[1:] for token in value.flatten().tolist()]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_code_model(kind) for kind in ("llama", "t5")}


@contextlib.contextmanager
def watch(model):
    """The caches that the model's forward passes get, one per pass."""
    caches = []

    def look(module, args, kwargs):
        if module is model:  # not its copies
            caches.append(kwargs.get("past_key_values"))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield caches
    finally:
        handle.remove()


def model_for(active, models):
    return models["t5" if "encoder_decoder" in active else "llama"]


def ours(active, models, tokenizer, prompt=PROMPTS[0]):
    """Through the config and `generate`; also what was observed on the way."""
    values = {name: value for name, value in IN_CONFIG.items() if name in active}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": bool(SAMPLED & active), "eos_token_id": None}
    model = model_for(active, models)
    if "typical_mass" in active:
        options["top_k"] = 0
    if "top_p" in active:
        options["top_p"] = TOP_P
    if "num_beams" in active:
        options["num_beams"] = 3
    if "assistant_model" in active:
        options["assistant_model"] = copy.deepcopy(model)
    if "prompt_lookup_num_tokens" in active:
        options["prompt_lookup_num_tokens"] = 4
    if "static" in active:
        options["cache_implementation"] = "static"
    if "paged" in active:
        options |= {"cache_implementation": "paged", **PAGED}
        if "static" in active:
            options["past_key_values"] = StaticCache(model.config, max_cache_len=256)
    streamer = Collector() if "streamer" in active else None
    config = DecodingConfig(**values)
    torch.manual_seed(0)
    tokens = generate(model, tokenizer, prompt, config, streamer=streamer, return_ids=True, **options)
    return tokens, streamer


def by_hand(active, models, tokenizer):
    """With stock `generate()`, stock warpers and the single methods only."""
    model = model_for(active, models)
    prompt = JustReadTwice().apply_to_text(PROMPTS[0]) if "read_times" in active else PROMPTS[0]
    if "set_prompting" in active:
        inputs = SetPrompt.encode(tokenizer, [SetPrompt.parse(prompt)]).generate_kwargs()
        inputs["custom_generate"] = SetBasedGenerate()
    else:
        inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    sampled, beams = bool(SAMPLED & active), "num_beams" in active
    if "paged" in active:
        settings = GenerationConfig(
            max_new_tokens=NEW_TOKENS,
            do_sample=sampled,
            top_k=(0 if "typical_mass" in active else 50) if sampled else None,
            top_p=TOP_P if "top_p" in active else None,
            typical_p=IN_CONFIG["typical_mass"] if "typical_mass" in active else None,
            eos_token_id=-1,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        outputs = model.generate_batch(
            inputs=inputs["input_ids"].tolist(),
            generation_config=settings,
            **{k: v for k, v in PAGED.items() if k != "eos_token_id"},
        )
        return outputs["req_0"].generated_tokens
    processors = []
    if "grammar_penalty" in active:
        processors.append(GrammarRepetitionPenalty(tokenizer, **GRAMMAR))
    if "repetition_cap" in active:
        processors.append(SelfReinforcementCapLogitsProcessor(**CAP))
    keep = 2 if beams else 1  # no end-of-text token, and one more
    # an assistant samples by the same generation config, so what it drafts is equal only if the config is
    in_config = {"top_k": 0 if sampled else None}
    if sampled and "assistant_model" in active and "typical_mass" not in active:
        in_config = {"top_k": 50, "top_p": TOP_P if "top_p" in active else None}
    if sampled and "typical_mass" not in active and not in_config["top_k"]:
        processors.append(TopKLogitsWarper(50, min_tokens_to_keep=keep))
    if "top_p" in active and not in_config["top_k"]:
        processors.append(TopPLogitsWarper(TOP_P, min_tokens_to_keep=keep))
    if "typical_mass" in active:
        processors.append(TypicalLogitsWarper(IN_CONFIG["typical_mass"], min_tokens_to_keep=keep))
    torch.manual_seed(0)
    output = model.generate(
        **inputs,
        logits_processor=processors,
        do_sample=sampled,
        **in_config,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        num_beams=3 if beams else 1,
        num_return_sequences=MBR if "mbr" in active else 1,
        assistant_model=copy.deepcopy(model) if "assistant_model" in active else None,
        prompt_lookup_num_tokens=4 if "prompt_lookup_num_tokens" in active else None,
        cache_implementation="static" if "static" in active else None,
    )
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    rows = output[:, start:].tolist()
    return rows[mbr_select(tokenizer.batch_decode(rows, skip_special_tokens=True))[0]]


@pytest.mark.parametrize("pair", COMPOSING, ids="-".join)
def test_a_composing_pair_equals_the_composition_by_hand(pair, models, tokenizer, monkeypatch):
    active = set(pair)
    calls = []
    model = model_for(active, models)
    if "paged" in active:
        batch = model.generate_batch
        monkeypatch.setattr(model, "generate_batch", lambda **kw: (calls.append(kw), batch(**kw))[1], raising=False)
    with watch(model) as caches:
        tokens, streamer = ours(active, models, tokenizer)
    assert len(calls) == ("paged" in active)
    assert len(tokens) == NEW_TOKENS
    assert tokens == by_hand(active, models, tokenizer)

    if streamer is not None:
        assert streamer.new_tokens() == tokens
        assert streamer.ended == 1
    if "assistant_model" in active or ("prompt_lookup_num_tokens" in active and "encoder_decoder" not in active):
        assert len(caches) < NEW_TOKENS  # drafts were accepted
    if "static" in active:
        cache = caches[0]
        assert isinstance(getattr(cache, "self_attention_cache", cache), StaticCache)


@pytest.mark.parametrize("pair", COMPOSING, ids="-".join)
def test_both_methods_of_a_composing_pair_have_an_effect(pair, tokens_of):
    active = set(pair)
    for name in active & set(DECIDING):
        # without typical sampling, nucleus sampling or MBR, sampling goes on
        rest = (active - {name}) | ({"do_sample"} if name in SAMPLED - {"do_sample"} else set())
        if name == "do_sample" and SAMPLED & rest:
            continue
        results = ((tokens_of(methods, prompt) for methods in (active, rest)) for prompt in PROMPTS)
        assert any(both != one for both, one in results), f"{name} changes nothing"


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_a_refused_pair_names_both_and_the_remedy_before_any_computation(pair, models, tokenizer):
    active = set(pair)
    message = refusal(*pair)
    assert message.startswith(f"{pair[0]} and {pair[1]} do not compose because ")
    with watch(model_for(active, models)) as forwards, pytest.raises(ValueError, match=re.escape(message)):
        ours(active, models, tokenizer)
    assert not forwards


@pytest.mark.parametrize("pair", [p for p in REFUSED if not {"streamer", "paged"} & set(p)], ids="-".join)
def test_the_loop_refuses_what_generate_refuses(pair, models, tokenizer):
    """`model.generate(custom_generate=loop)` can combine what one config cannot."""
    active = set(pair)
    model = model_for(active, models)
    options = {"num_beams": 3} if "num_beams" in active else {}
    if "prompt_lookup_num_tokens" in active:
        options["prompt_lookup_num_tokens"] = 4
    if "static" in active:
        options["cache_implementation"] = "static"
    values = {name: value for name, value in IN_CONFIG.items() if name in active}
    if len(values) == 2:
        with pytest.raises(ValueError, match=re.escape(refusal(*pair))):
            DecodingConfig(**values)
        return
    config = DecodingConfig(**values)
    assistant = copy.deepcopy(model) if "assistant_model" in active else None
    loop = config.loop(model, tokenizer, assistant_model=assistant)
    inputs = dict(tokenizer(PROMPTS[0], return_tensors="pt", return_token_type_ids=False))
    with pytest.raises(ValueError, match=re.escape(refusal(*pair))):
        model.generate(**inputs, **config.generation, **options, custom_generate=loop, max_new_tokens=2)


def test_the_table_holds_every_pair_once_and_in_order():
    names = list(METHODS)
    assert pairs() == list(itertools.combinations(names, 2))
    assert all(names.index(a) < names.index(b) for a, b in REFUSED)


def test_the_docs_show_the_table():
    docs = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
    assert pair_table() in docs
