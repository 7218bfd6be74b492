"""`generate()` for every row with a causal language model head.

Equality of tokens alone would hide a slightly wrong state, so scores are compared too, of a float64 model (its scores
are rounded to float32 by generate()).
"""

import pytest
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from .cases import CAUSAL_LM, build, close, make_inputs, name

NEW = 6
ROUNDING = 2e-6  # of scores around 10 in float32
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"do_sample": True, "num_beams": 3, "num_return_sequences": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}
every_row = pytest.mark.parametrize("row", CAUSAL_LM, ids=name)
recurrent_rows = pytest.mark.parametrize("row", [row for row in CAUSAL_LM if row.recurrent], ids=name)
every_mode = pytest.mark.parametrize("mode", MODES)
MODELS = {}


def model_of(row):
    if row.model_type not in MODELS:
        MODELS[row.model_type] = build(row, "AutoModelForCausalLM", dtype=torch.float64)
    return MODELS[row.model_type]


def generate(model, *inputs, seed=0, **options):
    """A fixed number of new tokens, with every by-product that generate() can return."""
    torch.manual_seed(seed)
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    return model.generate(*inputs, **lengths | wanted | options)


def ids_of(model, batch=2, length=7, seed=0):
    return make_inputs(model, batch, length, seed=seed)["input_ids"]


def same(got, want, *, new_only=False):
    """Same new tokens from the same scores; the prompts may differ (padding) with `new_only`."""
    begin = -NEW if new_only else 0
    assert got.sequences[:, begin:].tolist() == want.sequences[:, begin:].tolist()
    for step, (left, right) in enumerate(zip(got.scores, want.scores, strict=True)):
        finite = right.isfinite()
        assert torch.equal(left.isfinite(), finite), f"step {step}"
        close(left[finite], right[finite], atol=ROUNDING)


@every_row
@every_mode
def test_cache_on_equals_cache_off(row, mode):
    model = model_of(row)
    ids = ids_of(model)
    with_cache = generate(model, ids, **MODES[mode])
    same(with_cache, generate(model, ids, use_cache=False, **MODES[mode]))
    assert with_cache.sequences.shape == (2 * MODES[mode].get("num_return_sequences", 1), 7 + NEW)
    assert torch.equal(with_cache.sequences[:: MODES[mode].get("num_return_sequences", 1), :7], ids)


@every_row
@every_mode
def test_left_padding_equals_unpadded(row, mode):
    if MODES[mode]["do_sample"]:
        # the random numbers of a batch depend on its size, so a row must be compared inside an equal batch
        check_left_padding_of_equal_rows(model_of(row), MODES[mode])
        return
    model, count = model_of(row), MODES[mode].get("num_return_sequences", 1)
    ids, mask = ids_of(model), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    padded = generate(model, ids, attention_mask=mask, **MODES[mode])
    for index, begin in ((0, 3), (1, 0)):
        alone = generate(model, ids[index : index + 1, begin:], **MODES[mode])
        assert (
            padded.sequences[index * count : (index + 1) * count, -NEW:].tolist() == alone.sequences[:, -NEW:].tolist()
        )
        if "num_beams" in MODES[mode]:
            close(padded.sequences_scores[index * count : (index + 1) * count], alone.sequences_scores, atol=ROUNDING)


def check_left_padding_of_equal_rows(model, options):
    ids = ids_of(model)
    padding = torch.full((2, 3), model.config.pad_token_id)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], 1)
    padded = generate(model, torch.cat([padding, ids], 1), attention_mask=mask, **options)
    same(padded, generate(model, ids, **options), new_only=True)


@every_row
def test_left_padding_equals_unpadded_without_cache(row):
    model = model_of(row)
    ids, mask = ids_of(model), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    same(generate(model, ids, attention_mask=mask, use_cache=False), generate(model, ids, attention_mask=mask))


