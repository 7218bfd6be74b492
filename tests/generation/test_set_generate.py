"""What a model writes after a set does not depend on the order of its members."""

import functools
import itertools
import queue

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from undersong.generation.set_generate import SetBasedGenerate, set_prefill
from undersong.generation.set_prompt import SetPrompt

from .letters import letter_tokenizer
from .tiny_models import FAMILIES, VOCAB, tiny_model

TOKENIZER = letter_tokenizer()
OPTIONS = ["abc", "d", "ef", "ghij"]
ORDERS = list(itertools.permutations(OPTIONS))
NESTED = ["ab", [["c", ["dd", "e"], "f"], "ghi"], "jk", ["lmn", "o"], "pq"]


def encode(*prompts, **options):
    return SetPrompt.encode(TOKENIZER, [SetPrompt(p) if isinstance(p, list) else p for p in prompts], **options)


def with_options(options, **settings):
    return encode(["what", options, " is"], **settings)


def write(model, encoding, method=None, **options):
    options = {"max_new_tokens": 6, "do_sample": False} | options
    return model.generate(**encoding.generate_kwargs(), custom_generate=method or SetBasedGenerate(), **options)


def scored(model, encoding, **options):
    out = write(model, encoding, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.scores), torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_orders_agree(family):
    model = tiny_model(family)
    with torch.no_grad():
        runs = [with_options(order, canonicalize=False) for order in ORDERS]
        one_pass = torch.cat([model(**e.to_forward_kwargs(model)).logits[:, -3:] for e in runs])
        cached = torch.cat([set_prefill(model, e)[1] for e in runs])
    texts = {tuple(write(model, e)[0, -6:].tolist()) for e in runs[::5]}
    assert len({tuple(e.input_ids[0].tolist()) for e in runs}) == 24
    assert (one_pass - one_pass[0]).abs().max() < 1e-5
    assert (cached - one_pass[0, -1]).abs().max() < 1e-5
    assert len(texts) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_layout_makes_all_orders_bitwise_equal(family):
    model = tiny_model(family)
    first = scored(model, with_options(ORDERS[0]))
    for order in ORDERS[1:]:
        for got, want in zip(scored(model, with_options(order)), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_sampled_sequences_and_beams_are_bitwise_equal_too(options):
    model = tiny_model("llama")
    runs = []
    for order in ORDERS[::7]:
        torch.manual_seed(0)
        runs.append(scored(model, with_options(order), **options))
    assert runs[0][0].shape[0] == options.get("num_return_sequences", 1)
    for run in runs[1:]:
        assert all(torch.equal(got, want) for got, want in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_member_does_not_feel_its_siblings(family):
    model = tiny_model(family)
    states = []
    for sibling in ("d", "zzzzz"):
        encoding = with_options(["abc", sibling], canonicalize=False)
        with torch.no_grad():
            layers = model(**encoding.to_forward_kwargs(model), output_hidden_states=True).hidden_states
        ((start, end), _) = encoding.member_spans(0)
        states.append(torch.stack(layers)[:, :, start:end])
    assert (states[0] - states[1]).abs().max() < 1e-5
    plain = with_options(["abc", "d"], edit_attention=False, edit_position=False, canonicalize=False)
    swapped = with_options(["d", "abc"], edit_attention=False, edit_position=False, canonicalize=False)
    with torch.no_grad():
        logits = [model(**e.to_forward_kwargs(model)).logits[:, -1] for e in (plain, swapped)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2, "a plain prompt does feel the order, or this tests nothing"


@pytest.mark.parametrize("half", ["edit_position", "edit_attention"])
def test_half_of_the_method_is_not_enough(half):
    model = tiny_model("llama")
    orders = [with_options(order, canonicalize=False, **{half: False}) for order in (OPTIONS, OPTIONS[::-1])]
    with torch.no_grad():
        first, second = (set_prefill(model, e)[1] for e in orders)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 2}])
