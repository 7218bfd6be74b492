"""The long-delay task: what stands where, and that only the token tells the class."""

import pytest
import torch

from undersong.data.long_delay import long_delay


def make(series=2000, seed=0, **options):
    return long_delay(
        series, **{"delay": 20, "token_steps": 3} | options, generator=torch.Generator().manual_seed(seed)
    )


def test_the_token_stands_for_its_steps_and_nothing_but_noise_after_them():
    values, labels = make()
    assert values.shape == (2000, 23, 5)
    assert (values.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(values[:, :3, :4], torch.nn.functional.one_hot(labels, 4)[:, None].float().expand(-1, 3, -1))
    assert values[:, 3:, :4].eq(0).all()
    assert set(labels.tolist()) == set(range(4)), "every class is drawn"


def test_the_default_delay_is_thousands_of_steps():
    values, _ = long_delay(2)
    assert values.shape[1] - 16 == 4096


def test_noise_is_normal_and_knows_nothing_of_the_class():
    values, labels = make(noise=2.0)
    noise = values[..., -1]
    assert noise.std().item() == pytest.approx(2.0, rel=0.02)
    means = torch.stack([noise[labels == c].mean() for c in range(4)])
    assert means.abs().max() < 0.1


def test_the_same_seed_gives_the_same_series():
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match=r"classes \(1\) must be at least 2"):
        make(classes=1)
    with pytest.raises(ValueError, match=r"token_steps \(0\) must be at least 1"):
        make(token_steps=0)
    with pytest.raises(ValueError, match=r"delay \(-1\) not negative"):
        make(delay=-1)
