"""Reading interactions, splitting them, and drawing negatives, on small files made here."""

import numpy as np
import pytest

from undersong.data.interactions import HeldOut, Interactions, count_items, sample_negatives

EVENTS = [("u1", "b", 30), ("u2", "a", 10), ("u1", "a", 10), ("u1", "c", 20), ("u2", "c", 10), ("u3", "a", 5)]
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"{user}\t{item}\t5\t{time}\n" for user, item, time in EVENTS
)
ITEM = 'item_id:token\tmovie_title:token_seq\tclass:token_seq\na\tThe "A" Film\tDrama\nb\t\tWar\nz\tNobody\'s\tWar\n'


def names(data):
    return {user: data.vocab.decode(rows) for user, rows in zip(data.user_ids, data.histories, strict=True)}


WANT = {"u1": ["a", "c", "b"], "u2": ["a", "c"], "u3": ["a"]}  # u2's two have one time: the order of the file


def test_recbole_files(tmp_path):
    (tmp_path / "x.inter").write_text(INTER)
    (tmp_path / "x.item").write_text(ITEM)
    data = Interactions.read(tmp_path / "x.inter", tmp_path / "x.item")
    assert names(data) == WANT
    assert (len(data), data.num_items, data.popularity()) == (6, 3, [0, 3, 1, 2])
    assert data.titles == {data.vocab.encode(["a"])[0]: 'The "A" Film'}  # the title that b lacks is not an empty text
    assert {data.vocab.decode([row])[0]: facts for row, facts in data.attributes.items()} == {
        "a": {"class": "Drama"},
        "b": {"class": "War"},
    }


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["customer_id,article_id,t_dat", "userId,itemId,timestamp", "User,Item,Date"])
def test_tables_by_the_usual_names_of_columns(tmp_path, header, separator):
    lines = [header, *(f"{user},{item},{time}" for user, item, time in EVENTS)]
    (tmp_path / "x.csv").write_text("\n".join(lines).replace(",", separator))
    assert names(Interactions.read(tmp_path / "x.csv")) == WANT


def test_tables_by_names_that_are_given_and_iso_dates(tmp_path):
    lines = ["who,what,when", *(f'{user},"{item}, x",2020-01-{time:02}' for user, item, time in EVENTS)]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    (tmp_path / "items.csv").write_text('what,label\n"a, x",First\n')
    data = Interactions.read(
        tmp_path / "x.csv", tmp_path / "items.csv", user="who", item="what", time="when", title="label"
    )
    assert names(data) == {user: [f"{item}, x" for item in items] for user, items in WANT.items()}
    assert list(data.titles.values()) == ["First"]


def test_numbers_are_sorted_as_numbers_and_no_time_is_the_order_of_the_file(tmp_path):
    (tmp_path / "x.csv").write_text("user,item,time\nu,late,100\nu,early,20\n")
    assert names(Interactions.read(tmp_path / "x.csv")) == {"u": ["early", "late"]}
    (tmp_path / "x.csv").write_text("user,item\nu,first\nu,second\n")
    assert names(Interactions.read(tmp_path / "x.csv")) == {"u": ["first", "second"]}
    (tmp_path / "x.txt").write_text("1 7\n1 5\n2 7\n\n")
    assert names(Interactions.read(tmp_path / "x.txt")) == {"1": ["7", "5"], "2": ["7"]}


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("x.csv", "user,thing\nu,1\n", {}, r"x.csv has no column for item \(none of item_id, .* among user, thing"),
        ("x.csv", "user,item\nu,1\n", {"time": "when"}, r"x.csv has no column for time \(when\) among user, item"),
        ("x.csv", "user,item\nu,1\nv\n", {}, "row 3 of x.csv has 1 fields, but the header has 2"),
        ("x.csv", "user,item\n", {}, "users must hold at least one interaction"),
        ("x.csv", "", {}, "x.csv has no column for user"),
        ("x.csv", "user,item\nu,1\n", {"rating": "r"}, "rating must be one of user, item, time, title"),
        ("x.txt", "1 2\n1 2 3\n", {}, r"line 2 of x.txt \('1 2 3'\) must be a user and an item"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, text, options, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Interactions.read(tmp_path / name, **options)


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"items \(1\) must be as many as users \(2\)"):
        Interactions.from_events(["a", "b"], ["x"])
    with pytest.raises(ValueError, match=r"times \(1\) must be as many as users \(2\)"):
        Interactions.from_events(["a", "b"], ["x", "y"], [1])


def test_leave_one_out_keeps_each_item_in_one_part():
    data = Interactions.from_events([u for u, _, _ in EVENTS], [i for _, i, _ in EVENTS], [t for *_, t in EVENTS])
    split = data.leave_one_out()
    a, b, c = data.vocab.encode(["a", "b", "c"])
    assert split.train == [[a], [a, c], [a]]  # two users are too short to hold anything out
    assert (split.valid.users, split.valid.histories, split.valid.targets) == ([0], [[a]], [c])
    assert (split.test.users, split.test.histories, split.test.targets) == ([0], [[a, c]], [b])


def test_core_goes_on_until_nothing_is_rare():
    users = ["u", "u", "v", "v", "w", "w"]
    data = Interactions.from_events(users, ["a", "b", "a", "b", "b", "c"])
    cut = data.core(2)
    assert names(cut) == {"u": ["a", "b"], "v": ["a", "b"]}  # c is rare, and without it w
    with pytest.raises(ValueError, match=r"minimum \(4\) leaves no interaction"):
        data.core(4)


def test_core_keeps_titles_with_their_items():
    catalogue = {"c": {"title": "C", "genre": "war"}, "a": {"title": "A"}}
    data = Interactions.from_events(["u", "u", "v", "v"], ["b", "c", "c", "a"], catalogue=catalogue)
    cut = data.core(1)
    assert (cut.titles, cut.attributes) == (data.titles, data.attributes) == ({3: "C", 1: "A"}, {3: {"genre": "war"}})


def test_negatives_are_new_to_the_user_distinct_and_seeded():
    held = HeldOut([0, 1], [[1, 2, 3], [5]], [4, 6])
    weights = count_items([[1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], 10)
    drawn = sample_negatives(held, weights, count=6)
    for row, history, target in zip(drawn.tolist(), held.histories, held.targets, strict=True):
        assert len(set(row)) == 6
        assert not {*history, target, 0} & set(row)
    assert np.array_equal(drawn, sample_negatives(held, weights, count=6))
    assert not np.array_equal(drawn, sample_negatives(held, weights, count=6, seed=1))


def test_negatives_follow_the_weights():
    held = HeldOut(list(range(3000)), [[1]] * 3000, [2] * 3000)
    drawn = sample_negatives(held, [0, 9, 9, 1, 2, 7, 0], count=1).ravel()
    shares = np.bincount(drawn, minlength=7) / 3000
    assert shares[[0, 1, 2, 6]].tolist() == [0, 0, 0, 0]
    assert shares[3:6] == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


def test_negatives_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"count \(3\) is more than the items left for user 7, who took 2 of 4"):
        sample_negatives(HeldOut([7], [[1]], [2]), [0, 1, 1, 1, 1], count=3)
    with pytest.raises(ValueError, match=r"weights\[0\] \(1\) must be 0"):
        sample_negatives(HeldOut([7], [[1]], [2]), [1, 1, 1, 1], count=1)