@pytest.mark.parametrize("parts", [["what is"], ["what", ["abc"], " is"], ["w", [["a", ["b"], "c"]], "i"]])
def test_without_a_choice_it_is_stock_generate(parts, options):
    model = tiny_model("qwen3")
    encoding = encode(parts, "x")
    stock = {"input_ids": encoding.input_ids, "attention_mask": encoding.attention_mask}
    options = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True} | options
    torch.manual_seed(0)
    want = model.generate(**stock, **options)
    torch.manual_seed(0)
    got = model.generate(**encoding.generate_kwargs(), custom_generate=SetBasedGenerate(), **options)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.scores), torch.stack(want.scores))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_one_by_one(family):
    model = tiny_model(family)
    prompts = [NESTED, ["what", OPTIONS, " is"], "no set"]
    together = scored(model, encode(*prompts))
    for row, prompt in enumerate(prompts):
        alone = scored(model, encode(prompt))
        assert torch.equal(together[0][row, -6:], alone[0][0, -6:])
        assert (together[2][:, row] - alone[2][:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_reading_everything_anew(family):
    model = tiny_model(family)
    sequences, _, logits = scored(model, encode(NESTED))
    for step in range(6):
        longer = encode([*NESTED[:-1], NESTED[-1] + "a" * step])
        arguments = longer.to_forward_kwargs(model)
        arguments["input_ids"] = sequences[:, : longer.input_ids.shape[1]]
        with torch.no_grad():
            want = model(**arguments).logits[0, -1]
        assert (logits[step, 0] - want).abs().max() < 1e-5


def test_set_prefill_serves_a_loop_of_ones_own():
    model = tiny_model("gpt_neox")
    encoding = encode(NESTED, ["what", OPTIONS, " is"])
    cache, logits, position = set_prefill(model, encoding)
    assert position.tolist() == [encoding.position_ids[row, -1] + 1 for row in range(2)]
    mask, written = encoding.attention_mask, []
    with torch.no_grad():
        for _ in range(6):
            written.append(logits.argmax(-1))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            arguments = {"attention_mask": mask, "position_ids": position[:, None], "past_key_values": cache}
            logits, position = model(written[-1][:, None], **arguments).logits[:, -1], position + 1
    assert torch.equal(torch.stack(written, 1), write(model, encoding)[:, -6:])


def test_beams_and_sequences_of_one_prompt_read_it_once(monkeypatch):
    model = tiny_model("llama")
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: seen.append(kw["input_ids"].shape) or forward(**kw))
    monkeypatch.setattr("undersong.generation.set_generate.check_custom_attention", lambda model: None)
    monkeypatch.setattr("undersong.generation.masks.check_custom_attention", lambda model: None)
    encoding = with_options(OPTIONS)
    write(model, encoding, num_beams=3)
    write(model, encoding, num_return_sequences=2, do_sample=True)
    length = encoding.input_ids.shape[1]
    assert seen == [(1, length), *[(3, 1)] * 5, (1, length), *[(2, 1)] * 5]


def test_beams_equal_scores_of_their_texts():
    model = tiny_model("mistral")
    encoding = encode(NESTED)
    out = write(model, encoding, num_beams=4, num_return_sequences=4, return_dict_in_generate=True, output_scores=True)
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        new = sequence[-6:]
        whole = encode([*NESTED[:-1], NESTED[-1] + "a" * 6])
        with torch.no_grad():
            logits = model(**(whole.to_forward_kwargs(model) | {"input_ids": sequence[None]})).logits[0, -7:-1]
        want = logits.log_softmax(-1).gather(1, new[:, None]).sum() / 6
        assert abs(want - score) < 1e-5


def test_physical_positions_go_on_from_the_number_of_tokens(monkeypatch):
    model = tiny_model("llama")
    encoding = with_options(OPTIONS)
    for name, first in (("logical", encoding.position_ids[0, -1] + 1), ("physical", encoding.input_ids.shape[1])):
        seen = []
        hook = model.register_forward_pre_hook(lambda _, a, kw, s=seen: s.append(kw["position_ids"]), with_kwargs=True)
        write(model, encoding, SetBasedGenerate(decode_positions=name), max_new_tokens=3)
        hook.remove()
        assert torch.equal(seen[0], encoding.position_ids)
        assert [int(p) for p in seen[1:]] == [first, first + 1]


class Prefer(LogitsProcessor):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([self.token]), 100.0)


