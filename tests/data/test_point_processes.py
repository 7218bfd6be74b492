"""Hawkes processes: the likelihood against its definition, the samples against the likelihood."""

import pytest
import torch
from scipy import stats

from undersong.data.point_processes import HawkesProcess, constant_rate_log_likelihood

PROCESS = HawkesProcess()


def sampled(sequences, events, process=PROCESS, seed=0):
    return process.sample(sequences, events, generator=torch.Generator().manual_seed(seed))


def rates_at(process, t, times, types):
    """The definition: one sum over the events before t."""
    rates = torch.tensor(process.base_rates, dtype=torch.float64)
    for time, kind in zip(times.tolist(), types.tolist(), strict=True):
        if time < t:
            column = torch.tensor([row[kind] for row in process.excitation], dtype=torch.float64)
            decay = torch.tensor(-process.decay * (t - time), dtype=torch.float64)
            rates = rates + column * process.decay * decay.exp()
    return rates


def test_rates_and_compensators_are_those_of_the_definition():
    times, types = sampled(1, 6)
    rates = PROCESS.rates_before(times, types)[0]
    compensators = PROCESS.compensators(times, types)[0]
    begin = 0.0
    for index, end in enumerate(times[0].tolist()):
        torch.testing.assert_close(rates[index], rates_at(PROCESS, end, times[0], types[0]), rtol=1e-12, atol=0)
        middles = torch.linspace(begin, end, 301, dtype=torch.float64)[:-1] + (end - begin) / 600
        mean = torch.stack([rates_at(PROCESS, t, times[0], types[0]).sum() for t in middles.tolist()]).mean()
        assert compensators[index].item() == pytest.approx(mean.item() * (end - begin), rel=1e-4)
        begin = end


def test_log_likelihood_of_two_events_by_hand():
    process = HawkesProcess(base_rates=(0.5,), excitation=((0.8,),), decay=1.0)
    times, types = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2, dtype=torch.int64)
    e = torch.tensor(-2.0, dtype=torch.float64).exp()
    want = torch.stack([torch.tensor(0.5).log() - 0.5, (0.5 + 0.8 * e).log() - (2 * 0.5 + 0.8 * (1 - e))])
    torch.testing.assert_close(process.log_likelihood(times, types)[0], want, rtol=1e-6, atol=1e-7)


def test_samples_pass_the_time_rescaling_test():
    """Compensators between events are independent and exponential with mean 1 (random time change)."""
    times, types = sampled(200, 40)
    gaps = PROCESS.compensators(times, types).flatten().numpy()
    assert stats.kstest(gaps, "expon").pvalue > 0.01
    # and not those of a process whose past has no say
    memoryless = HawkesProcess(base_rates=tuple(PROCESS.mean_rates().tolist()), excitation=((0.0, 0.0), (0.0, 0.0)))
    assert stats.kstest(memoryless.compensators(times, types).flatten().numpy(), "expon").pvalue < 1e-6


def test_the_true_parameters_are_likelier_than_others():
    times, types = sampled(50, 60)
    truth = PROCESS.log_likelihood(times, types).mean()
    for change in ({"decay": 1.0}, {"base_rates": (0.1, 0.2)}, {"excitation": ((0.5, 0.4), (0.2, 0.3))}):
        assert HawkesProcess(**change).log_likelihood(times, types).mean() < truth


def test_long_run_rates_are_those_of_the_samples():
    times, types = sampled(40, 500)
    late = times >= times[:, 99:100]  # past the start, where nothing excites yet
    spans = (times[:, -1] - times[:, 99]).sum()
    rates = torch.stack([((types == kind) & late).sum() / spans for kind in range(2)])
    torch.testing.assert_close(rates, PROCESS.mean_rates(), rtol=0.1, atol=0)


def test_the_same_seed_gives_the_same_streams():
    first, again, other = sampled(3, 9), sampled(3, 9), sampled(3, 9, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_the_constant_rate_is_the_likeliest_of_its_kind():
    data = sampled(20, 30)
    best = constant_rate_log_likelihood(data, data, 2).mean()
    counts = torch.bincount(data[1][:, 1:].flatten(), minlength=2) / (data[0][:, -1] - data[0][:, 0]).sum()
    for factor in (0.9, 1.1):
        rates = counts * factor
        other = (rates[data[1][:, 1:]].log() - rates.sum() * data[0].diff(dim=1)).mean()
        assert other < best
    assert best < PROCESS.log_likelihood(*data)[:, 1:].mean()


def test_impossible_processes_are_refused():
    with pytest.raises(ValueError, match=r"base_rates \(\(0.0,\)\) and decay \(2.0\) must be positive"):
        HawkesProcess(base_rates=(0.0,), excitation=((0.1,),))
    with pytest.raises(ValueError, match=r"must be 2 rows of 2 numbers of at least 0"):
        HawkesProcess(excitation=((0.1,), (0.1,)))
    with pytest.raises(ValueError, match=r"spectral radius 1.2\) must have a spectral radius below 1"):
        HawkesProcess(base_rates=(0.1,), excitation=((1.2,),))
    with pytest.raises(ValueError, match=r"sequences \(0\) and events \(3\) must be at least 1"):
        PROCESS.sample(0, 3)
