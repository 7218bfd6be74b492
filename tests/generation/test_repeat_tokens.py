"""Token level: copies, padding, lengths, streams; with times=1 nothing differs from stock generate()."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    Mamba2Config,
    Mamba2ForCausalLM,
    MaxLengthCriteria,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from undersong.generation.repeat_tokens import ReadTwice, repeat_input_ids
from undersong.modeling.aaren.configuration_aaren import AarenConfig
from undersong.modeling.aaren.modeling_aaren import AarenForCausalLM

from .tiny_llama import left_padded, tiny_llama

ROWS = [[1, 11, 12, 13, 14, 40], [1, 20, 21, 22, 40, 41, 42, 43, 44], [30, 31, 40]]
SPANS = [(1, 5), (1, 4), (0, 2)]
PLACES = {"context_start": torch.tensor([a for a, _ in SPANS]), "context_end": torch.tensor([b for _, b in SPANS])}
GREEDY = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}


def tiny_mamba2():
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=64, hidden_size=16, expand=2, num_heads=4, head_dim=8, state_size=4, n_groups=1,
        num_hidden_layers=2, chunk_size=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = Mamba2ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


def tiny_aaren():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AarenForCausalLM(AarenConfig(**sizes, initializer_range=0.3, max_position_embeddings=16)).eval()
    model.generation_config.eos_token_id = None
    return model


MODELS = {"llama": tiny_llama, "mamba2": tiny_mamba2, "aaren": tiny_aaren}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def doubled(separator=(), times=2):
    return [repeat_input_ids(row, span, times, separator) for row, span in zip(ROWS, SPANS, strict=True)]


def test_repeat_input_ids():
    ids = [5, 6, 7, 8]
    assert repeat_input_ids(ids, (1, 3), 3, [0]) == [5, 6, 7, 0, 6, 7, 0, 6, 7, 8]
    assert repeat_input_ids(ids, (0, 4), 1, [0]) == ids
    tensor = repeat_input_ids(torch.tensor(ids, dtype=torch.int32), (2, 4), separator=[9])
    assert tensor.tolist() == [5, 6, 7, 8, 9, 7, 8]
    assert tensor.dtype == torch.int32
    assert ids == [5, 6, 7, 8]


@pytest.mark.parametrize("span", [(1, 1), (-1, 2), (2, 5), (3, 1)])
def test_repeat_input_ids_refuses_spans_outside(span):
    with pytest.raises(ValueError, match=r"span \({}, {}\) must satisfy 0 <= start < end <= 4".format(*span)):
        repeat_input_ids([5, 6, 7, 8], span)
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        repeat_input_ids([5, 6, 7, 8], (0, 1), 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"repetition_penalty": 1.3, "min_new_tokens": 3, "eos_token_id": 5},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_once_is_stock_generate_bit_for_bit(model, options):
    options = GREEDY | options
    for span in ({}, PLACES):
        torch.manual_seed(1)
        stock = model.generate(**left_padded(ROWS), **options)
        torch.manual_seed(1)
        ours = model.generate(**left_padded(ROWS), **options, custom_generate=ReadTwice(times=1), **span)
        if "output_scores" in options:
            assert torch.equal(torch.stack(ours.scores), torch.stack(stock.scores))
            stock, ours = stock.sequences, ours.sequences
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize("separator", [(), (9, 8)], ids=["plain", "separator"])
@pytest.mark.parametrize("times", [2, 3])
def test_equals_stock_generate_on_the_longer_prompts(model, times, separator, strip):
    longer = left_padded(doubled(separator, times))
    want = model.generate(**longer, **GREEDY)
    method = ReadTwice(times, separator, strip_repeat=strip)
    got = model.generate(**left_padded(ROWS), **GREEDY, custom_generate=method, **PLACES)
    prompt = left_padded(ROWS)["input_ids"] if strip else longer["input_ids"]
    assert torch.equal(got, torch.cat([prompt, want[:, -7:]], 1))


def test_a_row_of_a_batch_is_the_row_alone(model):
    together = model.generate(**left_padded(ROWS), **GREEDY, custom_generate=ReadTwice(strip_repeat=True), **PLACES)
    for index, (row, (start, end)) in enumerate(zip(ROWS, SPANS, strict=True)):
        own = {"context_start": start, "context_end": end}
        alone = model.generate(torch.tensor([row]), **GREEDY, custom_generate=ReadTwice(strip_repeat=True), **own)
        assert torch.equal(together[index, -len(row) - 7 :], alone[0])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 1, "length_penalty": 0.5, "early_stopping": True, "eos_token_id": 5},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=["beams", "early beams", "samples", "beam samples"],
)
@pytest.mark.parametrize("strip", [False, True])
def test_beams_and_samples(options, strip):
    model, options = tiny_llama(), GREEDY | options
    longer, count = left_padded(doubled()), options["num_return_sequences"]
    torch.manual_seed(2)
    want = model.generate(**longer, **options)
    torch.manual_seed(2)
    got = model.generate(**left_padded(ROWS), **options, custom_generate=ReadTwice(strip_repeat=strip), **PLACES)
    prompt = (
        left_padded(ROWS)["input_ids"].repeat_interleave(count, 0)
        if strip
        else want[:, : longer["input_ids"].shape[1]]
    )
    assert torch.equal(got, torch.cat([prompt, want[:, longer["input_ids"].shape[1] :]], 1))


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 4},
        {"begin_suppress_tokens": [7, 8, 9, *range(20, 60)]},
        {"exponential_decay_length_penalty": (2, 1000.0), "eos_token_id": 5},
        {"forced_eos_token_id": 5, "eos_token_id": 5},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_processors_that_count_from_the_prompts_beginning(options):
    model = tiny_llama()
    # a token that greedy decoding picks first, so that ending and forbidding it matter
    first = int(model.generate(**left_padded(doubled()[:1]), **GREEDY)[0, -7])
    options = GREEDY | {"eos_token_id": [first, 5]} | options
    row, own = left_padded(ROWS[:1]), {"context_start": SPANS[0][0], "context_end": SPANS[0][1]}
    longer = doubled()[0]
    want = model.generate(torch.tensor([longer]), **options)[0, len(longer) :]
    got = model.generate(**row, **options, custom_generate=ReadTwice(strip_repeat=True), **own)[0, len(ROWS[0]) :]
    assert got.tolist() == want.tolist()


def test_length_objects_of_the_caller_move_as_copies():
    model = tiny_llama()
    criterion = MaxLengthCriteria(max_length=len(ROWS[0]) + 3)
    processor = MinNewTokensLengthLogitsProcessor(len(ROWS[0]), 2, [5])
    output = model.generate(
        torch.tensor(ROWS[:1]), do_sample=False, max_new_tokens=9, pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([criterion]), logits_processor=LogitsProcessorList([processor]),
        custom_generate=ReadTwice(span=SPANS[0]),
    )  # fmt: skip
    assert output.shape[1] == len(doubled()[0]) + 3
    assert criterion.max_length == len(ROWS[0]) + 3
    assert processor.prompt_length_to_skip == len(ROWS[0])


def test_stop_criteria_end_the_continuation():
    class After(StoppingCriteriaList):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full(input_ids.shape[:1], input_ids.shape[1] >= len(doubled()[0]) + 2, dtype=torch.bool)

    output = tiny_llama().generate(
        torch.tensor(ROWS[:1]), **GREEDY, stopping_criteria=[After()], custom_generate=ReadTwice(span=SPANS[0])
    )
    assert output.shape[1] == len(doubled()[0]) + 2


def test_dict_output_keeps_scores_and_strips_sequences():
    model, options = tiny_llama(), GREEDY | {"return_dict_in_generate": True, "output_scores": True}
    want = model.generate(**left_padded(doubled()), **options)
    got = model.generate(**left_padded(ROWS), **options, custom_generate=ReadTwice(strip_repeat=True), **PLACES)
    assert torch.equal(torch.stack(got.scores), torch.stack(want.scores))
    assert torch.equal(got.sequences[:, :9], left_padded(ROWS)["input_ids"])
    assert torch.equal(got.sequences[:, 9:], want.sequences[:, -7:])


class Recorder(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], 0

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("strip", [False, True])
def test_streamer_gets_the_returned_prompt_every_token_and_the_end(times, strip):
    streamer = Recorder()
    method = ReadTwice(times, strip_repeat=strip, streamer=streamer, span=SPANS[0])
    output = tiny_llama().generate(torch.tensor(ROWS[:1]), **GREEDY, custom_generate=method)
    assert streamer.puts[0] == output[:, :-7].tolist()
    assert [token for put in streamer.puts[1:] for token in put] == output[0, -7:].tolist()
    assert streamer.ended == 1


def test_constructor_span_serves_every_row_and_is_overridden():
    model, rows = tiny_llama(), [ROWS[0], ROWS[1][:6]]
    want = model.generate(torch.tensor([repeat_input_ids(row, (1, 3)) for row in rows]), **GREEDY)
    assert torch.equal(model.generate(torch.tensor(rows), **GREEDY, custom_generate=ReadTwice(span=(1, 3))), want)
    method = ReadTwice(span=(0, 6))
    assert torch.equal(
        model.generate(torch.tensor(rows), **GREEDY, custom_generate=method, context_start=1, context_end=3), want
    )


def test_no_cache_and_a_callers_empty_cache():
    model, method = tiny_llama(), ReadTwice(span=SPANS[0])
    ids = torch.tensor(ROWS[:1])
    want = model.generate(ids, **GREEDY, custom_generate=method)
    assert torch.equal(model.generate(ids, **GREEDY, use_cache=False, custom_generate=method), want)
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, **GREEDY, past_key_values=cache, custom_generate=method), want)
    assert cache.get_seq_length() == want.shape[1] - 1


def test_positions_limit_counts_the_longer_prompt_and_the_new_tokens():
    model = tiny_llama()  # 256 positions
    ids = torch.arange(100)[None] % 60 + 3
    ends = {"context_start": 0, "context_end": 90}
    output = model.generate(ids, max_new_tokens=66, do_sample=False, custom_generate=ReadTwice(), **ends)
    assert output.shape[1] == 256
    message = r"document 2 times \(190 tokens\) and max_new_tokens \(67\) must fit max_position_embeddings \(256\)"
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=67, do_sample=False, custom_generate=ReadTwice(), **ends)
    # sines have no limit, whatever max_position_embeddings says
    output = tiny_aaren().generate(ids, max_new_tokens=1, do_sample=False, custom_generate=ReadTwice(), **ends)
    assert output.shape[1] == 191


def call(**options):
    model, method = tiny_llama(), options.pop("method", ReadTwice())
    return model.generate(**(GREEDY | left_padded(ROWS) | options), custom_generate=method)


def right_padded():
    mask = left_padded(ROWS)["attention_mask"].flip(1)
    return {"attention_mask": mask, **PLACES}


def filled_cache():
    model, cache = tiny_llama(), DynamicCache()
    model(torch.tensor([[5, 6]] * 3), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"ReadTwice needs the document's place; pass context_start= and context_end="),
        ({"context_start": 1}, "context_start and context_end must be given together"),
        ({"context_start": 1, "context_end": 4}, r"span \(1, 4\) must satisfy 0 <= start < end <= 3"),
        ({"context_start": [1, 1], "context_end": 2}, "context_start has 2 entries but there are 3 prompts"),
        (right_padded(), "attention_mask must pad on the left only"),
        (PLACES | {"position_ids": torch.arange(9).repeat(3, 1)}, "position_ids cannot be given"),
        (PLACES | {"past_key_values": filled_cache()}, "past_key_values already holds tokens"),
        (PLACES | {"cache_implementation": "static"}, r"past_key_values \(StaticCache\) was sized for the prompt"),
        (PLACES | {"inputs_embeds": torch.zeros(3, 9, 32)}, "inputs_embeds has an entry per token"),
        (PLACES | {"num_beams": 2, "method": ReadTwice(streamer=Recorder())}, r"cannot follow num_beams \(2\)"),
        (PLACES | {"prompt_lookup_num_tokens": 2}, "cannot run assisted_generation; use greedy search, sampling or"),
        (PLACES | {"context_stop": 4}, "context_stop"),  # a misspelt option is not swallowed
    ],
    ids=lambda x: x[:30] if isinstance(x, str) else "",
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*right-padding was detected")
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_refuses_encoder_decoders():
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 1, "vocab_size": 9}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=1, custom_generate=ReadTwice(span=(0, 1)))


def test_refuses_zero_times():
    with pytest.raises(ValueError, match=r"times \(0\) must be at least 1"):
        ReadTwice(times=0)
