"""`generate()` for every row whose head is an encoder-decoder.

As for causal models, scores are compared beside tokens, of a float64 model.
"""

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from .cases import SEQ2SEQ_LM, build, close, make_inputs, name
from .test_generation import MODES, NEW, ROUNDING, Collector, generate, greedy_loop, same

every_row = pytest.mark.parametrize("row", SEQ2SEQ_LM, ids=name)
every_mode = pytest.mark.parametrize("mode", MODES)
MODELS = {}


def model_of(row):
    if row.model_type not in MODELS:
        MODELS[row.model_type] = build(
            row, "AutoModelForSeq2SeqLM", torch.float64, initializer_range=1.0
        )  # small weights answer one id
    return MODELS[row.model_type]


def source_of(model, batch=2, length=7, seed=0):
    """The encoder's input."""
    inputs = make_inputs(model, batch, length, seed=seed)
    return {key: value for key, value in inputs.items() if not key.startswith("decoder_")}


def repeated(source, times):
    return {key: value.repeat_interleave(times, 0) for key, value in source.items()}


def full_pass(model, source, sequences):
    with torch.no_grad():
        return model(**source, decoder_input_ids=sequences[:, :-1], use_cache=False).logits


@every_row
@every_mode
def test_cache_on_equals_cache_off(row, mode):
    model = model_of(row)
    source, count = source_of(model), MODES[mode].get("num_return_sequences", 1)
    with_cache = generate(model, **source, **MODES[mode])
    same(with_cache, generate(model, **source, use_cache=False, **MODES[mode]))
    assert with_cache.sequences.shape == (2 * count, 1 + NEW)
    assert (with_cache.sequences[:, 0] == model.config.decoder_start_token_id).all()
    assert with_cache.past_key_values.get_seq_length() == NEW


@every_row
def test_greedy_is_the_argmax_of_one_full_pass(row):
    model = model_of(row)
    source = source_of(model)
    output = generate(model, **source)
    logits = full_pass(model, source, output.sequences)
    close(torch.stack(output.logits, 1).double(), logits, atol=ROUNDING)
    allowed = logits.index_fill(-1, torch.tensor([model.generation_config.eos_token_id]), -torch.inf)
    assert torch.equal(output.sequences[:, 1:], allowed.argmax(-1))


@every_row
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_rows_of_a_batch_do_not_see_each_other(row, mode):
    model = model_of(row)
    source, count = source_of(model, batch=3), MODES[mode].get("num_return_sequences", 1)
    together = generate(model, **source, **MODES[mode]).sequences
    for index in range(3):
        alone = generate(model, **{key: value[index : index + 1] for key, value in source.items()}, **MODES[mode])
        assert alone.sequences.tolist() == together[index * count : (index + 1) * count].tolist()


@every_row
def test_one_beam_is_greedy(row):
    model = model_of(row)
    source = source_of(model)
    same(generate(model, **source, num_beams=1), generate(model, **source))


@every_row
def test_beam_scores_are_those_of_full_passes(row):
    """A beam that read another beam's state would have another score."""
    model = model_of(row)
    source = source_of(model)
    output = generate(model, **source, num_beams=4, num_return_sequences=4, length_penalty=0.0)
    logits = full_pass(model, repeated(source, 4), output.sequences).log_softmax(-1)
    want = logits.gather(-1, output.sequences[:, 1:, None]).sum((1, 2))
    close(output.sequences_scores.double(), want, atol=1e-5)  # beam scores are kept in float32
    for row_of_beams in output.sequences.tolist()[:4], output.sequences.tolist()[4:]:
        assert len(set(map(tuple, row_of_beams))) == 4


@every_row
def test_samples_of_one_input_are_those_of_the_repeated_input(row):
    model = model_of(row)
    source = source_of(model)
    many = generate(model, **source, do_sample=True, num_return_sequences=3)
    same(many, generate(model, **repeated(source, 3), do_sample=True))
    assert len(set(map(tuple, many.sequences.tolist()))) > 2


@every_row
@pytest.mark.parametrize("mode", ["greedy", "beam", "several samples"])
def test_starting_from_encoder_outputs(row, mode):
    model = model_of(row)
    source = source_of(model)
    with torch.no_grad():
        encoded = model.get_encoder()(**source)
    same(generate(model, encoder_outputs=encoded, **MODES[mode]), generate(model, **source, **MODES[mode]))


@every_row
@pytest.mark.parametrize("new", [1, 3])
def test_continuing_from_a_returned_cache(row, new):
    """A decoder takes further ids through its cache one by one or many at once; only those are passed."""
    model = model_of(row)
    source = source_of(model)
    ids = generate(model, **source).sequences
    with torch.no_grad():
        cache = model(**source, decoder_input_ids=ids[:, :-new], use_cache=True).past_key_values
        outputs = model(**source, decoder_input_ids=ids[:, -new:], past_key_values=cache, use_cache=True)
        want = model(**source, decoder_input_ids=ids, use_cache=False).logits
    close(outputs.logits, want[:, -new:], atol=1e-12)
    assert outputs.past_key_values.get_seq_length() == 1 + NEW


