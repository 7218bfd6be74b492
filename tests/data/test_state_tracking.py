"""Words of permutations: the table is a group's, the labels are the products, every letter is drawn."""

import itertools
import math
import re

import pytest
import torch

from undersong.data.state_tracking import multiplication_table, permutation_words


@pytest.mark.parametrize("things", [2, 3, 4, 5])
def test_the_table_is_that_of_a_group(things):
    table = multiplication_table(things)
    size = math.factorial(things)
    numbers = torch.arange(size)
    assert table.shape == (size, size)
    assert torch.equal(table[0], numbers)
    assert torch.equal(table[:, 0], numbers)
    assert torch.equal(table.sort(0).values, numbers[:, None].expand(size, size))
    a, b, c = torch.randint(size, (3, 200), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[a, table[b, c]], table[table[a, b], c])
    assert torch.equal(table, table.T) == (things == 2), "only of two things does the order not matter"


def test_labels_are_what_the_letters_do_to_three_things_one_after_the_other():
    ids, labels = permutation_words(200, 9, generator=torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (200, 11)
    assert ids.dtype == labels.dtype == torch.int64
    permutations = list(itertools.permutations(range(3)))
    for word, asked in zip(ids.tolist(), labels.tolist(), strict=True):
        assert word[0] == 6
        assert asked[:2] == [-100, -100]
        shelf = [0, 1, 2]  # the image of every thing so far
        for t in range(1, 10):
            shelf = [permutations[word[t]][image] for image in shelf]
            assert asked[t + 1] == permutations.index(tuple(shelf))
        assert word[-1] == asked[-1]


def test_letters_and_products_are_uniform():
    ids, labels = permutation_words(6000, 5, generator=torch.Generator().manual_seed(0))
    for column in (*ids[:, 1:-1].T, *labels[:, 2:].T):
        assert (column.bincount(minlength=6) / 6000 - 1 / 6).abs().max() < 0.02


def test_the_same_seed_gives_the_same_words():
    one, other = (permutation_words(3, 8, 4, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_errors():
    message = "things (6) must be an integer from 2 to 5, which have 2 to 120 permutations; use 3."
    with pytest.raises(ValueError, match=re.escape(message)):
        permutation_words(1, 4, things=6)
    with pytest.raises(ValueError, match=re.escape("length (0) must be at least 1 letter; use 32.")):
        permutation_words(1, 0)
