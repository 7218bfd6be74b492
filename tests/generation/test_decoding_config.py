"""`DecodingConfig` and `generate`: values in, the right tokens out, and nothing left behind."""

import json
import re
import threading
import warnings

import pytest
import torch
from transformers import LogitsProcessorList, TextIteratorStreamer, TextStreamer, TypicalLogitsWarper
from transformers.generation import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper

from undersong.generation import (
    DecodingConfig,
    LocallyTypicalLogitsWarper,
    SelfReinforcementCapLogitsProcessor,
    TopPLogitsWarper,
    generate,
)
from undersong.generation.decoding_loop import arrange

from .tiny_code_model import byte_tokenizer, tiny_code_model

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = {
    "typical_mass": 0.9,
    "typical_reference": "model",
    "repetition_cap": {"penalty": 0.25, "min_match": 2},
    "grammar_penalty": {"language": "python", "beta": 0.5},
    "read_times": 2,
    "mbr": {"num_samples": 4, "utility": "bleu"},
    "generation": {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 8, "eos_token_id": [2, 3]},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_code_model()


class User(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"typical_mass": 1.5}, r"mass \(1.5\) must lie in \(0, 1\]"),
        ({"typical_mass": True}, r"typical_mass \(True\) must be a number"),
        ({"typical_mass": "0.9"}, r"typical_mass \('0.9'\) must be a number"),
        ({"typical_reference": "raw"}, r"typical_reference \('raw'\) must be 'processed' or 'model'"),
        ({"repetition_cap": -0.1}, r"penalty \(-0.1\) must lie in \[0, 1\]"),
        ({"repetition_cap": "half"}, r"repetition_cap \('half'\) must be a number or a dict of arguments"),
        ({"repetition_cap": {"lambda": 0.5}}, "repetition_cap has no lambda; it takes penalty, min_match"),
        ({"repetition_cap": {"penalty": 0.5, "min_match": 0}}, r"min_match \(0\) must be a positive integer"),
        ({"grammar_penalty": 0.9}, r"grammar_penalty \(0.9\) must be a language name or a dict"),
        ({"grammar_penalty": {"betta": 0.9}}, "grammar_penalty has no betta; it takes language, beta"),
        ({"grammar_penalty": {"language": print}}, "grammar_penalty must hold plain JSON values"),
        ({"set_prompting": "yes"}, r"set_prompting \('yes'\) must be True or False"),
        ({"read_times": 0}, r"read_times \(0\) must be a positive integer"),
        ({"read_times": 1.5}, r"read_times \(1.5\) must be a positive integer"),
        ({"mbr": 0}, r"num_samples \(0\) must be a positive integer"),
        ({"mbr": 4.0}, r"mbr \(4.0\) must be a number of samples or a dict"),
        ({"mbr": {"num_sample": 4}}, "mbr has no num_sample; it takes num_samples, utility"),
        ({"mbr": {"utility": "rouge"}}, r"utility \('rouge'\) must be 'chrf', 'bleu'"),
        ({"generation": ["top_p"]}, r"generation \(\['top_p'\]\) must be a dict"),
        ({"generation": {"top_q": 0.9}}, "generation has unknown fields top_q"),
        ({"generation": {"eos_token_id": {2}}}, "generation must hold plain JSON values"),
        ({"typical_mass": 0.9, "generation": {"typical_p": 0.9}}, r"typical_mass \(0.9\) and generation's typical_p"),
        (
            {"typical_mass": 0.9, "generation": {"do_sample": False}},
            r"do_sample \(False\) must be True because typical",
        ),
        ({"mbr": 4, "generation": {"do_sample": False}}, r"do_sample \(False\) must be True because mbr needs"),
        ({"generation": {"early_stopping": "soon"}}, r"generation: .*early_stopping.* soon"),
    ],
)
def test_a_wrong_value_is_named_when_the_config_is_made(values, message):
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**values)


def test_a_config_cannot_be_changed_from_outside():
    generation, cap = {"top_k": 0}, {"penalty": 0.5}
    config = DecodingConfig(generation=generation, repetition_cap=cap)
    generation["top_k"], cap["penalty"] = 9, 9
    assert config.generation == {"top_k": 0}
    assert config.repetition_cap == {"penalty": 0.5}
    config.to_dict()["generation"]["top_k"] = 9
    assert config.generation == {"top_k": 0}
    with pytest.raises(AttributeError):
        config.read_times = 3


