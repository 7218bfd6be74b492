"""Prompts with sets become tokens, positions and segments as the method defines them."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from undersong.generation.set_encoding import set_attention
from undersong.generation.set_prompt import SetPrompt

from .letters import letter_tokenizer

TOKENIZER = letter_tokenizer()


def decode(ids):
    return "".join(TOKENIZER.convert_ids_to_tokens(list(ids)))


def test_positions_of_the_example():  # lengths 5 | 3, 1, 4, 2 | 6
    prompt = SetPrompt(["aaaaa", ["bbb", "c", "dddd", "ee"], "ffffff"])
    encoding = SetPrompt.encode(TOKENIZER, prompt, canonicalize=False)
    want = [*range(5), 5, 6, 7, 5, 5, 6, 7, 8, 5, 6, *range(9, 15)]
    assert encoding.position_ids.tolist() == [want]
    assert decode(encoding.input_ids[0]) == "aaaaabbbcddddeeffffff"
    assert encoding.segment_ids.dtype == torch.int16
    members = [-1] * 5 + [0] * 3 + [1] + [2] * 4 + [3] * 2 + [-1] * 6
    assert encoding.segment_ids[0, :, 1].tolist() == members
    assert encoding.segment_ids[0, :, 0].tolist() == [min(0, m) for m in members]


def test_a_set_in_a_member_takes_its_longest_members_length():
    prompt = SetPrompt(["a", [["b", ["cc", "d"], "e"], "fffff"], "g"])
    encoding = SetPrompt.encode(TOKENIZER, prompt, canonicalize=False)
    assert decode(encoding.input_ids[0]) == "abccdefffffg"
    assert encoding.position_ids[0].tolist() == [0, 1, 2, 3, 2, 4, 1, 2, 3, 4, 5, 6]
    assert encoding.segment_ids[0, 1:6].tolist() == [
        [0, 0, -1, -1],
        [0, 0, 1, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
        [0, 0, -1, -1],
    ]


def allowed_by_definition(tree):
    """Brute force: tokens with their paths through the tree; who may see whom follows from comparing paths."""
    tokens = []

    def walk(sequence, path):
        for i, part in enumerate(sequence):
            if isinstance(part, str):
                tokens.extend((*path, ("text", i)) for _ in part)
            else:
                for j, member in enumerate(part):
                    walk([member] if isinstance(member, str) else member, (*path, ("set", i), ("member", j)))

    walk(tree, ())

    def may_see(q, k):
        for of_q, of_k in zip(tokens[q], tokens[k], strict=False):
            if of_q != of_k:
                return of_q[0] != "member"  # they part within a sequence, or at a set
        return True

    return [[k <= q and may_see(q, k) for k in range(len(tokens))] for q in range(len(tokens))]


def trees(depth):
    text = st.text("abcde", min_size=1, max_size=4)
    if depth == 0:
        return st.lists(text, min_size=1, max_size=2)
    member = st.one_of(text, trees(depth - 1))
    return st.lists(st.one_of(text, st.lists(member, min_size=1, max_size=3)), min_size=1, max_size=3)


@given(trees(2), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_masks_equal_brute_force(tree, padding):
    encoding = SetPrompt.encode(TOKENIZER, [SetPrompt(tree), "a" * padding or "a"], canonicalize=False)
    got = set_attention(encoding.segment_ids, encoding.attention_mask)[0]
    real = encoding.attention_mask[0].bool()
    assert got[real][:, real].tolist() == allowed_by_definition(tree)
    assert not got[real][:, ~real].any()
    assert torch.equal(got[~real], torch.eye(len(real)).bool()[~real])


@given(trees(2))
@example([[[["aa", ["a", "b"]]]]])  # adjacent texts are one text in the delimited form
@settings(deadline=None, max_examples=60)
def test_text_with_delimiters_says_the_same(tree):
    prompt = SetPrompt(tree)
    again = SetPrompt.parse(str(prompt))
    assert str(again) == str(prompt)
    ours, theirs = (SetPrompt.encode(TOKENIZER, p) for p in (prompt, again))
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.segment_ids, theirs.segment_ids)


def test_canonical_layout_is_the_same_for_every_order():
    inner = ["d", "e", "d"]
    first = SetPrompt.encode(TOKENIZER, SetPrompt(["x", ["b", ["c", inner], "ab", "b"], "y"]))
    second = SetPrompt.encode(TOKENIZER, SetPrompt(["x", ["ab", "b", "b", ["c", inner[::-1]]], "y"]))
    for name in ("input_ids", "position_ids", "segment_ids"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert decode(first.input_ids[0]) == "xabbbcddey"
    assert first.permutation[0][0] == (2, 0, 3, 1)
    assert second.permutation[0][0] == (0, 1, 2, 3)


def test_member_spans_are_in_the_callers_order():
    members = ["ccc", "a", "bb"]
    encoding = SetPrompt.encode(TOKENIZER, [SetPrompt(["x", members, "y"]), "a long text without a set"])
    spans = encoding.member_spans(0)
    assert [decode(encoding.input_ids[0, start:end]) for start, end in spans] == members


def test_left_padding_and_special_tokens():
    tokenizer = letter_tokenizer(bos=True)
    prompts = ["a<|start_2d|>b<|split_2d|>cc<|end_2d|>d", "<|start_2d|>b<|split_2d|>c<|end_2d|>", "<s>ab"]
    encoding = SetPrompt.encode(tokenizer, prompts)
    texts = ["".join(tokenizer.convert_ids_to_tokens(row)) for row in encoding.input_ids.tolist()]
    assert texts == ["<s>abccd", "<pad><pad><pad><s>bc", "<pad><pad><pad><s>ab"]
    assert encoding.attention_mask.sum(1).tolist() == [6, 3, 3]
    assert encoding.position_ids.tolist() == [[0, 1, 2, 2, 3, 4], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 2]]
    assert (encoding.segment_ids[1, :4] == -1).all()


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_tokenised_as_the_tokenizer_does(bos):
    for sentencepiece in (False, True):
        tokenizer = letter_tokenizer(bos=bos, sentencepiece=sentencepiece)
        assert SetPrompt.encode(tokenizer, "a bc").input_ids[0].tolist() == tokenizer("a bc")["input_ids"]


def test_no_space_appears_between_pieces():
    tokenizer = letter_tokenizer(sentencepiece=True)
    encoding = SetPrompt.encode(tokenizer, SetPrompt(["a", ["b", " c"], "d"]), canonicalize=False)
    assert tokenizer.convert_ids_to_tokens(encoding.input_ids[0].tolist()) == ["▁", "a", "b", "▁", "c", "d"]


def test_ablations_leave_a_half_out():
    prompt = SetPrompt(["a", ["b", "c"], "d"])
    full = SetPrompt.encode(TOKENIZER, prompt)
    mask_only = SetPrompt.encode(TOKENIZER, prompt, edit_position=False)
    positions_only = SetPrompt.encode(TOKENIZER, prompt, edit_attention=False)
    assert mask_only.position_ids.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(mask_only.segment_ids, full.segment_ids)
    assert torch.equal(positions_only.position_ids, full.position_ids)
    assert (positions_only.segment_ids == -1).all()


MESSAGES = [{"role": "system", "content": "choose"}, {"role": "user", "content": "one of {options} now"}]


def test_from_chat_renders_once_and_keeps_the_templates_tokens():
    prompt = SetPrompt.from_chat(TOKENIZER, MESSAGES, {"{options}": [" a", " b"]})
    assert str(prompt) == ("<s>system: choose\nuser: one of <|start_2d|> a<|split_2d|> b<|end_2d|> now\nassistant:")
    assert MESSAGES[1]["content"] == "one of {options} now"
    encoding = SetPrompt.encode(letter_tokenizer(bos=True), prompt)
    assert (encoding.input_ids == 1).sum() == 1
    unfinished = SetPrompt.from_chat(TOKENIZER, MESSAGES, {"{options}": ["a"]}, add_generation_prompt=False)
    assert str(unfinished).endswith("now\n")


def test_from_chat_needs_each_placeholder_once():
    with pytest.raises(ValueError, match=r"'\{x\}' occurs 0 times in messages"):
        SetPrompt.from_chat(TOKENIZER, MESSAGES, {"{x}": ["a"]})
    with pytest.raises(ValueError, match="'o' occurs 7 times in messages"):
        SetPrompt.from_chat(TOKENIZER, MESSAGES, {"o": ["a"]})
    with pytest.raises(ValueError, match=r"template writes placeholder '\{options\}' 0 times"):
        SetPrompt.from_chat(TOKENIZER, MESSAGES, {"{options}": ["a"]}, chat_template="empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a<|split_2d|>b", r"<\|split_2d\|> at offset 1 outside a set"),
        ("ab<|end_2d|>", r"<\|end_2d\|> at offset 2 outside a set"),
        ("abc<|start_2d|>b", r"<\|start_2d\|> at offset 3 that is never closed"),
        ("<|start_2d|>b<|split_2d|><|start_2d|>c<|end_2d|>", r"<\|start_2d\|> at offset 0 that is never closed"),
        ("<|start_2d|><|split_2d|>b<|end_2d|>", "empty member before offset 12"),
        ("<|start_2d|>b<|split_2d|><|end_2d|>", "empty member before offset 25"),
        ("<|start_2d|><|end_2d|>", "empty member before offset 12"),
    ],
)
def test_parse_names_the_offset(text, message):
    with pytest.raises(ValueError, match=message):
        SetPrompt.parse(text)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("text", r"parts \('text'\) must be a list of strings and sets"),
        ([], "parts is empty"),
        ([""], "parts is empty"),
        (["a", []], r"parts\[1\] has 0 members"),
        (["a", ["b", ""]], r"parts\[1\]\[1\] is an empty member"),
        (["a", ["b", []]], r"parts\[1\]\[1\] is an empty member"),
        (["a", ["b", "c<|split_2d|>"]], r"parts\[1\]\[1\]\[0\] holds the delimiter <\|split_2d\|> at offset 1"),
        (["a", 3], r"parts\[1\] \(3\) must be a string or a set"),
    ],
)
def test_parts_are_checked(parts, message):
    with pytest.raises(ValueError, match=message):
        SetPrompt(parts)


def test_a_member_must_have_tokens():
    tokenizer = letter_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    with pytest.raises(ValueError, match="member 'zz' has no tokens under this tokenizer"):
        SetPrompt.encode(tokenizer, SetPrompt(["a", ["b", "zz"]]))
    with pytest.raises(ValueError, match="every prompt at least one token"):
        SetPrompt.encode(tokenizer, "zz")
    with pytest.raises(ValueError, match="at least one prompt"):
        SetPrompt.encode(tokenizer, [])


def test_without_padding_lengths_must_agree():
    assert SetPrompt.encode(TOKENIZER, ["ab", "cd"], padding=False).input_ids.shape == (2, 2)
    with pytest.raises(ValueError, match="prompts have 2 to 3 tokens; pass padding=True"):
        SetPrompt.encode(TOKENIZER, ["ab", "cde"], padding=False)


def test_an_encoding_moves_to_a_device():
    encoding = SetPrompt.encode(TOKENIZER, "ab")
    moved = encoding.to("meta")
    assert {t.device.type for t in moved.generate_kwargs().values()} == {"meta"}
    assert moved.permutation == encoding.permutation