class StopAt(torch.nn.Module):
    def __init__(self, length):
        super().__init__()
        self.length = length

    def forward(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_processors_and_stopping_criteria_act():
    model, encoding = tiny_model("llama"), with_options(OPTIONS)
    length = encoding.input_ids.shape[1]
    out = write(
        model,
        encoding,
        logits_processor=LogitsProcessorList([Prefer(7)]),
        stopping_criteria=StoppingCriteriaList([StopAt(length + 4)]),
        max_new_tokens=20,
    )
    assert out[0, length:].tolist() == [7] * 4
    ended = write(model, encoding, logits_processor=[Prefer(9)], eos_token_id=9, max_new_tokens=20)
    assert ended[0, length:].tolist() == [9]


class Streamer:
    def __init__(self):
        self.got = queue.SimpleQueue()

    def put(self, value):
        self.got.put(value.flatten().tolist())

    def end(self):
        self.got.put("end")


@pytest.mark.parametrize("options", [OPTIONS, ["abc"]])
def test_the_streamer_gets_every_token_and_the_end(options):
    model, streamer = tiny_model("llama"), Streamer()
    encoding = with_options(options)
    out = write(model, encoding, SetBasedGenerate(streamer=streamer))
    got = [streamer.got.get_nowait() for _ in range(8)]
    assert got[0] == encoding.input_ids[0].tolist()
    assert [token for put in got[1:-1] for token in put] == out[0, -6:].tolist()
    assert got[-1] == "end"
    assert streamer.got.empty()


def test_hidden_states_and_attentions_have_stock_shapes():
    model = tiny_model("llama", attention="eager")
    encoding = with_options(OPTIONS)
    length = encoding.input_ids.shape[1]
    options = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    out = write(model, encoding, num_return_sequences=2, do_sample=True, **options)
    assert out.hidden_states[0][-1].shape == (2, length, 32)
    assert out.attentions[0][0].shape == (2, 4, length, length)
    assert out.attentions[1][0].shape == (2, 4, 1, length + 1)


def test_two_calls_share_nothing():
    model, method = tiny_model("llama"), SetBasedGenerate()
    first = write(model, with_options(OPTIONS), method)
    write(model, encode(NESTED), method, num_beams=2)
    assert torch.equal(write(model, with_options(OPTIONS), method), first)
    assert "_prefill" not in vars(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_is_on_the_text_after_the_sets_and_has_gradients(family):
    model = tiny_model(family)
    encoding = encode(NESTED, "no set")
    arguments = encoding.to_forward_kwargs(model, labels=True)
    labels = arguments["labels"]
    assert (labels[0] >= 0).sum() == len("pq") - 1
    assert labels[0, -1] == encoding.input_ids[0, -1]
    assert (labels[1] >= 0).sum() == len("no set") - 1
    out = model(**arguments)
    out.loss.backward()
    logp = out.logits.log_softmax(-1)
    want = torch.stack([-logp[r, i - 1, labels[r, i]] for r, i in (labels >= 0).nonzero().tolist()]).mean()
    assert abs(want - out.loss) < 1e-5
    embedding = model.get_input_embeddings().weight
    assert embedding.grad[encoding.input_ids[0, :-1]].abs().sum(1).gt(0).all(), "every token read matters"


def test_windows_hold_by_position_or_are_refused():
    free, windowed = tiny_model("gemma3_text"), tiny_model("gemma3_text", sliding_window=8)
    windowed.load_state_dict(free.state_dict())
    orders = [encode(["a", order, "z"], canonicalize=False) for order in (OPTIONS, OPTIONS[::-1])]
    assert orders[0].input_ids.shape[1] > 8 > orders[0].position_ids.max(), "long, but near by position"
    with torch.no_grad():
        a, b = (windowed(**e.to_forward_kwargs(windowed)).logits[:, -1] for e in orders)
        want = free(**orders[0].to_forward_kwargs(free)).logits[:, -1]
    assert (a - b).abs().max() < 1e-5
    assert (a - want).abs().max() < 1e-5
    with pytest.raises(ValueError, match="come to 12, but Gemma3ForCausalLM has layers that keep the last 8 tokens"):
        set_prefill(windowed, orders[0])
    with pytest.raises(ValueError, match="come to 17, but Gemma3ForCausalLM has layers that keep the last 8 tokens"):
        write(windowed, orders[0])
    roomy = tiny_model("gemma3_text", sliding_window=17)
    assert write(roomy, orders[0]).shape == (1, 18)


def test_refusals_when_called():
    model, encoding = tiny_model("llama"), with_options(OPTIONS)
    with pytest.raises(ValueError, match="BloomForCausalLM takes no position_ids"):
        set_prefill(tiny_model("bloom"), encoding)
    with pytest.raises(ValueError, match="prompt 1 ends with a set"):
        write(model, encode("x", ["what", OPTIONS]))
    with pytest.raises(ValueError, match=r"the cache \(StaticCache\) must be a DynamicCache"):
        write(model, encoding, cache_implementation="static")
    with pytest.raises(ValueError, match=r"the cache \(DynamicCache\) must be .* not offloaded"):
        write(model, encoding, past_key_values=DynamicCache(config=model.config, offloading=True))
    with pytest.raises(ValueError, match=r"the cache \(none, use_cache=False\)"):
        write(model, encoding, use_cache=False)
    filled = set_prefill(model, encoding)[0]
    with pytest.raises(ValueError, match="past_key_values hold 17 tokens"):
        write(model, encoding, past_key_values=filled)
    with pytest.raises(ValueError, match=r"prefill_chunk_size \(4\)"):
        write(model, encoding, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="set-based prompting cannot run assisted_generation"):
        write(model, encoding, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"streamer needs num_beams=1 \(got 2\)"):
        write(model, encoding, SetBasedGenerate(streamer=Streamer()), num_beams=2)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2'"):
        set_prefill(model, encoding)


def test_arguments_that_do_not_belong_together():
    model, encoding = tiny_model("llama"), with_options(OPTIONS)
    with pytest.raises(ValueError, match=r"decode_positions \('real'\) must be 'logical' or 'physical'"):
        SetBasedGenerate(decode_positions="real")
    arguments = encoding.generate_kwargs()
    run = {"custom_generate": SetBasedGenerate(), "max_new_tokens": 2}
    with pytest.raises(ValueError, match="set_segments_ids"):
        model.generate(**arguments, set_segments_ids=encoding.segment_ids, **run)
    with pytest.raises(ValueError, match="position_ids do not restart in the members of a set"):
        model.generate(**{k: v for k, v in arguments.items() if k != "position_ids"}, **run)
    with pytest.raises(ValueError, match=r"set_segment_ids \(shape \[1, 11, 2\]\) do not fit input_ids"):
        model.generate(**arguments | {"set_segment_ids": encoding.segment_ids[:, 6:]}, **run)


def test_a_model_that_makes_its_own_positions_is_refused(monkeypatch):
    model = tiny_model("llama")
    prepare = model.prepare_inputs_for_generation
    without = functools.wraps(prepare)(lambda *a, **kw: prepare(*a, **kw) | {"position_ids": None})
    monkeypatch.setattr(model, "prepare_inputs_for_generation", without)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes position_ids of its own"):
        write(model, with_options(OPTIONS))


@pytest.mark.slow
def test_smollm2_orders():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import undersong

    folder = undersong.data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = [" stone", " a ripe plum", " iron", " the old bridge"]
    prompts = [SetPrompt(["Which is a fruit?", order, "\nAnswer:"]) for order in itertools.permutations(options)]
    loose = [set_prefill(model, SetPrompt.encode(tokenizer, p, canonicalize=False))[1] for p in prompts[::4]]
    # 30 layers and weights that amplify: relative to logits of about 20
    assert max((logits - loose[0]).abs().max() for logits in loose) < 1e-5 * loose[0].abs().max() * 10
    exact = [scored(model, SetPrompt.encode(tokenizer, p), max_new_tokens=4) for p in prompts[::3]]
    assert all(torch.equal(a, b) for run in exact[1:] for a, b in zip(run, exact[0], strict=True))


def test_vocabularies_fit():
    assert len(TOKENIZER) <= VOCAB