def test_methods_that_need_samples_switch_sampling_on():
    assert DecodingConfig(typical_mass=0.9).generation == {"do_sample": True}
    assert DecodingConfig(mbr=4).generation == {"do_sample": True}
    assert DecodingConfig(repetition_cap=0.5).generation == {}


def test_a_saved_config_comes_back(tmp_path):
    config = DecodingConfig(**EVERYTHING)
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "decoding_config.json"
    assert json.loads(path.read_text()) == EVERYTHING
    assert DecodingConfig.from_pretrained(path.parent) == config
    assert DecodingConfig().to_dict() == {}
    assert DecodingConfig.from_dict({}) == DecodingConfig()


def test_a_wrong_file_is_named(tmp_path):
    path = tmp_path / "decoding_config.json"
    for text, message in [
        ('{"typical": 0.9, "mass": 1}', "unknown fields mass, typical; a decoding config has typical_mass"),
        ('{"read_times": 0}', "read_times (0) must be a positive integer"),
        ("[1]", "a decoding config must be an object"),
        ("{", "Expecting property name"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"decoding_config.json: .*{re.escape(message)}"):
            DecodingConfig.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match="decoding_config.json"):
        DecodingConfig.from_pretrained(tmp_path)


def test_without_a_config_the_one_beside_the_model_counts(tmp_path, model, tokenizer):
    from transformers import LlamaForCausalLM

    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    prompt, options = "a = 1\n", {"max_new_tokens": 24, "return_ids": True}
    stock = generate(model, tokenizer, prompt, **options)
    assert generate(loaded, tokenizer, prompt, **options) == stock
    config = DecodingConfig(repetition_cap={"penalty": 0.0, "min_match": 2})
    config.save_pretrained(tmp_path)
    capped = generate(loaded, tokenizer, prompt, **options)
    assert capped != stock
    assert capped == generate(model, tokenizer, prompt, config, **options)


def test_processors_stand_where_their_mathematics_needs_them(model, tokenizer):
    seen = []

    def spy(model, input_ids, logits_processor, **kwargs):
        seen.append([type(p).__name__ for p in logits_processor])
        return model._sample(input_ids, logits_processor=logits_processor, **kwargs)

    for reference, place in (("processed", 6), ("model", 4)):
        config = DecodingConfig(
            typical_mass=0.9,
            typical_reference=reference,
            repetition_cap=0.5,
            grammar_penalty="python",
            generation={"temperature": 0.5, "top_k": 9, "repetition_penalty": 1.1, "renormalize_logits": True},
        )
        loop = config.loop(model, tokenizer)
        loop.decode = spy
        inputs = config.prepare(tokenizer, "a = 1\n")
        model.generate(
            **inputs, **config.generation, custom_generate=loop, max_new_tokens=1, logits_processor=[User()]
        )
        expected = [
            "RepetitionPenaltyLogitsProcessor",
            "User",
            "GrammarRepetitionPenalty",
            "SelfReinforcementCapLogitsProcessor",
            "TemperatureLogitsWarper",
            "TopKLogitsWarper",
            "LogitNormalization",
        ]
        expected.insert(place, "LocallyTypicalLogitsWarper")
        assert seen.pop() == expected


def test_stock_typical_and_top_p_become_ours():
    stock = LogitsProcessorList([TopKLogitsWarper(9), TypicalLogitsWarper(0.5)])
    top_k, typical = arrange(stock, [])
    assert type(top_k) is TopKLogitsWarper
    assert isinstance(typical, LocallyTypicalLogitsWarper)
    assert typical.mass == 0.5


def test_top_p_of_the_generation_config_runs_on_our_operator(model, tokenizer):
    seen = []

    def spy(model, input_ids, logits_processor, **kwargs):
        seen.extend(logits_processor)
        return model._sample(input_ids, logits_processor=logits_processor, **kwargs)

    loop = DecodingConfig().loop(model, tokenizer)
    loop.decode = spy
    inputs = DecodingConfig().prepare(tokenizer, "a = 1\n")
    model.generate(**inputs, custom_generate=loop, do_sample=True, top_p=0.8, max_new_tokens=1)
    assert [type(p) for p in seen] == [TopKLogitsWarper, TopPLogitsWarper]
    assert seen[1].top_p == 0.8


