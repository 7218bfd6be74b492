import torch

from undersong.data.digits import digits


def test_split_is_fixed_disjoint_and_stratified():
    first, again = digits(), digits()
    series = torch.cat([part.past_values for part in first.values()])
    assert len(series) == 1797
    for name, part in first.items():
        assert torch.equal(part.past_values, again[name].past_values)
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert (share - 0.1).abs().max() < 0.01
    # sums over all splits equal the whole data set's: no digit is in two of them
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    ours, whole = series.squeeze(-1), pixels
    assert torch.equal(ours[lexicographic(ours)], whole[lexicographic(whole)])


def test_series_are_pixels_in_reading_order():
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    first = digits()["train"].past_values[0].view(8, 8)
    assert (images == first).all(-1).all(-1).any()
    assert first.max() <= 1


def test_items_are_what_trainer_collates():
    item = digits()["test"][5]
    assert item["past_values"].shape == (64, 1)
    assert item["past_values"].dtype == torch.float32
    assert item["labels"].dtype == torch.int64


def lexicographic(rows):
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    return torch.tensor(order)
