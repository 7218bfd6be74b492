"""Text and chat: exact strings, what is repeated and what never is, budgets."""

import copy
import re

import pytest

from undersong.generation.read_twice import JustReadTwice

DOC = "<document>A plum.\nA fig.</document>"
TWICE = f"{DOC}\n{DOC}"
TWO = "<document>a</document> + <document>b</document>"


class Words:
    """A tokenizer of one token per word; its chat template adds a word per message."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split()}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(f"{message['role']} {message['content']}" for message in messages) + " assistant"


def test_apply_writes_the_papers_prompt():
    read = JustReadTwice(intro="Information about {question}. ")
    assert read.apply("D.", "Key:") == "Information about Key:. D.\nD. Key:"
    assert JustReadTwice(times=3, separator=" | ").apply("D", "Q?") == "D | D | D Q?"
    assert JustReadTwice(intro=lambda question: f"{question.lower()} ").apply("D", "WHY?") == "why? D\nD WHY?"
    braces = JustReadTwice(intro="{question} {} {x} ")  # only {question} means something
    assert braces.apply("{y}", "{z}") == "{z} {} {x} {y}\n{y} {z}"


@pytest.mark.parametrize("intro", [None, "Information about {question}. "])
def test_once_is_the_base_prompt(intro):
    read = JustReadTwice(times=1, intro=intro)
    chat = [{"role": "user", "content": f"{DOC} Which?"}]
    assert read.apply("D", "Q?") == "D Q?"
    assert read.apply_to_text(f"{DOC} Which?") == f"{DOC} Which?"
    assert read.apply_to_chat(chat) == chat


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (f"Read. {DOC} Which?", f"Read. {TWICE} Which?"),
        ('<document id="3">x</document>', '<document id="3">x</document>\n<document id="3">x</document>'),
        # several documents are one text to read: all of it, then all of it again
        (f"{TWO}?", f"{TWO}\n{TWO}?"),
    ],
)  # fmt: skip
def test_text_repeats_the_block(prompt, expected):
    read = JustReadTwice()
    assert read.apply_to_text(prompt) == expected
    assert read.apply_to_text(expected) == expected


@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("intro", [None, "On {question}: "])
@pytest.mark.parametrize("separator", ["\n", "", " and again "])
def test_a_second_application_changes_nothing(times, intro, separator):
    read = JustReadTwice(times, separator, intro)
    text = read.apply_to_text(f"Read. {DOC} Which?")
    assert text.count(DOC) == times
    assert read.apply_to_text(text) == text
    chat = read.apply_to_chat([{"role": "user", "content": f"{DOC} Which?"}])
    assert read.apply_to_chat(chat) == chat
    spanned = read.apply_to_chat([{"role": "user", "content": "A plum. Which?"}], span=(0, 7))
    start = spanned[0]["content"].index("A plum.")
    assert read.apply_to_chat(spanned, span=(start, start + 7)) == spanned


def test_intro_gets_the_question_from_behind_or_before_the_block():
    read = JustReadTwice(intro="[{question}] ")
    assert read.apply_to_text(f"Say: {DOC} Which? ") == f"Say: [Which?] {TWICE} Which? "
    assert read.apply_to_text(f"Which? {DOC}") == f"Which? [Which?] {TWICE}"


def test_chat_touches_nothing_but_the_last_user_message():
    image = {"type": "image", "url": "plum.png"}
    messages = [
        {"role": "system", "content": f"Rules. {DOC}"},
        {"role": "user", "content": f"{DOC} First?", "name": "example"},
        {"role": "assistant", "content": f"{DOC}", "tool_calls": [{"type": "function", "function": {"name": "f"}}]},
        {"role": "tool", "content": DOC},
        {"role": "user", "content": [image, {"type": "text", "text": f"{DOC} Last?"}], "cache": True},
        {"role": "assistant", "content": "Well,"},
    ]
    before = copy.deepcopy(messages)
    result = JustReadTwice().apply_to_chat(messages)
    assert messages == before
    assert result[:4] == before[:4]
    assert result[5] == before[5]
    assert result[4] == {"role": "user", "content": [image, {"type": "text", "text": f"{TWICE} Last?"}], "cache": True}
    result[4]["content"][1]["text"] = "mine"
    assert messages == before


def test_chat_takes_a_span_instead_of_tags():
    chat = [{"role": "user", "content": "Read: plum, fig. Which?"}]
    result = JustReadTwice(separator=" ").apply_to_chat(chat, span=(6, 16))
    assert result[0]["content"] == "Read: plum, fig. plum, fig. Which?"
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ab?"}]}]
    assert JustReadTwice().apply_to_chat(parts, span=(0, 2))[0]["content"][1]["text"] == "ab\nab?"


def test_other_tags():
    assert (
        JustReadTwice(document_key="ctx.1").apply_to_text("<ctx.1>a</ctx.1>?") == "<ctx.1>a</ctx.1>\n<ctx.1>a</ctx.1>?"
    )
    with pytest.raises(ValueError, match=r"<ctx.1>\.\.\.</ctx.1> block"):
        JustReadTwice(document_key="ctx.1").apply_to_text("<ctxx1>a</ctxx1>")


def chat_of(*texts):
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda read: read.apply_to_text("no block"), "prompt must hold a <document>...</document> block"),
        (lambda read: read.apply_to_text("<document>open"), "around the text to read twice"),
        (lambda read: read.apply_to_chat([{"role": "user", "content": "?"}]), "in one text part, found 0"),
        (lambda read: read.apply_to_chat(chat_of(DOC, f"{DOC}?")), "in one text part, found 2"),
        (lambda read: read.apply_to_chat([*chat_of(DOC), *chat_of("?")]), "found 0"),
        (lambda read: read.apply_to_chat([{"role": "system", "content": DOC}]), "messages must hold a user message"),
        (lambda read: read.apply_to_chat(chat_of("abc"), span=(1, 4)), "0 <= start < end <= 3, the length"),
        (lambda read: read.apply_to_chat(chat_of("abc"), span=(2, 2)), r"span \(\(2, 2\)\) must satisfy"),
        (lambda read: read.apply_to_chat(chat_of("a", "b"), span=(0, 1)), "one text part in the message, got 2"),
        (lambda _: JustReadTwice(times=0), r"times \(0\) must be at least 1"),
        (lambda _: JustReadTwice(max_tokens=9), r"max_tokens \(9\) needs a tokenizer"),
        (lambda _: JustReadTwice(over_budget="cut"), r"over_budget \('cut'\) must be 'once' or 'error'"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(JustReadTwice())


def test_over_budget_the_document_is_read_once_with_a_warning_or_refused():
    chat = [{"role": "user", "content": "<document>one two three</document> ?"}]
    calls = {  # tokens read twice: the text, question included; the chat adds its role and the generation prompt
        7: lambda read: read.apply_to_text("<document>one two three</document> ?"),
        8: lambda read: read.apply("one two three", "a b"),
        9: lambda read: read.apply_to_chat(chat),
    }
    for length, call in calls.items():
        once = call(JustReadTwice(times=1))
        twice = call(JustReadTwice())
        fits = {"max_tokens": length, "tokenizer": Words()}
        assert call(JustReadTwice(**fits)) == twice
        tight = fits | {"max_tokens": length - 1}
        problem = re.escape(f"read twice, the prompt has {length} tokens, more than max_tokens ({length - 1})")
        with pytest.warns(UserWarning, match=f"{problem}; the document is read once"):
            assert call(JustReadTwice(intro="", **tight)) == once
        with pytest.raises(ValueError, match=problem):
            call(JustReadTwice(over_budget="error", **tight))