def test_a_list_of_processors_has_no_place_behind_the_warpers(model, tokenizer):
    with pytest.raises(ValueError, match=r"typical_reference \('processed'\) needs a place behind the warpers"):
        DecodingConfig(typical_mass=0.9).processors(model, tokenizer)
    processors = DecodingConfig(typical_mass=0.9, typical_reference="model", repetition_cap=0.5).processors(
        model, tokenizer
    )
    assert [type(p) for p in processors] == [SelfReinforcementCapLogitsProcessor, LocallyTypicalLogitsWarper]
    capped = DecodingConfig(repetition_cap=0.1)
    options = {"max_new_tokens": 24, "return_ids": True}
    by_list = generate(
        model, tokenizer, "b = 2\n", DecodingConfig(), logits_processor=capped.processors(model, tokenizer), **options
    )
    assert by_list == generate(model, tokenizer, "b = 2\n", capped, **options)


def test_a_default_top_k_behind_typical_sampling_of_the_model_is_pointed_out(model, tokenizer):
    config = DecodingConfig(typical_mass=0.9, typical_reference="model")
    with pytest.warns(UserWarning, match=r"top_k \(50, the default when sampling\) cuts .* pass top_k=0"):
        generate(model, tokenizer, "a = 1\n", config, max_new_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokenizer, "a = 1\n", config, max_new_tokens=2, top_k=0)


def test_beams_always_have_a_continuation_besides_end_of_text(model, tokenizer):
    from undersong.generation.decoding_loop import min_tokens_to_keep

    settings = model.generation_config
    assert min_tokens_to_keep(settings) == 1
    for eos, expected in ((None, 2), (2, 2), ([2, 3], 3)):
        kept = []
        config = DecodingConfig(typical_mass=1e-6, generation={"top_k": 0, "num_beams": 3, "eos_token_id": eos})
        loop = config.loop(model, tokenizer)
        loop.decode = lambda model, ids, logits_processor, kept=kept, **kw: (kept.extend(logits_processor), ids)[1]
        model.generate(**config.prepare(tokenizer, "a"), **config.generation, custom_generate=loop, max_new_tokens=2)
        assert kept[-1].min_tokens_to_keep == (expected if eos is not None else 2)


def test_prepare_takes_texts_chats_and_batches(tokenizer):
    config, text = DecodingConfig(), "a = 1\n"
    chat = [{"role": "user", "content": "hello"}]
    assert config.prepare(tokenizer, text)["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    rendered = "<|im|>user: hello\n<|im|>assistant: "
    assert tokenizer.decode(config.prepare(tokenizer, chat)["input_ids"][0]) == rendered
    prefilled = [*chat, {"role": "assistant", "content": "Hi"}]
    assert tokenizer.decode(config.prepare(tokenizer, prefilled)["input_ids"][0]).endswith("assistant: Hi")
    batch = config.prepare(tokenizer, [chat, [{"role": "user", "content": "hi"}]])
    assert batch["attention_mask"].tolist()[1][:4] == [0, 0, 0, 1]
    assert set(batch) == {"input_ids", "attention_mask"}
    right = config.prepare(tokenizer, ["ab", "a"], padding_side="right")
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_prompts_that_cannot_be_read_are_named(tokenizer):
    config = DecodingConfig()
    with pytest.raises(ValueError, match="prompt must be texts or chats .* got chat and str; split the batch"):
        config.prepare(tokenizer, ["text", [{"role": "user", "content": "hello"}]])
    with pytest.raises(ValueError, match="prompt must hold at least one text or chat"):
        config.prepare(tokenizer, [])
    with pytest.raises(ValueError, match="got int"):
        config.prepare(tokenizer, [1, 2])
    bare = byte_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="no pad_token for 2 prompts; set tokenizer.pad_token = tokenizer.eos_token"):
        config.prepare(bare, ["a", "b"])
    with pytest.raises(ValueError, match="<document>"):
        DecodingConfig(read_times=2).prepare(tokenizer, "no document")


