"""Options are scored by the definition, and in no order."""

import itertools

import pytest
import torch

from undersong.generation.multiple_choice import METHODS, mcq, mcq_prompt, score_options
from undersong.generation.set_cache import SetCache
from undersong.generation.set_prompt import SetPrompt

from .letters import letter_tokenizer
from .tiny_models import tiny_model

TOKENIZER = letter_tokenizer(bos=True)
OPTIONS = ["abc", "d", "ef", "ghij"]


def prompt(options=OPTIONS):
    return SetPrompt(["what", [" " + o for o in options], " is"])


@torch.no_grad()
def log_prob(model, parts, option):
    """log p(option | prompt) of one option, from one pass over everything."""
    encoding = SetPrompt.encode(TOKENIZER, SetPrompt([*parts, option]))
    logits = model(**encoding.to_forward_kwargs(model)).logits[0]
    ids = encoding.input_ids[0, -len(option) :]
    return logits[-len(option) - 1 : -1].log_softmax(-1).gather(1, ids[:, None]).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_scores_are_log_probabilities(family):
    model = tiny_model(family)
    parts = prompt().parts
    want = torch.stack([log_prob(model, parts, option) for option in OPTIONS])
    lengths = torch.tensor([3, 1, 2, 4])
    assert (score_options(model, TOKENIZER, prompt(), OPTIONS) - want).abs().max() < 1e-4
    assert (score_options(model, TOKENIZER, prompt(), OPTIONS, "logprob_norm") - want / lengths).abs().max() < 1e-4
    null = torch.stack([log_prob(model, ["answer:"], option) for option in OPTIONS])
    pmi = score_options(model, TOKENIZER, prompt(), OPTIONS, "pmi", null_prompt="answer:")
    assert (pmi - (want - null)).abs().max() < 1e-4


def test_authors_mean_logit_follows_greedy_decoding():
    model = tiny_model("llama")
    encoding = SetPrompt.encode(TOKENIZER, prompt())
    logits, ids, want = [], [], []
    with torch.no_grad():
        for _ in range(4):
            text = "".join(TOKENIZER.convert_ids_to_tokens(ids))
            longer = SetPrompt.encode(TOKENIZER, SetPrompt([*prompt().parts, text])) if text else encoding
            logits.append(model(**longer.to_forward_kwargs(model)).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    for option in OPTIONS:
        tokens = TOKENIZER(option, add_special_tokens=False)["input_ids"]
        want.append(torch.stack([step[t] for step, t in zip(logits, tokens, strict=False)]).mean())
    got = score_options(model, TOKENIZER, prompt(), OPTIONS, "authors_mean_logit")
    assert (got - torch.stack(want)).abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_scores_move_with_their_options_bit_for_bit(method):
    model = tiny_model("qwen3")
    first = dict(zip(OPTIONS, score_options(model, TOKENIZER, prompt(), OPTIONS, method), strict=True))
    for order in itertools.permutations(OPTIONS):
        scores = score_options(model, TOKENIZER, prompt(order), order, method)
        assert all(torch.equal(first[o], s) for o, s in zip(order, scores, strict=True))


def test_batches_of_prompts_equal_one_by_one():
    model = tiny_model("llama")
    prompts = [prompt(), SetPrompt(["which of ", ["a", "bb"], " or none"]), SetPrompt(["no set"])]
    options = [OPTIONS, ["a", "bb"], ["c"]]
    for together in (prompts, SetPrompt.encode(TOKENIZER, prompts)):
        scores = score_options(model, TOKENIZER, together, options)
        for one, own, got in zip(prompts, options, scores, strict=True):
            assert (got - score_options(model, TOKENIZER, one, own)).abs().max() < 1e-4


def test_a_question_is_answered_alike_in_every_order():
    model, memory = tiny_model("mistral"), SetCache()
    answers = set()
    for order in itertools.permutations(OPTIONS):
        result = mcq(model, TOKENIZER, "who?", order, "a is b.", set_cache=memory)
        by_option = dict(
            zip(order, zip(result.per_option_logprob.tolist(), result.probs.tolist(), strict=True), strict=True)
        )
        answers.add((order[result.choice], tuple(by_option[o] for o in OPTIONS)))
        assert result.choice == int(result.probs.argmax())
        assert abs(result.probs.sum() - 1) < 1e-6
    assert len(answers) == 1
    assert memory.misses == 5


def test_ties_do_not_depend_on_the_order():
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data.zero_()  # all options of a length are equally likely
    answers = {order[mcq(model, TOKENIZER, "who?", order).choice] for order in itertools.permutations("abc")}
    assert answers == {"c"}


def test_the_prompt_of_a_question():
    options = "Options:<|start_2d|>\n- a<|split_2d|>\n- b<|end_2d|>"
    assert str(mcq_prompt("q", ["a", "b"], "c")) == f"{options}\n\nText: c\n\nQuestion: q\nAnswer:"
    assert str(mcq_prompt("q", ["a", "b"])) == f"{options}\n\nQuestion: q\nAnswer:"


def test_arguments_are_checked():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"method \('best'\) must be one of \('logprob'"):
        score_options(model, TOKENIZER, "a", ["b"], "best")
    with pytest.raises(ValueError, match="option '' has no tokens"):
        score_options(model, TOKENIZER, "a", ["b", ""])
    with pytest.raises(ValueError, match=r"options \(lists of \[1\]\) must be one list, not empty, for each of 2"):
        score_options(model, TOKENIZER, ["a", "b"], [["c"]])
    with pytest.raises(ValueError, match=r"options \(lists of \[0\]\)"):
        score_options(model, TOKENIZER, "a", [[]])
    with pytest.raises(ValueError, match=r"options \(\['a'\]\) must be a list of at least 2 strings"):
        mcq(model, TOKENIZER, "q", ["a"])