@every_row
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_begun_output_is_continued(row, mode):
    model = model_of(row)
    source = source_of(model)
    begun = generate(model, **source, do_sample=True).sequences[:, :4]
    got = generate(model, **source, decoder_input_ids=begun, **MODES[mode])
    same(got, generate(model, **source, decoder_input_ids=begun, use_cache=False, **MODES[mode]))
    assert got.sequences[:: MODES[mode].get("num_return_sequences", 1), :4].tolist() == begun.tolist()


@every_row
@pytest.mark.parametrize("kind", ["dynamic", "encoder-decoder"])
def test_a_users_cache_is_filled(row, kind):
    model = model_of(row)
    source, cache = source_of(model), DynamicCache()
    if kind == "encoder-decoder":
        cache = EncoderDecoderCache(cache, DynamicCache())
    same(generate(model, **source, past_key_values=cache), generate(model, **source))
    assert cache.get_seq_length() == NEW


@every_row
def test_rows_that_end_early_are_padded(row):
    model = model_of(row)
    output = model.generate(**source_of(model, batch=8), do_sample=True, max_new_tokens=12)
    end = model.config.eos_token_id
    lengths = []
    for tokens in output[:, 1:].tolist():
        lengths.append(tokens.index(end) if end in tokens else len(tokens))
        assert set(tokens[lengths[-1] + 1 :]) <= {model.config.pad_token_id}
    assert len(set(lengths)) > 1, "no row ended before another"


@every_row
def test_returned_dictionary(row):
    model = model_of(row)
    source = source_of(model)
    greedy = generate(model, **source, output_hidden_states=True, output_attentions=True)
    assert len(greedy.scores) == len(greedy.logits) == len(greedy.decoder_hidden_states) == NEW
    assert [states[-1].shape[:2] for states in greedy.decoder_hidden_states] == [(2, 1)] * NEW
    beam = generate(model, **source, num_beams=3)
    assert beam.beam_indices.shape == (2, NEW)
    scores = model.compute_transition_scores(beam.sequences, beam.scores, beam.beam_indices)
    close(scores.sum(1) / NEW, beam.sequences_scores, atol=1e-5)
    scores = model.compute_transition_scores(greedy.sequences, greedy.logits, normalize_logits=True)
    want = full_pass(model, source, greedy.sequences).log_softmax(-1).gather(-1, greedy.sequences[:, 1:, None])
    close(scores.double(), want.squeeze(-1), atol=1e-5)


@every_row
def test_streamer(row):
    model = model_of(row)
    collector, source = Collector(), source_of(model, batch=1)
    output = generate(model, **source, streamer=collector)
    assert collector.ended
    assert sum(collector.pieces, []) == output.sequences[0].tolist()


@every_row
def test_custom_generate_callable(row):
    model = model_of(row)
    options = {**source_of(model), "max_new_tokens": NEW, "min_new_tokens": NEW}
    got = model.generate(**options, custom_generate=greedy_loop)
    assert got.tolist() == model.generate(**options).tolist()
    second = model.generate(**options, custom_generate=greedy_loop, shift=1)
    assert (second[:, 1] != got[:, 1]).all()


@every_row
@pytest.mark.parametrize("implementation", ["static", "offloaded_static", "quantized", "offloaded"])
def test_cache_implementations_that_make_no_sense_are_refused_by_name(row, implementation):
    model = model_of(row)
    with pytest.raises(
        ValueError, match=rf"cache_implementation \('{implementation}'\) is not available for {type(model).__name__}"
    ):
        generate(model, **source_of(model), cache_implementation=implementation)


@every_row
@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_decoding_that_rolls_back_is_refused_by_name(row, helper):
    model = model_of(row)
    value = model if helper == "assistant_model" else 2
    with pytest.raises(ValueError, match=rf"not supported with stateful models, such as {type(model).__name__}"):
        generate(model, **source_of(model, batch=1), **{helper: value})


@every_row
def test_compiled_forward_generates_the_same(row):
    model = build(row, "AutoModelForSeq2SeqLM", torch.float64)
    source = source_of(model)
    want = generate(model, **source)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    same(generate(model, **source), want)


@every_row
def test_half_precision_generates(row):
    model = build(row, "AutoModelForSeq2SeqLM").to(torch.bfloat16)
    output = generate(model, **source_of(model))
    assert output.sequences.shape == (2, 1 + NEW)
    assert all(logits.dtype == torch.float32 and logits.isfinite().all() for logits in output.logits)
