"""A point mass to be steered to the origin, and scripted episodes of every skill: offline data for decision models.

Position p and velocity v in the plane; an action a in [-1, 1]^2 accelerates: v' = 0.9 v + 0.1 a, p' = p + v'. A step's
reward is -|p'|. What a controller does well or badly shows in its return, so a model that is told a return can be
asked for a good one (Chen et al. 2021, "Decision Transformer", arXiv 2106.01345).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["ACTION_DIM", "STATE_DIM", "PointMass", "returns_to_go", "rollout", "scripted_episodes"]

STATE_DIM, ACTION_DIM = 4, 2
_DRAG, _FORCE = 0.9, 0.1


class PointMass:
    """A batch of point masses, which start at rest somewhere on the unit circle.

    Args:
        batch: how many run beside each other.
        generator: source of the starting points.

    >>> world = PointMass(3, generator=torch.Generator().manual_seed(0))
    >>> state, reward = world.step(-world.state[:, :2])  # towards the origin
    >>> state.shape, bool((reward > -1).all())
    (torch.Size([3, 4]), True)
    """

    def __init__(self, batch: int, *, generator: torch.Generator | None = None):
        angle = 2 * torch.pi * torch.rand(batch, generator=generator)
        place = torch.stack([angle.cos(), angle.sin()], 1)
        self.state = torch.cat([place, torch.zeros_like(place)], 1)

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One step.

        Args:
            action: `[batch, 2]`; cut to [-1, 1].

        Returns:
            The new state `[batch, 4]` (position, velocity) and the reward `[batch]`.

        Raises:
            ValueError: an action of another shape.
        """
        if action.shape != self.state[:, :2].shape:
            raise ValueError(f"action has shape {tuple(action.shape)} but must be {tuple(self.state[:, :2].shape)}.")
        place, velocity = self.state.split(2, dim=1)
        velocity = _DRAG * velocity + _FORCE * action.clamp(-1, 1)
        place = place + velocity
        self.state = torch.cat([place, velocity], 1)
        return self.state, -place.norm(dim=1)


def scripted_episodes(
    episodes: int, steps: int = 32, *, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """Episodes of a damped spring controller that is blended, by a skill drawn for every episode, with random pushes.

    Returns:
        `states` `[episodes, steps, 4]`, `actions` `[episodes, steps, 2]`, `rewards` and `returns_to_go`
        `[episodes, steps, 1]` float32, `timesteps` `[episodes, steps]` int64, and `skill` `[episodes]` in [0, 1].
    """
    skill = torch.rand(episodes, 1, generator=generator)

    def act(state, step):
        place, velocity = state.split(2, dim=1)
        random = 2 * torch.rand(episodes, ACTION_DIM, generator=generator) - 1
        return (skill * (-2 * place - 6 * velocity) + (1 - skill) * random).clamp(-1, 1)

    episode = rollout(PointMass(episodes, generator=generator), act, steps)
    return {**episode, "skill": skill.squeeze(1)}


def rollout(world: PointMass, act: Callable[[torch.Tensor, int], torch.Tensor], steps: int) -> dict[str, torch.Tensor]:
    """What happens when `act(state, step)` steers `world`; the fields of `scripted_episodes` but for the skill."""
    states, actions, rewards = [], [], []
    for step in range(steps):
        states.append(world.state)
        actions.append(act(world.state, step))
        rewards.append(world.step(actions[-1])[1])
    rewards = torch.stack(rewards, 1).unsqueeze(-1)
    return {
        "states": torch.stack(states, 1),
        "actions": torch.stack(actions, 1),
        "rewards": rewards,
        "returns_to_go": returns_to_go(rewards),
        "timesteps": torch.arange(steps).repeat(len(rewards), 1),
    }


def returns_to_go(rewards: torch.Tensor) -> torch.Tensor:
    """Sum of the rewards from every step on, `[batch, steps, 1]`.

    >>> returns_to_go(torch.tensor([[[1.0], [2.0], [3.0]]])).flatten()
    tensor([6., 5., 3.])
    """
    return rewards.flip(1).cumsum(1).flip(1)
