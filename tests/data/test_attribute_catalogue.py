"""The made-up shop: cold items stay cold, users follow attributes, and another shop shares the process."""

import pytest

from undersong.data.attribute_catalogue import attribute_catalogue


def test_cold_items_are_targets_only():
    shop = attribute_catalogue(num_items=60, num_users=50, num_test_users=60)
    histories = {row for history in [*shop.train, *shop.test] for row in history}
    assert len(shop.cold) == 30
    assert not histories & set(shop.cold)
    cold = [shop.is_cold(row) for row in shop.test_targets]
    assert 0.2 < sum(cold) / len(cold) < 0.8


def test_the_next_kind_follows_from_the_last():
    """With full faithfulness and every combination in the shop, the chain over kinds is deterministic."""
    shop = attribute_catalogue(
        num_items=12 * 10 * 18 * 3, num_users=40, num_test_users=2, cold_share=0, faithfulness=1
    )
    follows = {}
    for history in shop.train:
        items = [shop.items[row - 1] for row in history]
        assert len({(item["color"], item["brand"]) for item in items}) == 1
        for before, after in zip(items, items[1:], strict=False):
            assert follows.setdefault(before["kind"], after["kind"]) == after["kind"]


def test_draws_follow_from_the_seed():
    one, same, other = (attribute_catalogue(num_items=30, num_users=9, num_test_users=2, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one.train != other.train


def test_another_part_is_another_shop_whose_users_behave_alike():
    shops = [attribute_catalogue(num_items=3240, num_users=60, num_test_users=1, cold_share=0, faithfulness=1, part=n)
             for n in (0, 1)]  # fmt: skip
    items = [{tuple(item.values()) for item in shop.items} for shop in shops]
    assert not items[0] & items[1]
    steps = [set(), set()]
    for shop, seen in zip(shops, steps, strict=True):
        for history in shop.train:
            kinds = [shop.items[row - 1]["kind"] for row in history]
            seen.update(zip(kinds, kinds[1:], strict=False))
    assert (
        len(steps[0] & steps[1]) >= 15
    )  # of 18 that the chain has; where an item is missing, the next best is bought


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 7000}, r"part \(0\) of num_items \(7000\) must lie within the 6480 combinations"),
        ({"cold_share": 1.5}, r"cold_share \(1.5\) must lie in \[0, 1\]"),
        ({"length": 1}, r"length \(1\) must be at least 2"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        attribute_catalogue(**options)