def test_reading_twice_and_sets_act_on_texts_and_on_chats(tokenizer):
    text = "<document>a = 1</document> <|start_2d|>b<|split_2d|>cc<|end_2d|>?"
    twice = DecodingConfig(read_times=2)
    doubled = "<document>a = 1</document>\n<document>a = 1</document> "
    assert tokenizer.decode(twice.prepare(tokenizer, text)["input_ids"][0]).startswith(doubled)
    chat = [{"role": "system", "content": "code"}, {"role": "user", "content": text}]
    assert doubled in tokenizer.decode(twice.prepare(tokenizer, chat)["input_ids"][0])
    assert chat[1]["content"] == text
    both = DecodingConfig(read_times=2, set_prompting=True)
    for prompt in (text, chat):
        inputs = both.prepare(tokenizer, prompt)
        decoded = tokenizer.decode(inputs["input_ids"][0])
        assert doubled in decoded
        assert "2d|>" not in decoded
        assert {"position_ids", "set_segment_ids"} <= set(inputs)
        # the members b and cc begin at the same position
        assert inputs["position_ids"].max() == inputs["input_ids"].shape[1] - 2


def test_a_plain_config_is_stock_generate(model, tokenizer):
    prompt = "for c in b:\n"
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    for options in (
        {},
        {"do_sample": True, "temperature": 0.8},
        {"num_beams": 2},
        {"stop_strings": "=", "tokenizer": 1},
    ):
        options = {**options, "max_new_tokens": 20}
        stock = {**options, "tokenizer": tokenizer} if "tokenizer" in options else options
        options.pop("tokenizer", None)
        torch.manual_seed(0)
        expected = model.generate(ids, **stock)[0, ids.shape[1] :].tolist()
        torch.manual_seed(0)
        assert generate(model, tokenizer, prompt, DecodingConfig(), return_ids=True, **options) == expected


def test_the_result_has_the_shape_of_the_prompt(model, tokenizer):
    config = DecodingConfig(generation={"max_new_tokens": 5, "do_sample": True})
    one = generate(model, tokenizer, "a", config)
    assert isinstance(one, str)
    several = generate(model, tokenizer, ["a", "b = 2\n"], config, num_return_sequences=2)
    assert [[type(text) for text in texts] for texts in several] == [[str, str], [str, str]]
    ids = generate(model, tokenizer, ["a"], config, return_ids=True)
    assert [len(row) for row in ids] == [5]
    chat = generate(model, tokenizer, [{"role": "user", "content": "a"}], config)
    assert isinstance(chat, str)


def test_a_batch_equals_its_prompts_one_by_one(model, tokenizer):
    config = DecodingConfig(repetition_cap={"penalty": 0.1, "min_match": 2}, grammar_penalty="python")
    prompts = ["b = 2\nb = 2\n", "for c in b:\n    a = 4\n", "a"]
    options = {"max_new_tokens": 30, "return_ids": True}
    batch = generate(model, tokenizer, prompts, config, **options)
    assert batch == [generate(model, tokenizer, prompt, config, **options) for prompt in prompts]


def test_arguments_of_the_call_count_above_the_config(model, tokenizer):
    config = DecodingConfig(generation={"max_new_tokens": 5})
    assert len(generate(model, tokenizer, "a", config, return_ids=True)) == 5
    assert len(generate(model, tokenizer, "a", config, return_ids=True, max_new_tokens=7)) == 7
    with pytest.raises(ValueError, match=r"do_sample \(False\) must be True because typical_mass needs samples"):
        generate(model, tokenizer, "a", DecodingConfig(typical_mass=0.9), do_sample=False)
    with pytest.raises(ValueError, match="max_new_token"):
        generate(model, tokenizer, "a", config, max_new_token=7)


def test_ids_end_with_the_end_of_text(model, tokenizer):
    newline = tokenizer("\n")["input_ids"][0]
    options = {"max_new_tokens": 20, "eos_token_id": newline, "return_ids": True}
    rows = generate(model, tokenizer, ["b = 2\n", "for c in b:\n    a"], DecodingConfig(), **options)
    assert all(row[-1] == newline and newline not in row[:-1] for row in rows)
    assert len({len(row) for row in rows}) > 1


