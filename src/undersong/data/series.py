"""Series whose best forecast is known: sums of sines, and a season with autoregressive noise.

Both are Gaussian processes: with amplitudes drawn from a normal distribution, the future given the past is normal, and
its mean, a linear function of the past, is the best forecast there is. `best_error` says how good that is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["MultiSine", "SeasonalAR"]


class _GaussianSeries:
    """What both share: draws, and the best forecast, of a zero-mean stationary process given by its covariances."""

    def covariances(self, lags: int) -> torch.Tensor:
        raise NotImplementedError

    def sample(self, series: int, length: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        raise NotImplementedError

    def forecaster(self, past: int, future: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best forecast: weights `[past, future]` of the observed values, and its mean squared errors `[future]`.

        Both float64. The forecast of `values` `[..., past]` is `values @ weights`.
        """
        if past < 1 or future < 1:
            raise ValueError(f"past ({past}) and future ({future}) must be at least 1.")
        steps = torch.arange(past + future)
        covariance = self.covariances(past + future)[(steps[:, None] - steps).abs()]
        seen, cross = covariance[:past, :past], covariance[:past, past:]
        weights = torch.linalg.lstsq(seen, cross, driver="gelsd").solution  # sines alone make it singular
        return weights, covariance[past:, past:].diagonal() - (weights * cross).sum(0)

    def best_error(self, past: int, future: int) -> float:
        """Mean squared error of the best forecast of the next `future` values from `past` ones."""
        return self.forecaster(past, future)[1].mean().item()


@dataclass(frozen=True)
class MultiSine(_GaussianSeries):
    """Sums of sines of fixed periods with random amplitudes and phases, and white noise.

    Args:
        periods: in steps.
        noise: standard deviation of what cannot be forecast.

    Raises:
        ValueError: periods that are not positive, negative noise.

    >>> process = MultiSine(periods=(8.0,), noise=0.0)
    >>> process.sample(3, 20, generator=torch.Generator().manual_seed(0)).shape, round(process.best_error(16, 4), 6)
    (torch.Size([3, 20, 1]), 0.0)
    """

    periods: tuple[float, ...] = (7.0, 12.5, 31.0)
    noise: float = 0.1

    def __post_init__(self):
        if not self.periods or min(self.periods) <= 0 or self.noise < 0:
            raise ValueError(f"periods ({self.periods}) must be positive and noise ({self.noise}) at least 0.")

    def covariances(self, lags: int) -> torch.Tensor:
        """Covariance of values 0, 1, ..., `lags - 1` steps apart, float64."""
        steps = torch.arange(lags, dtype=torch.float64)
        total = sum(torch.cos(2 * torch.pi * steps / period) for period in self.periods)
        return total + self.noise**2 * (steps == 0)

    def sample(self, series: int, length: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Series `[series, length, 1]` float32; every sine has variance 1 over all series."""
        angle = 2 * torch.pi * torch.arange(length) / torch.tensor(self.periods).unsqueeze(1)  # [periods, length]
        amplitudes = torch.randn(2, series, len(self.periods), generator=generator)
        noise = self.noise * torch.randn(series, length, generator=generator)
        return (amplitudes[0] @ angle.cos() + amplitudes[1] @ angle.sin() + noise).unsqueeze(-1)


@dataclass(frozen=True)
class SeasonalAR(_GaussianSeries):
    """A season that differs from series to series, and autoregressive noise on it.

    x_t = a cos(2 pi t / period) + b sin(2 pi t / period) + n_t,   n_t = sum_j coefficients_j n_{t-j} + e_t

    Args:
        period: of the season, in steps.
        season: standard deviation of a and b; 0 leaves the noise alone.
        coefficients: of the autoregression.
        noise: standard deviation of e.

    Raises:
        ValueError: an autoregression that explodes, no period, negative deviations.

    >>> process = SeasonalAR()
    >>> process.sample(2, 48, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([2, 48, 1])
    """

    period: float = 24.0
    season: float = 1.0
    coefficients: tuple[float, ...] = (0.6, 0.25)
    noise: float = 0.4

    def __post_init__(self):
        if self.period <= 0 or self.season < 0 or self.noise < 0:
            raise ValueError(
                f"period ({self.period}) must be positive, season ({self.season}) and noise ({self.noise}) at least 0."
            )
        radius = torch.linalg.eigvals(self._companion()).abs().max().item()
        if radius >= 1:
            raise ValueError(
                f"coefficients ({self.coefficients}) must be those of a stationary autoregression, but its largest"
                f" root is {radius:.3g}; make them smaller."
            )

    def _companion(self):
        order = len(self.coefficients)
        matrix = torch.diag(torch.ones(order - 1, dtype=torch.float64), -1)
        matrix[0] = torch.tensor(self.coefficients, dtype=torch.float64)
        return matrix

    def _noise_covariance(self):
        """Covariance of `order` successive values of the noise: S = A S A' + Q."""
        companion = self._companion()
        order = len(companion)
        innovation = torch.zeros(order, order, dtype=torch.float64)
        innovation[0, 0] = self.noise**2
        system = torch.eye(order * order, dtype=torch.float64) - torch.kron(companion, companion)
        return torch.linalg.solve(system, innovation.flatten()).view(order, order)

    def covariances(self, lags: int) -> torch.Tensor:
        """Covariance of values 0, 1, ..., `lags - 1` steps apart, float64."""
        companion, column = self._companion(), self._noise_covariance()[:, 0]
        values = []
        for _ in range(lags):
            values.append(column[0])
            column = companion @ column
        steps = torch.arange(lags, dtype=torch.float64)
        return torch.stack(values) + self.season**2 * torch.cos(2 * torch.pi * steps / self.period)

    def sample(self, series: int, length: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """Series `[series, length, 1]` float32, stationary from the first value on."""
        order = len(self.coefficients)
        eigenvalues, vectors = torch.linalg.eigh(self._noise_covariance())
        root = vectors * eigenvalues.clamp(min=0).sqrt()
        # newest first, as in the companion matrix
        start = torch.randn(series, order, generator=generator, dtype=torch.float64) @ root.T
        shocks = self.noise * torch.randn(series, length, generator=generator, dtype=torch.float64)
        values = list(start.flip(1).unbind(1))
        for step in range(length):
            past = torch.stack(values[: -order - 1 : -1], 1)
            values.append(past @ self._companion()[0] + shocks[:, step])
        angle = 2 * torch.pi * torch.arange(length, dtype=torch.float64) / self.period
        wave = torch.stack([angle.cos(), angle.sin()])
        season = self.season * torch.randn(series, 2, generator=generator, dtype=torch.float64) @ wave
        return (torch.stack(values[order:], 1) + season).float().unsqueeze(-1)
