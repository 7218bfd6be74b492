"""The log-normal mixture against scipy, quadrature and its own samples."""

import numpy as np
import pytest
import torch
from scipy import stats

from undersong.modeling.log_normal_mixture import LogNormalMixture


def mixture(loc=0.4, scale=1.3):
    return LogNormalMixture(
        torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log(),
        torch.tensor([-1.0, 0.0, 0.7], dtype=torch.float64),
        torch.tensor([0.3, 0.8, 0.5], dtype=torch.float64).log(),
        loc,
        scale,
    )


def components(of):
    """The same as scipy's log-normal distributions, with their weights."""
    means = of.loc + of.scale * of.means.numpy()
    stds = of.scale * of.log_stds.exp().numpy()
    laws = [stats.lognorm(s=std, scale=np.exp(mean)) for mean, std in zip(means, stds, strict=True)]
    return list(zip(of.log_weights.exp().numpy(), laws, strict=True))


def test_density_distribution_and_mean_are_those_of_scipy():
    times = torch.tensor([0.05, 0.7, 3.0, 40.0]).double()
    want = sum(weight * law.pdf(times.numpy()) for weight, law in components(mixture()))
    np.testing.assert_allclose(mixture().log_prob(times).exp().numpy(), want, rtol=1e-10)
    want = sum(weight * law.cdf(times.numpy()) for weight, law in components(mixture()))
    np.testing.assert_allclose(mixture().cdf(times).numpy(), want, rtol=1e-10)
    assert mixture().mean().item() == pytest.approx(sum(weight * law.mean() for weight, law in components(mixture())))


def test_the_density_integrates_to_one():
    log_times = torch.linspace(-15, 15, 20_001, dtype=torch.float64)
    density = mixture().log_prob(log_times.exp()) + log_times  # of the logarithm
    assert torch.trapezoid(density.exp(), log_times).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("probability", [0.01, 0.5, 0.9])
def test_quantiles_invert_the_distribution(probability):
    assert mixture().cdf(mixture().quantile(probability)).item() == pytest.approx(probability, abs=1e-9)


def test_samples_follow_the_distribution():
    law = mixture()
    many = LogNormalMixture(*(x.expand(20_000, 3) for x in (law.log_weights, law.means, law.log_stds)), 0.4, 1.3)
    times = many.sample(torch.Generator().manual_seed(0))
    assert stats.kstest(times.numpy(), lambda t: law.cdf(torch.as_tensor(t)).numpy()).pvalue > 0.01


def test_nothing_happens_before_now_and_a_wide_tail_stays_finite():
    assert mixture().log_prob(torch.tensor([0.0]).double()).item() == -torch.inf
    wide = LogNormalMixture(torch.zeros(1), torch.zeros(1), torch.tensor([4.0]))
    assert torch.isfinite(wide.mean())
    with pytest.raises(ValueError, match=r"probability \(1.0\) must lie strictly between 0 and 1"):
        mixture().quantile(1.0)