@every_row
def test_greedy_is_the_argmax_of_full_passes(row):
    model = model_of(row)
    output = generate(model, ids_of(model))
    with torch.no_grad():
        logits = model(output.sequences[:, :-1], use_cache=False).logits[:, -NEW:]
    close(torch.stack(output.logits, 1), logits, atol=ROUNDING)
    eos = model.generation_config.eos_token_id
    allowed = logits if eos is None else logits.index_fill(-1, torch.tensor(eos).reshape(-1), -torch.inf)
    assert torch.equal(output.sequences[:, -NEW:], allowed.argmax(-1))


@every_row
def test_beam_scores_are_those_of_full_passes(row):
    """A beam that read another beam's state would have another score."""
    model = model_of(row)
    output = generate(model, ids_of(model), num_beams=4, num_return_sequences=4, length_penalty=0.0)
    with torch.no_grad():
        logits = model(output.sequences[:, :-1], use_cache=False).logits[:, -NEW:].log_softmax(-1)
    want = logits.gather(-1, output.sequences[:, -NEW:, None]).sum((1, 2))
    close(output.sequences_scores.double(), want, atol=1e-5)  # beam scores are kept in float32
    assert len(set(map(tuple, output.sequences.tolist()))) == len(output.sequences)


@every_row
def test_samples_of_one_prompt_are_those_of_the_repeated_prompt(row):
    model = model_of(row)
    ids = ids_of(model)
    many = generate(model, ids, do_sample=True, num_return_sequences=3)
    same(many, generate(model, ids.repeat_interleave(3, 0), do_sample=True))
    assert len(set(map(tuple, many.sequences.tolist()))) > 2


@every_row
@pytest.mark.parametrize("mode", ["greedy", "beam", "several samples"])
def test_starting_from_embeddings(row, mode):
    model = model_of(row)
    ids = ids_of(model)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    embeds = model.get_input_embeddings()(ids)
    got = generate(model, inputs_embeds=embeds, attention_mask=mask, **MODES[mode])
    assert got.sequences.shape[1] == NEW  # there are no ids to repeat
    same(got, generate(model, ids, attention_mask=mask, **MODES[mode]), new_only=True)


@every_row
@pytest.mark.parametrize("more", [0, 1, 5])
@pytest.mark.parametrize("padding", [0, 3])
def test_continuing_from_a_returned_cache(row, more, padding):
    """With nothing new (only the last token is not in the cache yet), with one further token, with many."""
    model = model_of(row)
    ids, mask = ids_of(model), torch.ones(2, 7, dtype=torch.long)
    mask[0, :padding] = 0
    first = generate(model, ids, attention_mask=mask)
    assert first.past_key_values.get_seq_length() == 7 + NEW - 1
    longer = torch.cat([first.sequences, ids_of(model, length=more, seed=3)], 1)
    longer_mask = torch.cat([mask, torch.ones(2, NEW + more, dtype=torch.long)], 1)
    want = generate(model, longer, attention_mask=longer_mask)
    forwards = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: forwards.append(args[0].shape[1]))
    same(generate(model, longer, attention_mask=longer_mask, past_key_values=first.past_key_values), want)
    hook.remove()
    assert forwards == [1 + more] + [1] * (NEW - 1), "the cached part was read again"


@every_row
def test_a_cache_that_is_continued_twice_needs_a_copy_and_a_copy_is_enough(row):
    import copy

    model = model_of(row)
    first = generate(model, ids_of(model))
    kept = copy.deepcopy(first.past_key_values)
    once = generate(model, first.sequences, past_key_values=first.past_key_values)
    same(generate(model, first.sequences, past_key_values=kept), once)


@every_row
def test_a_users_dynamic_cache_is_filled(row):
    model = model_of(row)
    cache, ids = DynamicCache(), ids_of(model)
    same(generate(model, ids, past_key_values=cache), generate(model, ids))
    assert cache.get_seq_length() == 7 + NEW - 1


@every_row
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunked_prefill(row, chunk):
    model = model_of(row)
    ids, mask = ids_of(model), torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    got = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    same(got, generate(model, ids, attention_mask=mask))