def test_calls_leave_nothing_behind(model, tokenizer):
    config = DecodingConfig(repetition_cap={"penalty": 0.0, "min_match": 2}, grammar_penalty="python")
    loop = config.loop(model, tokenizer)
    inputs = config.prepare(tokenizer, "b = 2\n")
    first = model.generate(**inputs, custom_generate=loop, max_new_tokens=24)
    # a text that goes on where the last call ended must not count that call's probabilities
    longer = {"input_ids": first, "attention_mask": torch.ones_like(first)}
    again = model.generate(**longer, custom_generate=loop, max_new_tokens=24)
    assert again.equal(model.generate(**longer, custom_generate=config.loop(model, tokenizer), max_new_tokens=24))
    assert model.generate(**inputs, custom_generate=loop, max_new_tokens=24).equal(first)
    assert model.generation_config.do_sample is not True


def test_a_reader_in_another_thread_gets_the_whole_text(model, tokenizer):
    for config in (
        DecodingConfig(),
        DecodingConfig(repetition_cap=0.5),
        DecodingConfig(mbr=3),
        DecodingConfig(set_prompting=True),
    ):
        prompt = "a = 1\n<|start_2d|>b = 2\n<|split_2d|>c\n<|end_2d|>a" if config.set_prompting else "a = 1\n"
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        texts = []
        torch.manual_seed(0)
        arguments = {"streamer": streamer, "max_new_tokens": 12}
        thread = threading.Thread(
            target=lambda c=config, p=prompt, a=arguments, t=texts: t.append(generate(model, tokenizer, p, c, **a))
        )
        thread.start()
        streamed = "".join(streamer)
        thread.join()
        assert streamed == texts[0]
        assert texts[0]


def test_a_failed_call_ends_the_stream(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    with pytest.raises(ValueError, match="num_beams and streamer do not compose"):
        generate(model, tokenizer, "a", DecodingConfig(), streamer=streamer, num_beams=2)
    assert list(streamer) == [""]


def test_drafts_stream_as_they_are_accepted(model, tokenizer, capsys):
    config = DecodingConfig(generation={"prompt_lookup_num_tokens": 4, "max_new_tokens": 16})
    text = generate(model, tokenizer, "b = 2\nb = 2\n", config, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == text + "\n"


def test_output_records_have_an_entry_per_token(model, tokenizer):
    config = DecodingConfig(repetition_cap=0.5)
    output = model.generate(
        **config.prepare(tokenizer, "a"),
        custom_generate=config.loop(model, tokenizer),
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.scores) == 6
    assert output.sequences.shape == (1, 7)
    assert output.past_key_values.get_seq_length() == 6


def test_modes_that_live_in_repositories_are_named(model, tokenizer):
    loop = DecodingConfig(repetition_cap=0.5).loop(model, tokenizer)
    with pytest.raises(
        ValueError, match="contrastive_search has a loop of its own .* which other methods cannot join"
    ):
        model.generate(torch.tensor([[5]]), custom_generate=loop, penalty_alpha=0.6, top_k=4, max_new_tokens=2)


def test_sets_need_a_config_for_sets(model, tokenizer):
    inputs = DecodingConfig(set_prompting=True).prepare(tokenizer, "a<|start_2d|>b<|split_2d|>c<|end_2d|>")
    with pytest.raises(ValueError, match="set_segment_ids were given, but this loop reads prompts as plain text"):
        model.generate(**inputs, custom_generate=DecodingConfig().loop(model, tokenizer), max_new_tokens=2)


def test_warpers_of_the_caller_do_not_mix_with_the_order(model):
    ours = [SelfReinforcementCapLogitsProcessor(), LocallyTypicalLogitsWarper(0.5, reference="processed")]
    names = [type(p).__name__ for p in arrange([User(), TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)], ours)]
    assert names == [
        "User",
        "SelfReinforcementCapLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "LocallyTypicalLogitsWarper",
    ]


def test_continuous_batching_refuses_what_it_would_drop(model, tokenizer):
    typical = DecodingConfig(typical_mass=0.9, typical_reference="model")
    with pytest.raises(ValueError, match=r"typical_reference \('model'\) needs a place before the warpers"):
        generate(model, tokenizer, "a", typical, cache_implementation="paged")
    with pytest.raises(ValueError, match=r"logits_processor \(\[.*\]\) has no place in continuous batching"):
        generate(model, tokenizer, "a", DecodingConfig(), cache_implementation="paged", logits_processor=[User()])
