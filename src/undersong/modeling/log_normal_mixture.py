"""A mixture of log-normal distributions over positive times (Shchur et al. 2020, arXiv 1909.12127, section 3.2).

With y = log(gap), standardised to z = (y - loc) / scale, z is a mixture of normals, so that log p(gap) is
logsumexp_k(log w_k + log N(z; mu_k, sigma_k)) - log(scale) - y.
"""

import math
from dataclasses import dataclass

import torch

_LARGEST_LOG = 80.0  # e^80 is still finite in float32


@dataclass(frozen=True)
class LogNormalMixture:
    """Distributions of positive times, one for every entry of the leading axes.

    Attributes:
        log_weights: `[..., components]`, normalised over the components.
        means, log_stds: `[..., components]`, of the normal distributions of z.
        loc, scale: by which the logarithm of a time was standardised.

    >>> one = LogNormalMixture(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    >>> one.quantile(0.5), one.mean()  # the median is e^0, the mean e^(1/2)
    (tensor(1.), tensor(1.6487))
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    log_stds: torch.Tensor
    loc: float = 0.0
    scale: float = 1.0

    def log_prob(self, times):
        """Log density of times `[...]`; -inf at 0 and below."""
        log_times = times.log()
        z = ((log_times - self.loc) / self.scale).unsqueeze(-1)
        standard = (z - self.means) * (-self.log_stds).exp()
        normal = -0.5 * standard.square() - self.log_stds - 0.5 * math.log(2 * math.pi)
        density = torch.logsumexp(self.log_weights + normal, -1) - math.log(self.scale) - log_times
        return torch.where(times > 0, density, -torch.inf)

    def cdf(self, times):
        """Probability of a time of at most `times` `[...]`."""
        z = ((times.log() - self.loc) / self.scale).unsqueeze(-1)
        return (self.log_weights.exp() * torch.special.ndtr((z - self.means) * (-self.log_stds).exp())).sum(-1)

    def mean(self):
        """Expected times `[...]`, cut off at e^80: a single wide component can have a mean beyond all numbers."""
        exponent = self.loc + self.scale * self.means + 0.5 * (self.scale * self.log_stds.exp()).square()
        return torch.logsumexp(self.log_weights + exponent, -1).clamp(max=_LARGEST_LOG).exp()

    def quantile(self, probability):
        """Times `[...]` below which a share `probability` in (0, 1) lies, by bisection; 0.5 gives the median."""
        if not 0 < probability < 1:
            raise ValueError(f"probability ({probability}) must lie strictly between 0 and 1; use 0.5 for the median.")
        stds = self.log_stds.exp()
        # every component has its own quantile between these two, so the mixture has
        level = torch.special.ndtri(torch.as_tensor(probability, dtype=self.means.dtype, device=self.means.device))
        own = self.means + stds * level
        low, high = own.amin(-1), own.amax(-1)
        for _ in range(60):
            middle = (low + high) / 2
            standard = (middle.unsqueeze(-1) - self.means) / stds
            below = (self.log_weights.exp() * torch.special.ndtr(standard)).sum(-1) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (self.loc + self.scale * (low + high) / 2).exp()

    def sample(self, generator=None):
        """One random time for every entry, `[...]`."""
        noise = torch.rand(self.log_weights.shape, generator=generator, device=self.means.device)
        gumbel = -(-noise.clamp(min=1e-20).log()).log()
        component = (self.log_weights + gumbel).argmax(-1, keepdim=True)
        mean, log_std = self.means.gather(-1, component), self.log_stds.gather(-1, component)
        normal = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (self.loc + self.scale * (mean + log_std.exp() * normal)).exp().squeeze(-1)


__all__ = ["LogNormalMixture"]
