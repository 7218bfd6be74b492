"""The point mass moves as it should, and skill shows in the returns."""

import pytest
import torch

from undersong.data.point_mass import PointMass, returns_to_go, rollout, scripted_episodes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_two_steps_by_hand():
    world = PointMass(1, generator=generator())
    world.state = torch.tensor([[1.0, 0.0, 0.0, 0.5]])
    state, reward = world.step(torch.tensor([[-1.0, 0.0]]))
    torch.testing.assert_close(state, torch.tensor([[0.9, 0.45, -0.1, 0.45]]))
    torch.testing.assert_close(reward, -torch.tensor([0.9**2 + 0.45**2]).sqrt())
    state, _ = world.step(torch.tensor([[-7.0, 0.0]]))  # cut to -1
    torch.testing.assert_close(state[:, 2:], torch.tensor([[-0.19, 0.405]]))


def test_episodes_begin_at_rest_on_the_unit_circle_and_obey_the_world():
    episodes = scripted_episodes(50, 12, generator=generator())
    torch.testing.assert_close(episodes["states"][:, 0, :2].norm(dim=1), torch.ones(50))
    assert (episodes["states"][:, 0, 2:] == 0).all()
    world = PointMass(50, generator=generator())
    world.state = episodes["states"][:, 0]
    again = rollout(world, lambda state, step: episodes["actions"][:, step], 12)
    for key in ("states", "rewards", "returns_to_go", "timesteps"):
        assert torch.equal(again[key], episodes[key]), key
    assert episodes["actions"].abs().max() <= 1


def test_returns_to_go_are_sums_of_what_is_still_to_come():
    rewards = torch.randn(3, 5, 1, generator=generator())
    for step in range(5):
        torch.testing.assert_close(returns_to_go(rewards)[:, step], rewards[:, step:].sum(1))


def test_skill_shows_in_the_return():
    episodes = scripted_episodes(600, 32, generator=generator())
    returns, skill = episodes["returns_to_go"][:, 0, 0], episodes["skill"]
    assert torch.corrcoef(torch.stack([returns, skill]))[0, 1] > 0.7
    assert returns[skill > 0.9].mean() > returns[skill < 0.1].mean() + 10


def test_wrong_actions_are_refused():
    with pytest.raises(ValueError, match=r"action has shape \(2, 3\) but must be \(2, 2\)"):
        PointMass(2).step(torch.zeros(2, 3))
