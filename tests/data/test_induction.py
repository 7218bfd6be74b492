"""Induction heads and selective copying: what stands where, and that nothing but the content says what to keep."""

import pytest
import torch

from undersong.data.induction import induction_heads, selective_copying


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [4, 5, 64])
def test_the_special_token_comes_twice_and_the_answer_is_what_followed_the_first(length):
    ids, labels = induction_heads(1000, length, generator=generator())
    assert ids.shape == labels.shape == (1000, length)
    assert ids.dtype == labels.dtype == torch.int64
    special = ids == 0
    assert (special.sum(1) == 2).all()
    assert special[:, -2].all()
    first = special.int().argmax(1)
    assert torch.equal(ids[torch.arange(1000), first + 1], labels[:, -1])
    assert torch.equal(ids[:, -1], labels[:, -1])
    assert (labels[:, :-1] == -100).all()
    assert set(first.tolist()) == set(range(length - 3)), "every place is drawn"


def test_every_token_but_the_special_one_is_drawn_and_asked_for():
    ids, labels = induction_heads(500, 12, vocab_size=5, generator=generator())
    assert set(ids.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert set(labels[:, -1].tolist()) == {1, 2, 3, 4}


def test_places_without_the_special_token_tell_nothing_about_the_answer():
    ids, labels = induction_heads(30_000, 6, vocab_size=3, generator=generator())
    # given where the special token first stood, tokens that did not follow it agree with the answer by chance
    first = (ids == 0).int().argmax(1)
    for place in range(4):
        others = ids[(first != place) & (first + 1 != place), place]
        answers = labels[(first != place) & (first + 1 != place), -1]
        assert (others == answers).double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("length", "tokens"), [(3, 1), (9, 4), (40, 16), (100, 16)])
def test_the_copy_is_the_data_in_its_order(length, tokens):
    ids, labels = selective_copying(50, length, tokens, generator=generator())
    body, ask, copy = ids.split([length - tokens - 1, 1, tokens], 1)
    assert (ask == 1).all()
    assert ((body > 1).sum(1) == tokens).all()
    assert torch.equal(body[body > 1].view(50, tokens), copy)
    assert not (body == 1).any()
    assert torch.equal(labels[:, -tokens:], copy)
    assert (labels[:, :-tokens] == -100).all()


def test_data_stands_at_places_that_differ_from_row_to_row():
    ids, _ = selective_copying(2000, 21, tokens=2, generator=generator())
    share = (ids[:, :18] > 1).double().mean(0)
    assert share.tolist() == pytest.approx([2 / 18] * 18, abs=0.03)
    assert set(ids[:, -2:].flatten().tolist()) == set(range(2, 16))


@pytest.mark.parametrize("make", [induction_heads, selective_copying])
def test_the_same_seed_gives_the_same_rows(make):
    first, again, other = (make(3, 40, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match=r"length \(3\) must be at least 4: the special token"):
        induction_heads(1, 3)
    with pytest.raises(ValueError, match=r"vocab_size \(2\) must be at least 3: the special token and 2 others"):
        induction_heads(1, 8, vocab_size=2)
    with pytest.raises(ValueError, match=r"length \(32\) must be at least 33 for 16 tokens"):
        selective_copying(1, 32)
    with pytest.raises(ValueError, match="tokens must be at least 1"):
        selective_copying(1, 32, tokens=0)
    with pytest.raises(ValueError, match=r"vocab_size \(3\) must be at least 4: noise, token 1 and 2 kinds"):
        selective_copying(1, 40, vocab_size=3)
