"""Hawkes processes: events that excite further events, with their exact likelihood.

lambda_k(t) = mu_k + sum_{t_i < t} alpha_{k, k_i} beta e^{-beta (t - t_i)} is the rate of events of kind k (Hawkes
1971, "Spectra of some self-exciting and mutually exciting point processes"). Samples are drawn by thinning (Ogata
1981, "On Lewis' simulation method for point processes"), and a model's likelihood can be compared with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["HawkesProcess", "constant_rate_log_likelihood"]


@dataclass(frozen=True)
class HawkesProcess:
    """A mutually exciting process with exponential kernels.

    Args:
        base_rates: mu, events of each kind per unit of time that nothing excites.
        excitation: alpha, `excitation[k][j]` events of kind k that an event of kind j causes directly, on average.
        decay: beta, per unit of time: how soon they come.

    Raises:
        ValueError: rates that are not positive, excitation that is negative or not square, or so large that every
            event causes one or more others on average and the stream explodes.

    >>> process = HawkesProcess()
    >>> times, types = process.sample(2, 5, generator=torch.Generator().manual_seed(0))
    >>> times.shape, bool((times.diff() > 0).all()), process.log_likelihood(times, types).shape
    (torch.Size([2, 5]), True, torch.Size([2, 5]))
    """

    base_rates: tuple[float, ...] = (0.2, 0.1)
    excitation: tuple[tuple[float, ...], ...] = ((0.5, 0.2), (0.4, 0.3))
    decay: float = 2.0

    def __post_init__(self):
        kinds = len(self.base_rates)
        if kinds == 0 or min(self.base_rates) <= 0 or self.decay <= 0:
            raise ValueError(
                f"base_rates ({self.base_rates}) and decay ({self.decay}) must be positive; use 0.2 and 2."
            )
        if len(self.excitation) != kinds or any(len(row) != kinds or min(row) < 0 for row in self.excitation):
            raise ValueError(
                f"excitation ({self.excitation}) must be {kinds} rows of {kinds} numbers of at least 0, one for each"
                " of the base_rates."
            )
        radius = torch.linalg.eigvals(self._alpha).abs().max().item()
        if radius >= 1:
            raise ValueError(
                f"excitation (spectral radius {radius:.3g}) must have a spectral radius below 1, or the events never"
                " end; make it smaller."
            )

    @property
    def num_event_types(self) -> int:
        return len(self.base_rates)

    @property
    def _mu(self):
        return torch.tensor(self.base_rates, dtype=torch.float64)

    @property
    def _alpha(self):
        return torch.tensor(self.excitation, dtype=torch.float64)

    def mean_rates(self) -> torch.Tensor:
        """Events of each kind per unit of time in the long run, (1 - alpha)^-1 mu, `[kinds]` float64."""
        return torch.linalg.solve(torch.eye(self.num_event_types, dtype=torch.float64) - self._alpha, self._mu)

    def sample(
        self, sequences: int, events: int, *, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Streams that begin at time 0 with nothing before, and are cut after a number of events.

        Returns:
            `times` `[sequences, events]` float64 and `types` int64.

        Raises:
            ValueError: fewer than 1 sequence or event.
        """
        if sequences < 1 or events < 1:
            raise ValueError(f"sequences ({sequences}) and events ({events}) must be at least 1.")
        rows = torch.arange(sequences)
        mu, alpha = self._mu, self._alpha
        now = torch.zeros(sequences, dtype=torch.float64)
        excited = torch.zeros(sequences, self.num_event_types, dtype=torch.float64)  # lambda - mu at `now`
        times = torch.zeros(sequences, events, dtype=torch.float64)
        types = torch.zeros(sequences, events, dtype=torch.int64)
        count = torch.zeros(sequences, dtype=torch.int64)
        while (running := count < events).any():
            # until something happens the rate only falls, so its value now is a bound
            bound = mu.sum() + excited.sum(1)
            draw = torch.rand(sequences, 3, generator=generator, dtype=torch.float64)
            wait = -torch.log1p(-draw[:, 0]) / bound
            now = now + wait
            excited = excited * torch.exp(-self.decay * wait).unsqueeze(1)
            rates = mu + excited
            accepted = running & (draw[:, 1] * bound < rates.sum(1))
            kind = (draw[:, 2:] * rates.sum(1, keepdim=True) > rates.cumsum(1)).sum(1).clamp(max=len(mu) - 1)
            row, which = rows[accepted], kind[accepted]
            times[row, count[accepted]] = now[accepted]
            types[row, count[accepted]] = which
            count = count + accepted
            excited[row] += self.decay * alpha[:, which].T
        return times, types

    def rates_before(self, times: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """lambda_k just before every event, `[sequences, events, kinds]` float64, given the events before it."""
        times, alpha = times.double(), self._alpha
        excited = torch.zeros(*times.shape[:1], self.num_event_types, dtype=torch.float64)
        before, rates = times.new_zeros(len(times)), []
        for index in range(times.shape[1]):
            excited = excited * torch.exp(-self.decay * (times[:, index] - before)).unsqueeze(1)
            rates.append(self._mu + excited)
            excited = excited + self.decay * alpha[:, types[:, index]].T
            before = times[:, index]
        return torch.stack(rates, 1)

    def compensators(self, times: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Expected number of events of any kind between an event and the one before (time 0 at first), given the past.

        Under the true process they are independent and exponential with mean 1. `[sequences, events]` float64.
        """
        times = times.double()
        gaps = times.diff(dim=1, prepend=times.new_zeros(len(times), 1))
        # the excitation just after event i decays from there: its integral is excitation * (1 - e^{-beta gap}) / beta
        just_after = self.rates_before(times, types) - self._mu + self.decay * self._alpha[:, types].movedim(0, -1)
        start = _after_zero(just_after.sum(-1)[:, :-1])
        return self._mu.sum() * gaps + start * -torch.expm1(-self.decay * gaps) / self.decay

    def log_likelihood(self, times: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """Log density of every event's time and kind given the events before it, in nats.

        log lambda_{k_i}(t_i) - integral of all rates since the event before (time 0 at first).

        Args:
            times: `[sequences, events]`, increasing.
            types: `[sequences, events]` int64.

        Returns:
            `[sequences, events]` float64; the sum of a row is the log-likelihood of its events.
        """
        rates = self.rates_before(times, types).gather(-1, types.unsqueeze(-1)).squeeze(-1)
        return rates.log() - self.compensators(times, types)


def _after_zero(values):
    """A column of zeros in front."""
    return torch.nn.functional.pad(values, (1, 0))


def constant_rate_log_likelihood(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], num_event_types: int
) -> torch.Tensor:
    """The baseline that remembers nothing: a constant rate for each kind, the most likely ones of the training data.

    Args:
        train, test: `(times, types)`, `[sequences, events]` each. A row's first event only starts the clock.

    Returns:
        Log density of every event of `test` but the first of a row, `[sequences, events - 1]` float64.

    >>> times, types = torch.tensor([[0.0, 2.0, 4.0]]), torch.zeros(1, 3, dtype=torch.int64)
    >>> constant_rate_log_likelihood((times, types), (times, types), 1)  # log(1/2) - 1/2 * 2
    tensor([[-1.6931, -1.6931]], dtype=torch.float64)
    """
    times, types = train[0].double(), train[1]
    counts = torch.bincount(types[:, 1:].flatten(), minlength=num_event_types).double()
    rates = counts / (times[:, -1] - times[:, 0]).sum()
    return rates[test[1][:, 1:]].log() - rates.sum() * test[0].double().diff(dim=1)