@every_row
def test_rows_that_end_early_are_padded(row):
    model = model_of(row)
    free = ids = ids_of(model, batch=3)
    with torch.no_grad():
        for _ in range(NEW):
            free = torch.cat([free, model(free, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    end = free[0, 9].item()  # row 0 ends at its third new token, or before
    got = model.generate(ids, max_new_tokens=NEW, eos_token_id=end).tolist()
    for mine, tokens in zip(got, free.tolist(), strict=True):
        length = tokens.index(end, 7) + 1 if end in tokens[7:] else len(tokens)
        assert mine[:length] == tokens[:length]
        assert set(mine[length:]) <= {model.config.pad_token_id}


@every_row
def test_returned_dictionary(row):
    model = model_of(row)
    greedy = generate(model, ids_of(model), output_hidden_states=True)
    assert len(greedy.scores) == len(greedy.logits) == len(greedy.hidden_states) == NEW
    assert all(logits.shape == (2, model.config.vocab_size) for logits in greedy.logits)
    assert [states[-1].shape[1] for states in greedy.hidden_states] == [7] + [1] * (NEW - 1)
    beam = generate(model, ids_of(model), num_beams=3)
    assert beam.beam_indices.shape == (2, NEW)
    close(model.compute_transition_scores(beam.sequences, beam.scores, beam.beam_indices).sum(1) / NEW,
          beam.sequences_scores, atol=1e-5)  # fmt: skip


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1).tolist())

    def end(self):
        self.ended = True


@every_row
def test_streamer(row):
    model = model_of(row)
    collector, ids = Collector(), ids_of(model, batch=1)
    output = generate(model, ids, streamer=collector)
    assert collector.ended
    assert collector.pieces[0] == ids[0].tolist()
    assert [len(piece) for piece in collector.pieces[1:]] == [1] * NEW
    assert sum(collector.pieces, []) == output.sequences[0].tolist()


def greedy_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, shift=0, **model_kwargs):
    """A decoding loop of a user: greedy, `shift` ranks below the best token."""
    while True:  # the start of an encoder-decoder may be the token that ends
        outputs = model(**model.prepare_inputs_for_generation(input_ids, **model_kwargs))
        scores = logits_processor(input_ids, outputs.logits[:, -1])
        token = scores.topk(shift + 1).indices[:, -1:]
        input_ids = torch.cat([input_ids, token], 1)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        model_kwargs["next_sequence_length"] = 1
        if stopping_criteria(input_ids, None).all():
            return input_ids


@every_row
def test_custom_generate_callable(row):
    model = model_of(row)
    ids, mask = ids_of(model), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": NEW, "min_new_tokens": NEW}
    got = model.generate(ids, custom_generate=greedy_loop, **options)
    assert got.tolist() == model.generate(ids, **options).tolist()
    second = model.generate(ids, custom_generate=greedy_loop, shift=1, **options)
    assert (second[:, 7] != got[:, 7]).all()


@recurrent_rows
@pytest.mark.parametrize("implementation", ["static", "offloaded_static", "quantized", "offloaded"])
def test_cache_implementations_that_make_no_sense_are_refused_by_name(row, implementation):
    model = model_of(row)
    with pytest.raises(
        ValueError, match=rf"cache_implementation \('{implementation}'\) is not available for {type(model).__name__}"
    ):
        generate(model, ids_of(model), cache_implementation=implementation)


@recurrent_rows
@pytest.mark.parametrize("helper", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"])
def test_decoding_that_rolls_back_is_refused_by_name(row, helper):
    model = model_of(row)
    value = model if helper == "assistant_model" else 2
    with pytest.raises(ValueError, match=rf"not supported with stateful models, such as {type(model).__name__}"):
        generate(model, ids_of(model, batch=1), **{helper: value})


@every_row
def test_compiled_forward_generates_the_same(row):
    model = build(row, "AutoModelForCausalLM", dtype=torch.float64)
    ids = ids_of(model)
    want = generate(model, ids)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True)
    same(generate(model, ids), want)


@every_row
def test_half_precision_generates(row):
    model = build(row, "AutoModelForCausalLM").to(torch.bfloat16)
    output = generate(model, ids_of(model))
    assert output.sequences.shape == (2, 7 + NEW)
    assert all(logits.isfinite().all() for logits in output.logits)
