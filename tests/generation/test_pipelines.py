"""Pipelines that decode by a config: strings, chats and batches, and the stock pipeline with a loop."""

import re

import pytest
import torch
from transformers import TextGenerationPipeline, pipeline

from undersong.generation import DecodingConfig, DecodingPipeline, ReadTwicePipeline, generate

from .tiny_code_model import byte_tokenizer, tiny_code_model

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DecodingConfig(
    repetition_cap={"penalty": 0.1, "min_match": 2}, typical_mass=0.9, generation={"max_new_tokens": 12, "top_k": 0}
)
SETS = "b = 2\n<|start_2d|>a = 1\n<|split_2d|>for c in b:\n    a = 4\n<|end_2d|>b = 2\n"
NESTED = f"a = 1\n<|start_2d|>{SETS}<|split_2d|>c<|end_2d|>a"
DOCUMENT = "<document>for c in b:\n    a = 4\n</document>\nif a:\n    b = 3\na = 1\n"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_code_model()


@pytest.fixture
def make(model, tokenizer):
    def make(config, **options):
        return pipeline(
            "text-generation",
            model=model,
            tokenizer=tokenizer,
            pipeline_class=DecodingPipeline,
            decoding=config,
            device="cpu",
            **options,
        )

    return make


@pytest.mark.parametrize(
    ("config", "prompt"),
    [
        (CONFIG, "b = 2\n"),
        (CONFIG, [{"role": "user", "content": "b = 2\n"}]),
        (DecodingConfig(set_prompting=True, generation={"max_new_tokens": 12}), SETS),
        (DecodingConfig(set_prompting=True, generation={"max_new_tokens": 12}), [{"role": "user", "content": SETS}]),
        (DecodingConfig(read_times=2, generation={"max_new_tokens": 12}), DOCUMENT),
        (DecodingConfig(mbr=3, generation={"max_new_tokens": 12}), "b = 2\n"),
    ],
    ids=["text", "chat", "sets", "sets-chat", "read-twice", "mbr"],
)
def test_the_pipeline_says_what_generate_says(make, model, tokenizer, config, prompt):
    pipe = make(config)
    torch.manual_seed(0)
    expected = generate(model, tokenizer, prompt, config)
    torch.manual_seed(0)
    (new,) = pipe(prompt, return_full_text=False)
    assert new["generated_text"] == expected
    torch.manual_seed(0)
    (full,) = pipe(prompt)
    if isinstance(prompt, str):
        assert full["generated_text"] == prompt + expected
    else:
        assert full["generated_text"] == [*prompt, {"role": "assistant", "content": expected}]


@pytest.mark.parametrize(
    "prompts", [["b = 2\n", "for c in b:\n    a", "a"], [SETS, "a = 1\n", f"if a:\n{SETS}", NESTED]]
)
def test_batches_equal_single_calls(make, prompts):
    config = DecodingConfig(set_prompting=SETS in prompts, repetition_cap=0.1, generation={"max_new_tokens": 12})
    pipe = make(config)
    single = [pipe(prompt) for prompt in prompts]
    assert pipe(prompts) == single
    assert pipe(prompts, batch_size=3) == single


def test_arguments_of_the_call_count_above_those_of_the_pipeline_and_these_above_the_config(make):
    def length(pipe, **options):
        (result,) = pipe("a", return_tensors=True, **options)
        return len(result["generated_token_ids"]) - 1

    assert length(make(CONFIG)) == 12
    assert length(make(CONFIG, max_new_tokens=7)) == 7
    assert length(make(CONFIG, max_new_tokens=7), max_new_tokens=3) == 3


def test_nothing_switches_sampling_on_behind_the_config(make, model, tokenizer):
    pipe = make(DecodingConfig())
    texts = {pipe("a = 1\n", max_new_tokens=20)[0]["generated_text"] for _ in range(3)}
    assert texts == {"a = 1\n" + generate(model, tokenizer, "a = 1\n", DecodingConfig(), max_new_tokens=20)}


def test_several_sequences_and_stop_sequences(make):
    pipe = make(DecodingConfig(typical_mass=0.9, generation={"max_new_tokens": 12}))
    assert len(pipe("b = 2\n", num_return_sequences=3)) == 3
    (result,) = make(DecodingConfig(repetition_cap=0.5))("b = 2\n", stop_sequence="=", return_full_text=False)
    assert re.fullmatch("[^=]*=", result["generated_text"])


def test_refusals_come_through(make):
    with pytest.raises(ValueError, match="repetition_cap and num_beams do not compose"):
        make(CONFIG)("a", num_beams=2)
    with pytest.raises(ValueError, match=r"truncation \(True\) cannot be used with set_prompting"):
        make(DecodingConfig(set_prompting=True))(SETS, truncation=True)


def test_the_config_beside_the_model_is_found(model, tokenizer, tmp_path):
    from transformers import LlamaForCausalLM

    model.save_pretrained(tmp_path)
    DecodingConfig(repetition_cap=0.25).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    pipe = pipeline(
        "text-generation", model=loaded, tokenizer=tokenizer, pipeline_class=DecodingPipeline, device="cpu"
    )
    assert pipe.decoding == DecodingConfig(repetition_cap=0.25)


def test_read_twice_is_a_task(model, tokenizer):
    pipe = pipeline("read-twice-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert isinstance(pipe, ReadTwicePipeline)
    expected = generate(model, tokenizer, DOCUMENT, DecodingConfig(read_times=2), max_new_tokens=12)
    assert expected != generate(model, tokenizer, DOCUMENT, DecodingConfig(), max_new_tokens=12)
    (result,) = pipe(DOCUMENT, max_new_tokens=12)
    assert result["generated_text"] == DOCUMENT + expected
    thrice = DecodingConfig(read_times=3)
    pipe = pipeline("read-twice-text-generation", model=model, tokenizer=tokenizer, decoding=thrice, device="cpu")
    assert pipe.decoding == thrice
    with pytest.raises(ValueError, match="<document>"):
        pipe("no document")


def test_the_stock_pipeline_takes_a_loop_per_call(model, tokenizer):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert type(pipe) is TextGenerationPipeline
    torch.manual_seed(0)
    loop = CONFIG.loop(model, tokenizer)
    (result,) = pipe("b = 2\n", custom_generate=loop, **CONFIG.generation, temperature=1.0, return_full_text=False)
    torch.manual_seed(0)
    assert result["generated_text"] == generate(model, tokenizer, "b = 2\n", CONFIG)
