"""Series: their covariances, and that the best forecast is best."""

import pytest
import torch

from undersong.data.series import MultiSine, SeasonalAR

PROCESSES = {"sines": MultiSine(), "season": SeasonalAR(), "noise alone": SeasonalAR(season=0.0)}


def sampled(process, series, length, seed=0):
    return process.sample(series, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PROCESSES)
def test_samples_have_the_covariances_they_should_from_the_first_value_on(name):
    process = PROCESSES[name]
    values = sampled(process, 40_000, 30)[..., 0].double()
    want = process.covariances(30)
    for start in (0, 10):
        got = (values[:, start : start + 1] * values[:, start:]).mean(0)
        torch.testing.assert_close(got, want[: 30 - start], rtol=0, atol=0.05 * want[0].item())


@pytest.mark.parametrize("name", PROCESSES)
def test_the_best_forecast_errs_as_promised_and_every_other_errs_more(name):
    process = PROCESSES[name]
    values = sampled(process, 4000, 40)[..., 0].double()
    past, future = values[:, :32], values[:, 32:]
    weights, errors = process.forecaster(32, 8)
    got = (past @ weights - future).square().mean(0)
    torch.testing.assert_close(got, errors, rtol=0.1, atol=1e-6)
    assert process.best_error(32, 8) == pytest.approx(errors.mean().item())
    last_value = (past[:, -1:] - future).square().mean().item()
    assert last_value > 1.1 * got.mean().item()
    disturbed = weights + 0.05 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)).double()
    assert (past @ disturbed - future).square().mean() > got.mean()


def test_an_autoregression_of_order_one_by_hand():
    process = SeasonalAR(season=0.0, coefficients=(0.5,), noise=1.0)
    torch.testing.assert_close(process.covariances(3), torch.tensor([4 / 3, 2 / 3, 1 / 3]).double())
    weights, errors = process.forecaster(4, 2)
    torch.testing.assert_close(weights[-1], torch.tensor([0.5, 0.25]).double())
    torch.testing.assert_close(errors, torch.tensor([1.0, 1.25]).double())


def test_sines_without_noise_can_be_continued_exactly():
    process = MultiSine(periods=(5.0, 9.0), noise=0.0)
    values = sampled(process, 10, 40)[..., 0].double()
    weights, _ = process.forecaster(30, 10)
    torch.testing.assert_close(values[:, :30] @ weights, values[:, 30:], rtol=0, atol=1e-4)


def test_the_same_seed_gives_the_same_series():
    for process in PROCESSES.values():
        assert torch.equal(sampled(process, 2, 9), sampled(process, 2, 9))
        assert not torch.equal(sampled(process, 2, 9), sampled(process, 2, 9, seed=1))


def test_impossible_processes_are_refused():
    with pytest.raises(ValueError, match=r"periods \(\(0.0,\)\) must be positive"):
        MultiSine(periods=(0.0,))
    with pytest.raises(ValueError, match=r"period \(-1\) must be positive"):
        SeasonalAR(period=-1)
    with pytest.raises(ValueError, match=r"coefficients \(\(1.1,\)\) must be .* largest root is 1.1"):
        SeasonalAR(coefficients=(1.1,))
    with pytest.raises(ValueError, match=r"past \(0\) and future \(4\) must be at least 1"):
        SeasonalAR().forecaster(0, 4)
