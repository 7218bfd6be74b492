"""Loops end, legitimate code does not change, and every row's state is what its text alone gives."""

import math

import pytest
import torch
from transformers import LogitsProcessorList

from undersong.generation.grammar_penalty import GrammarRepetitionPenalty

from .tiny_llama import left_padded, tiny_llama
from .tiny_tokenizers import byte_fallback, byte_level

TOKENIZER = byte_level()
VOCABULARY = len(TOKENIZER)
EOS = TOKENIZER.eos_token_id
LOG_BETA, LOG_GAMMA = math.log(0.9), math.log(0.8)
ELIF = "    elif x == {}:\n        return {}\n"
LOOP = "def f(x):\n    if x == 0:\n        return 0\n" + "".join(ELIF.format(i, i) for i in range(1, 6))


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def changes(text, *, tokenizer=TOKENIZER, processor=None, **options):
    """Text of a token -> what its logit changes by, after `text` (a string or ids)."""
    processor = processor or GrammarRepetitionPenalty(tokenizer, **options)
    row = ids(text, tokenizer) if isinstance(text, str) else text
    scores = torch.zeros(1, len(tokenizer))
    after = processor(torch.tensor([row]), scores)[0]
    assert (scores == 0).all()  # the input is left alone
    return {tokenizer.decode([i]): after[i].item() for i in after.nonzero().flatten().tolist()}


def greedy_with_fake_model(prompt, text, stop_after, p=0.9, limit=400, tokenizer=TOKENIZER, **options):
    """Continues `prompt` by the tokens of `text`, each with probability p, else by the end of text.

    After `stop_after` characters of `text` the model prefers the end itself. Returns what was written.
    """
    processor = GrammarRepetitionPenalty(tokenizer, **options)
    row, plan = ids(prompt, tokenizer), ids(text, tokenizer)
    written = []
    for token in plan[:limit]:
        stops = len(tokenizer.decode(written)) >= stop_after
        probability = torch.full((1, len(tokenizer)), 1e-9)
        probability[0, token], probability[0, EOS] = (1 - p, p) if stops else (p, 1 - p)
        chosen = processor(torch.tensor([row + written], dtype=torch.long), probability.log()).argmax().item()
        if chosen == EOS:
            break
        assert chosen == token
        written.append(token)
    return tokenizer.decode(written)


# What is penalised, and by how much


def test_a_statement_loop_by_hand():
    # if / elif / elif ...: five equal elif clauses, n' = 3, and the decays of the copies add up
    found = changes(LOOP, include_content=False)
    assert found.pop("</s>") == pytest.approx(-3 * LOG_GAMMA)
    assert not found  # column 0: no token of the vocabulary brings four blanks along
    found = changes(LOOP + "   ", include_content=False)
    assert found.pop("</s>") == pytest.approx(-3 * LOG_GAMMA)
    assert found == pytest.approx({" elif": (1 + 2 + 3) * LOG_BETA})


