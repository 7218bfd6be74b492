"""Passkey prompts: as long as asked for, the key where it should be, the same for the same seed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from undersong.data.motifs import repeated_motifs
from undersong.data.passkey import FILLER, KEY, PREFIX, SUFFIX, PasskeyTask, hide_passkey


def by_bytes(text):
    return list(text.encode())


def size(text):
    return len(by_bytes(text))


SHORT = {"prefix": "Listen. ", "filler": "la la la ", "key_block": "it is {key}: {key} ", "suffix": "so it is"}


@given(length=st.integers(300, 3000), depth=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_prompt_is_as_long_as_asked_for_within_one_block(length, depth, seed):
    prompt = PasskeyTask(by_bytes).prompt(length, depth, seed)
    hidden = size(KEY.replace("{key}", prompt.key))
    assert 0 <= length - (len(prompt.input_ids) - hidden + size(FILLER)) < size(FILLER)
    assert abs(hidden - size(FILLER)) < 8, "the default key block is about a filler block long"


@pytest.mark.parametrize(
    ("depth", "place"), [(0.0, 0), (0.1, 0), (0.12, 1), (0.5, 4), (0.99, 8), (1.0, 9)]
)  # of ten blocks: int(9 * depth)
def test_the_key_replaces_the_block_at_its_depth(depth, place):
    task = PasskeyTask(by_bytes, **SHORT)
    length = size(SHORT["prefix"]) + size(SHORT["suffix"]) + 10 * size(SHORT["filler"])
    prompt = task.prompt(length, depth)
    blocks = ["la la la "] * 10
    blocks[place] = f"it is {prompt.key}: {prompt.key} "
    assert bytes(prompt.input_ids).decode() == "Listen. " + "".join(blocks) + "so it is"


def test_samples_are_spread_over_the_depth():
    prompts = PasskeyTask(by_bytes).prompts(1000, n=4)
    assert [prompt.depth for prompt in prompts] == [0.125, 0.375, 0.625, 0.875]
    places = [bytes(prompt.input_ids).decode().index(prompt.key) for prompt in prompts]
    assert places == sorted(set(places))


def test_keys_depend_on_length_depth_and_seed_alone():
    task = PasskeyTask(by_bytes)
    keys = [prompt.key for prompt in task.prompts(1000, n=20)]
    assert keys == [prompt.key for prompt in PasskeyTask(by_bytes).prompts(1000, n=20)]
    assert keys != [prompt.key for prompt in task.prompts(1000, n=20, seed=1)]
    assert len(set(keys)) == 20
    assert all(len(key) == 5 and key.isdecimal() for key in keys)


def test_a_key_keeps_its_zeros():
    keys = {PasskeyTask(by_bytes, digits=1).prompt(500, 0.5, seed).key for seed in range(60)}
    assert keys == set("0123456789")
    prompts = [PasskeyTask(by_bytes, digits=3).prompt(500, 0.5, seed) for seed in range(100)]
    padded = next(prompt for prompt in prompts if prompt.key.startswith("0"))
    assert len(padded.key) == 3
    assert bytes(padded.input_ids).decode().count(padded.key) == 2


def test_new_tokens_are_enough_for_the_key_however_it_is_split():
    def pairs(text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    assert PasskeyTask(by_bytes).prompt(500, 0.5).max_new_tokens == 5 + 2
    assert PasskeyTask(pairs).prompt(500, 0.5).max_new_tokens == 3 + 2


def test_a_tokenizers_own_beginning_stands_before_the_prefix_and_its_end_nowhere():
    words = {word: i for i, word in enumerate(["<s>", "</s>", "?", *"abcdk"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?")
    task = PasskeyTask(tokenizer, prefix="a b", filler="c", key_block="k {key}", suffix="d")
    assert tokenizer.convert_ids_to_tokens(task.prompt(8, depth=0.0).input_ids) == [
        *("<s>", "a", "b", "k", "?", "c", "c", "c"),
        "d",
    ]


def test_the_default_wording_asks_for_its_own_continuation():
    assert not SUFFIX.endswith((" ", ".", "\n"))
    assert KEY.count("{key}") == 2
    assert all(part.endswith("\n") for part in (PREFIX, FILLER, KEY))


def test_prompts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"digits \(0\) must be at least 1"):
        PasskeyTask(by_bytes, digits=0)
    with pytest.raises(ValueError, match=r"key_block \('it is 5'\) must say where the number stands"):
        PasskeyTask(by_bytes, key_block="it is 5")
    with pytest.raises(ValueError, match=r"filler \(''\) must hold at least one token"):
        PasskeyTask(by_bytes, filler="")
    task = PasskeyTask(by_bytes, **SHORT)
    with pytest.raises(ValueError, match=r"depth \(1.5\) must lie in \[0, 1\]"):
        task.prompt(100, depth=1.5)
    with pytest.raises(ValueError, match=r"length \(20\) must be at least 25 tokens, those of prefix, suffix and one"):
        task.prompt(20, depth=0.5)
    with pytest.raises(ValueError, match=r"n \(0\) must be at least 1 prompt"):
        task.prompts(100, n=0)


# in token ids


def test_the_number_is_hidden_once_and_asked_for_at_the_end():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(6, (50, 30), generator=generator)
    ids, labels = hide_passkey(text, 6, digits=3, generator=generator)
    mark, ask = 6 + 10, 6 + 11
    for row, answers in zip(ids.tolist(), labels.tolist(), strict=True):
        assert row.count(mark) == row.count(ask) == 1
        place = row.index(mark)
        assert row[place + 1 : place + 4] == row[-3:] == answers[-3:]
        assert all(6 <= digit < 16 for digit in row[-3:])
        assert row.index(ask) == len(row) - 4
        assert set(answers[:-3]) == {-100}
    untouched = ids < 6
    assert torch.equal(ids[untouched], text[untouched])
    assert untouched.sum(1).eq(30 - 8).all()


def test_depth_says_where_the_number_is_hidden():
    text = torch.zeros(5, 100, dtype=torch.long)
    ids, _ = hide_passkey(text, 1, depth=torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    places = (ids == 11).int().argmax(1).tolist()
    assert places == [0, 22, 44, 66, 88]  # the last one ends right before the question, at 94
    assert ids[4, 88:94].tolist() == [11, *ids[4, -5:].tolist()]
    with pytest.raises(ValueError, match=r"length \(11\) must be at least 12 for 5 digits"):
        hide_passkey(text[:, :11], 1)


@given(motif=st.integers(1, 8), stretch=st.integers(8, 40), length=st.integers(1, 100), seed=st.integers(0, 3))
def test_a_text_of_motifs_says_something_new_only_after_a_change(motif, stretch, length, seed):
    text = repeated_motifs(3, length, 20, motif=motif, stretch=stretch, generator=torch.Generator().manual_seed(seed))
    assert text.shape == (3, length)
    assert 0 <= text.min() <= text.max() < 20
    for row in text:
        surprises = (row[motif:] != row[:-motif]).nonzero().flatten() % stretch
        # all within one motif's length after a change, and changes are a stretch apart
        assert len(set(surprises.tolist())) <= motif
        assert any(((surprises - start) % stretch < motif).all() for start in range(stretch))


def test_motifs_are_of_different_tokens_and_each_is_said_for_its_stretch():
    text = repeated_motifs(2, 400, 30, motif=5, stretch=50, generator=torch.Generator().manual_seed(0))
    for row in text:
        changes = (row[5:] != row[:-5]).nonzero().flatten()
        starts = changes[torch.cat([torch.tensor([True]), changes.diff() > 5])]
        assert (starts.diff() - 50).abs().max() <= 5  # a token that two motifs share may hide the very start
        assert len(set(row[starts[0] + 10 : starts[0] + 15].tolist())) == 5


def test_a_beginning_is_one_motif_until_its_stretch_ends():
    options = {"motif": 5, "stretch": 40, "generator": torch.Generator().manual_seed(0)}
    text = repeated_motifs(9, 60, 30, beginnings=1.0, **options)
    assert torch.equal(text[:, 5:40], text[:, :35])
    assert (text[:, 40:45] != text[:, :5]).any(1).all()
    text = repeated_motifs(4000, 40, 30, beginnings=0.8, **options)
    whole = (text[:, 5:] == text[:, :-5]).all(1).float().mean().item()
    assert whole == pytest.approx(0.8 + 0.2 / 40, abs=0.03)


def test_a_motif_needs_room():
    with pytest.raises(
        ValueError, match=r"motif \(17\) must lie in 1..16: it consists of different tokens of vocab_si"
    ):
        repeated_motifs(1, 10, 16, motif=17)
    with pytest.raises(ValueError, match=r"beginnings \(2\) must lie in \[0, 1\]"):
        repeated_motifs(1, 10, beginnings=2)
