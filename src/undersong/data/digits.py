"""scikit-learn's handwritten digits, read as time series: 8 x 8 images, one pixel a step, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["SeriesDataset", "digits"]


@dataclass(frozen=True)
class SeriesDataset:
    """Labelled series in the form `Trainer` and the series heads take.

    Attributes:
        past_values: `[series, length, channels]` float32.
        labels: `[series]` int64.
    """

    past_values: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"past_values": self.past_values[index], "labels": self.labels[index]}


def digits() -> dict[str, SeriesDataset]:
    """The 1,797 digits of scikit-learn as 64-step series with values in [0, 1], in a fixed stratified split.

    Returns:
        "train" (1077 series), "validation" (360) and "test" (360); always the same ones.

    >>> {name: tuple(part.past_values.shape) for name, part in digits().items()}
    {'train': (1077, 64, 1), 'validation': (360, 64, 1), 'test': (360, 64, 1)}
    """
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    rest = range(len(labels))
    parts = {}
    for name in ("test", "validation"):
        rest, parts[name] = train_test_split(rest, test_size=360, stratify=labels[rest], random_state=0)
    parts["train"] = rest
    series = torch.tensor(pixels / 16.0, dtype=torch.float32).unsqueeze(-1)
    labels = torch.tensor(labels, dtype=torch.int64)
    return {name: SeriesDataset(series[parts[name]], labels[parts[name]]) for name in ("train", "validation", "test")}