@pytest.mark.parametrize("copies", [1, 2, 3, 4, 8])
def test_decay_grows_with_each_copy_beyond_min_repeats(copies):
    found = changes("print(x)\n" * copies, include_content=False)
    excess = copies - 3 + 1
    want = max(0, excess * (excess + 1) // 2) * LOG_BETA
    assert found.get("print", 0.0) == pytest.approx(want)
    assert found.get("</s>", 0.0) == pytest.approx(-max(0, excess) * LOG_GAMMA)


def test_elements_decay_slowly_until_there_are_many():
    found = changes("x = [" + "y, " * 11, include_content=False)
    assert found == pytest.approx({"y": 9 * LOG_BETA, " y": 9 * LOG_BETA})  # and the end of text stays as it is
    found = changes("x = [" + "y, " * 15, include_content=False)
    assert found["y"] == pytest.approx((13 + 1 + 2 + 3) * LOG_BETA)


def test_the_longest_pattern_counts_and_its_first_unit_is_penalised():
    code = "x = f(1)\nprint(x)\nassert f(1)\n" * 4
    assert changes(code, include_content=False)["x"] == pytest.approx(3 * LOG_BETA)
    assert "print" not in changes(code, include_content=False)
    assert changes(code, include_content=False, max_period=2) == {}


def test_first_tokens_of_all_recent_copies_are_penalised():
    found = changes("x.append(1)\ny.append(2)\nz.append(3)\n", include_content=False)
    assert {"x", "y", "z"} <= found.keys()
    assert found["x"] == found["y"] == found["z"] == pytest.approx(LOG_BETA)


def test_no_change_is_larger_than_the_bound():
    found = changes("print(x)\n" * 60, max_log_penalty=2.5)
    assert found["print"] == -2.5
    assert found["</s>"] == 2.5


@pytest.mark.parametrize("text", ["print(x)\n" * 5 + "print", "print(x)\n" * 5 + "x = 'print(x), ", "x = [y, y, y, y"])
def test_inside_a_unit_structure_penalises_nothing(text):
    assert changes(text, include_content=False) == {}


def test_whitespace_closers_and_strings_are_never_penalised():
    for text in [
        "f((((((((x))))))",
        "x = [[[1]]]]]]",
        "x = 'ababababab",
        'y = "a, a, a, a, ',
        "if x:\n        \n        \n",
    ]:
        assert not any(token.strip() in ("", ")", "]", "}") for token in changes(text)), text
    assert changes("x = 'ababababab") == {}


def test_within_brackets_the_end_of_text_is_not_encouraged():
    code = "f(\n" + "  x=1,\n" * 6
    found = changes(code, include_content=False)
    assert found["x"] < 0
    assert "</s>" not in found


def test_probability_and_not_the_logit_decays():
    """0.9 times a negative logit would make its token more likely."""
    scores = torch.full((1, VOCABULARY), -5.0)
    before = scores.softmax(-1)
    after = GrammarRepetitionPenalty(TOKENIZER)(torch.tensor([ids("print(x)\n" * 4)]), scores).softmax(-1)
    token = ids("print")[0]
    assert after[0, token] < before[0, token]
    odds = (after[0, token] / after[0, ids("x")[0]]).item()
    assert odds == pytest.approx(0.9**3)


def test_scores_of_half_precision_and_minus_infinity():
    row = torch.tensor([ids("print(x)\n" * 4)])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        scores = torch.zeros(1, VOCABULARY + 3, dtype=dtype)  # models pad their vocabulary
        scores[0, ids("print")[0]] = -math.inf
        after = GrammarRepetitionPenalty(TOKENIZER)(row, scores)
        assert after.dtype == dtype
        assert after[0, ids("print")[0]] == -math.inf
        assert not after.isnan().any()


# Exact copies


def test_exact_copies_of_text_that_is_no_code():
    found = changes("go,a,go,a,go,a,", language=lambda prompt: None)
    assert list(found.values()) == [pytest.approx((3 - 2 + 1) * LOG_BETA)]


def test_exact_copies_within_a_statement_count_anywhere_and_longer_ones_where_a_unit_begins():
    found = changes("x=a+a+a+")
    assert list(found.values()) == [pytest.approx(2 * LOG_BETA)]
    inside = "x=1\ng(y)\n" * 2 + "x="
    assert changes(inside) == {}
    assert changes("x=1\ng(y)\n" * 2)["x"] == pytest.approx(LOG_BETA)


def test_include_content_turns_exact_copies_off():
    assert changes("x=a+a+a+", include_content=False) == {}


# Loops end, legitimate code stays


@pytest.mark.parametrize(
    ("prompt", "pattern", "language"),
    [
        ("", "if x == {i}: return {i}\n", "python"),
        ("def f(x):\n    if x: pass\n", ELIF.replace("{}", "{i}"), "python"),
        ("", "result.append('{i}')\n", "python"),
        ("", "# HINT: use counter {i}\n", "python"),
        ("def f():\n    '''Does.\n", "    Line {i} of it.\n", "python"),
        ("function f(x) {{\n", "  if (x == {i}) {{ return {i}; }}\n", "javascript"),
        ("class A {{\n", "  int f{i}() {{\n    return {i};\n  }}\n", "java"),
        ("int f() {{\n", "  if (x == {i}) return {i};\n", "c"),
        ("int f() {{\n", "  v.push_back({i});\n", "cpp"),
        ("func f() {{\n", "  if x == {i} {{\n    return {i}\n  }}\n", "go"),
        ("fn f() {{\n", "  v.push({i});\n", "rust"),
    ],
)
def test_a_loop_ends_within_four_units_of_min_repeats(prompt, pattern, language):
    loop = "".join(pattern.format(i=i) for i in range(60))
    written = greedy_with_fake_model(prompt.format() if "{{" in prompt else prompt, loop, 10**9, language=language)
    copies = written.count("\n") / pattern.count("\n")
    assert 3 <= copies <= 3 + 4


def test_long_element_loops_end_too():
    written = greedy_with_fake_model("", "x = [\n" + "  'a',\n" * 100, 10**9, include_content=False, limit=2000)
    # 0.9 * 0.9^s < 0.1 first at s = 21; 15 copies give 13 + 1 + 2 + 3 = 19, and 16 give 14 + 10
    assert written.count("'a'") == 16


@pytest.mark.parametrize(
    ("code", "language"),
    [
        ("x = [" + ", ".join(map(str, range(12))) + "]\n", "python"),
        ("x = [\n" + "".join(f"    {i},\n" for i in range(12)) + "]\n", "python"),
        ("".join(f"import {name}\n" for name in ("os", "re", "io", "ast", "sys")), "python"),
        (
            "switch (x) {\n  case 1: f(); break;\n  case 2: x = 1; break;\n  case 3: return y;\n"
            "  case 4: if (x) { f(1); } break;\n  case 5: y = [1]; f(y); break;\n  default: g(1, 2);\n}\n",
            "javascript",
        ),
        ("def f(a, b, c, d):\n    return a + b + c + d\n", "python"),
        ("for i in x:\n    for j in y:\n        print(x[i][j], y[i][j])\n", "python"),
        ("{" + ", ".join(f"'{c}': {i}" for i, c in enumerate("abcdefgh")) + "}\n", "python"),
    ],
)
def test_legitimate_code_is_written_as_the_model_would(code, language):
    """The model ends the text itself after the code; until then each token has probability 0.9."""
    more = "x = 1\n"
    assert greedy_with_fake_model("", code + more, len(code), language=language) == code


# State


def random_texts(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pieces = ["print(x)\n", "x = [1, 2, ", "]\n", "    elif x == 1:\n        return 2\n", "# note\n", "'a", "'\n", "é"]
    for _ in range(count):
        picks = torch.randint(len(pieces), (14,), generator=generator)
        yield ids("".join(pieces[pick] * (1 + int(pick) % 3) for pick in picks))


def run(processor, rows):
    scores = torch.zeros(len(rows), VOCABULARY)
    return processor(torch.tensor(rows), scores)


def test_token_by_token_equals_fresh():
    for text in random_texts():
        growing = GrammarRepetitionPenalty(TOKENIZER)
        for length in range(1, len(text) + 1):
            fresh = GrammarRepetitionPenalty(TOKENIZER)
            torch.testing.assert_close(run(growing, [text[:length]]), run(fresh, [text[:length]]), rtol=0, atol=0)


def test_reordered_rows_equal_fresh():
    """Beam search: each row continues another row's text, all of one length."""
    generator = torch.Generator().manual_seed(1)
    start = ids(LOOP)
    beams = [list(start) for _ in range(4)]
    processor = GrammarRepetitionPenalty(TOKENIZER)
    vocabulary = [ids(t)[0] for t in ("print", "(", "x", ")", "\n", "    ", "elif", "'", ",", "1")]
    for _ in range(40):
        got = run(processor, beams)
        torch.testing.assert_close(got, run(GrammarRepetitionPenalty(TOKENIZER), beams), rtol=0, atol=0)
        order = torch.randint(4, (4,), generator=generator).tolist()
        tokens = torch.randint(len(vocabulary), (4,), generator=generator).tolist()
        beams = [[*beams[i], vocabulary[token]] for i, token in zip(order, tokens, strict=True)]


def test_rolled_back_candidates_equal_fresh():
    """Assisted decoding: the text grows by several tokens, then some of them are dropped."""
    generator = torch.Generator().manual_seed(2)
    processor = GrammarRepetitionPenalty(TOKENIZER)
    text, plan = ids(LOOP[:40]), ids(LOOP[40:] * 2)
    while len(plan) > 8:
        drafted = int(torch.randint(1, 6, (), generator=generator))
        for extra in range(drafted + 1):
            row = text + plan[:extra] if extra % 2 else text + plan[: extra // 2] + ids("y")
            torch.testing.assert_close(
                run(processor, [row]), run(GrammarRepetitionPenalty(TOKENIZER), [row]), rtol=0, atol=0
            )
        text, plan = text + plan[:drafted], plan[drafted:]


def test_another_prompt_begins_anew():
    processor = GrammarRepetitionPenalty(TOKENIZER, include_prompt=False)
    first, second = ids("print(x)\n" * 6), ids("print(y)\n" * 6)
    assert not run(processor, [first]).any()
    assert not run(processor, [second]).any()
    assert run(processor, [second + ids("print(y)\n" * 3)]).any()
    assert not run(processor, [first]).any()
    assert not run(processor, [first, second]).any()


def test_copies_of_the_prompt_count_unless_told_otherwise():
    prompt, more = ids("print(x)\n" * 3), ids("print(x)\n" * 3)
    for include_prompt, copies in ((True, 6), (False, 3)):
        processor = GrammarRepetitionPenalty(TOKENIZER, include_prompt=include_prompt, include_content=False)
        run(processor, [prompt])
        found = run(processor, [prompt + more])[0, ids("print")[0]].item()
        excess = copies - 2
        assert found == pytest.approx(excess * (excess + 1) / 2 * LOG_BETA)


def test_batched_and_left_padded_rows_equal_single_ones():
    texts = [ids(LOOP), ids("print(x)\n" * 4), ids("x = [1, 1, 1, ")]
    batch = left_padded(texts, pad=TOKENIZER.pad_token_id)["input_ids"].tolist()
    together = run(GrammarRepetitionPenalty(TOKENIZER), batch)
    for row, text in zip(together, texts, strict=True):
        torch.testing.assert_close(row, run(GrammarRepetitionPenalty(TOKENIZER), [text])[0], rtol=0, atol=0)
    assert together.any(-1).all()


def test_finished_rows_of_a_batch_are_padded_on():
    processor = GrammarRepetitionPenalty(TOKENIZER)
    text = [*ids("print(x)\n" * 4), EOS]
    for padding in range(3):
        run(processor, [text + [TOKENIZER.pad_token_id] * padding])


# Texts with code fences


FENCED = "Loop, please:\n```python\n" + "print(x)\n" * 5


def test_only_the_open_fence_is_code():
    assert changes(FENCED, include_content=False)["print"] < 0
    assert changes(FENCED + "```\nprint(x)\nprint(x)\nprint(x)\n", include_content=False) == {}
    assert changes("```python\nf(1)\n```\nNow:\n```\n" + "print(x)\n" * 4, include_content=False)["print"] < 0
    assert changes(FENCED.replace("python", "bash"), include_content=False) == {}


def test_a_fence_that_the_model_opens_and_closes_while_writing():
    processor = GrammarRepetitionPenalty(TOKENIZER, include_content=False)
    text = ids("Some ```text``` and\n```\nx\n```\n")
    assert not run(processor, [text]).any()
    text += ids("Now:\n")
    for token in ids("```python\n" + "print(x)\n" * 5):
        text.append(token)
        found = run(processor, [text])
    assert found[0, ids("print")[0]] < 0
    text += ids("```\n")
    for token in ids("print(x)\n" * 5):
        text.append(token)
        assert not run(processor, [text]).any()
    back = text[: -len(ids("```\n" + "print(x)\n" * 5))]  # the closing fence is taken back
    assert run(processor, [back])[0, ids("print")[0]] < 0


def test_a_chat_without_a_fence_is_no_code():
    tokenizer = byte_level(chat_template="{{ messages }}<turn>", extra_special_tokens={"turn": "<turn>"})
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    prose = [*ids("Hello", tokenizer), turn, *ids("print(x)\n" * 5, tokenizer)]
    assert changes(prose, tokenizer=tokenizer, include_content=False) == {}
    fenced = [*ids("Hello", tokenizer), turn, *ids(FENCED, tokenizer)]
    assert changes(fenced, tokenizer=tokenizer, include_content=False)["print"] < 0


@pytest.mark.parametrize(
    ("prompt", "acts"),
    [
        (FENCED, True),
        (FENCED.replace("python", "py"), True),
        (FENCED.replace("python", "cobol"), False),
        ("# file: tools/run.py\n" + "print(x)\n" * 5, True),
        ("In main.py:\n```\n" + "print(x)\n" * 5, True),
        ("print(x)\n" * 5, False),
        ("// a.js\n" + "print(x);\n" * 5, True),
    ],
)
def test_auto_language_takes_fence_or_file_name(prompt, acts):
    assert bool(changes(prompt, language="auto", include_content=False)) is acts


def test_a_function_may_name_the_language():
    seen = []

    def language(prompt):
        seen.append(prompt)
        return "python" if "py" in prompt else None

    loop = "print(x)\n" * 5
    processor = GrammarRepetitionPenalty(TOKENIZER, language=language, include_content=False)
    assert changes("py\n" + loop, processor=processor)["print"] < 0
    assert changes("js\n" + loop, processor=processor) == {}
    assert seen == ["py\n" + loop, "js\n" + loop]
    with pytest.raises(ValueError, match=r"language returned 'perl' but must return None or one of python"):
        changes("x", language=lambda prompt: "perl")


def test_without_a_language_only_exact_copies_count():
    assert changes(LOOP, language="auto", include_content=False) == {}
    assert changes("a+b+a+b+a+b+", language="auto")


# Bytes


def test_split_characters_line_ends_and_tabs():
    for text in ("x = '😀'\n" * 5, "print(x)\r\n" * 5, "if x:\n" + "\tprint(x)\n" * 5, "é = 1\n" * 5):
        row = ids(text)
        processor = GrammarRepetitionPenalty(TOKENIZER)
        for length in range(1, len(row) + 1):
            found = run(processor, [row[:length]])
        assert found[0, EOS] > 0, text


def test_sentencepiece_with_its_dummy_prefix():
    tokenizer = byte_fallback()
    found = changes("def f(x):\n" + "  g(x)\n" * 5 + "  ", tokenizer=tokenizer, include_content=False)
    assert found["g"] == pytest.approx(6 * LOG_BETA)


def test_a_line_of_100000_characters():
    row = ids("x = [" + "1, " * 33_332)
    processor = GrammarRepetitionPenalty(TOKENIZER)
    assert run(processor, [row]).any()
    assert run(processor, [row + ids("1")]) is not None


# generate()


MODEL = tiny_llama(VOCABULARY)
PROMPT = left_padded([ids("print(x)\n" * 3), ids("x = [1, 1, ")], pad=TOKENIZER.pad_token_id)


def test_generate_batched_equals_single():
    processor = GrammarRepetitionPenalty(TOKENIZER, beta=0.01)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": TOKENIZER.pad_token_id}
    together = MODEL.generate(**PROMPT, logits_processor=[processor], **options)
    for row in range(2):
        alone = PROMPT["input_ids"][row][PROMPT["attention_mask"][row].bool()][None]
        fresh = GrammarRepetitionPenalty(TOKENIZER, beta=0.01)
        single = MODEL.generate(alone, attention_mask=torch.ones_like(alone), logits_processor=[fresh], **options)
        assert together[row, -20:].tolist() == single[0, -20:].tolist()
    again = MODEL.generate(**PROMPT, logits_processor=[processor], **options)
    assert again.tolist() == together.tolist()


class Stateless(GrammarRepetitionPenalty):
    """Reads every text anew."""

    def __call__(self, input_ids, scores):
        self._rows = []
        return super().__call__(input_ids, scores)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate_with_beams_and_sampling_as_without_state(options):
    options = options | {"max_new_tokens": 16, "pad_token_id": TOKENIZER.pad_token_id}
    outputs = []
    for kind in (GrammarRepetitionPenalty, Stateless):
        torch.manual_seed(0)
        processors = LogitsProcessorList([kind(TOKENIZER, beta=0.1)])
        outputs.append(MODEL.generate(**PROMPT, logits_processor=processors, **options).tolist())
    assert outputs[0] == outputs[1]


def test_assisted_decoding_gives_what_greedy_gives():
    prompt = torch.tensor([ids("print(x)\n" * 4)])
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": TOKENIZER.pad_token_id}
    options["attention_mask"] = torch.ones_like(prompt)
    texts = []
    for assistant in (None, tiny_llama(VOCABULARY, seed=1), MODEL):
        processor = [GrammarRepetitionPenalty(TOKENIZER, beta=0.1)]
        texts.append(MODEL.generate(prompt, logits_processor=processor, assistant_model=assistant, **options).tolist())
    assert texts[0] == texts[1] == texts[2]


def test_continuous_batching_is_declared_unsupported():
    assert GrammarRepetitionPenalty.supports_continuous_batching is False


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, r"beta \(1.5\) must lie in \(0, 1\]; use 0.9"),
        ({"beta": 0.0}, r"beta \(0.0\) must lie in \(0, 1\]; use 0.9"),
        ({"eos_gamma": -1}, r"eos_gamma \(-1\) must lie in \(0, 1\]; use 0.8"),
        ({"min_repeats": 1}, r"min_repeats \(1\) must be an integer of at least 2"),
        ({"min_repeats": 2.5}, r"min_repeats \(2.5\) must be an integer of at least 2"),
        ({"max_period": 0}, r"max_period \(0\) must be an integer of at least 1"),
        ({"max_log_penalty": -3.0}, r"max_log_penalty \(-3.0\) must not be negative; use 10.0"),
        ({"language": "cobol"}, r"language \('cobol'\) must be 'auto', a function, or one of python, javascript"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GrammarRepetitionPenalty(TOKENIZER, **options)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"tokenizer \(Slow\) must be a fast one"):
        GrammarRepetitionPenalty(Slow())


def test_beta_and_gamma_of_one_change_nothing():
    assert changes(LOOP + "   ", beta=1.0, eos_gamma=1.0) == {}
