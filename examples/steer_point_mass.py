"""Offline control: learn from episodes of mixed skill, then ask for a return that only the good ones reached.

    python examples/steer_point_mass.py            # about a minute on 2 cores
    python examples/steer_point_mass.py --fast

A Decision Transformer whose layers are Aaren's: at every step it reads the return still wanted, the state and its last
action, and answers with the next action, in constant time and memory.
"""

import sys

import torch

from undersong import AarenDecisionTransformerConfig, AarenDecisionTransformerModel
from undersong.data.point_mass import ACTION_DIM, STATE_DIM, PointMass, scripted_episodes
from undersong.modeling.aaren_stream import AarenStream

LENGTH, STEPS = 32, 30 if "--fast" in sys.argv else 500
generator = torch.Generator().manual_seed(0)
episodes = scripted_episodes(2000, LENGTH, generator=generator)
returns = episodes["returns_to_go"][:, 0, 0]

torch.manual_seed(0)
config = AarenDecisionTransformerConfig(
    state_dim=STATE_DIM,
    act_dim=ACTION_DIM,
    max_ep_len=LENGTH,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.177,  # 1 / sqrt(hidden_size): a narrow model learns faster than from the usual 0.02
)
model = AarenDecisionTransformerModel(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
SCALE = 30.0  # returns go into the model in units of about one
for _ in range(STEPS):
    rows = torch.randint(len(returns), (32,), generator=generator)
    batch = {key: episodes[key][rows] for key in ("states", "actions", "timesteps")}
    loss = model(**batch, returns_to_go=episodes["returns_to_go"][rows] / SCALE, labels=batch["actions"]).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def play(wanted, batch=200):
    """Mean return when the model is asked for `wanted`."""
    world = PointMass(batch, generator=torch.Generator().manual_seed(1))
    stream = AarenStream(model, batch_size=batch)
    action, total, left = torch.zeros(batch, ACTION_DIM), torch.zeros(batch), torch.full((batch, 1), wanted)
    for step in range(LENGTH):
        action = stream.update(left / SCALE, world.state, action, torch.full((batch,), step))
        _, reward = world.step(action)
        total, left = total + reward, left - reward.unsqueeze(1)
    return total.mean().item()


print(f"episodes to learn from: mean return {returns.mean():.1f}, best tenth {returns.quantile(0.9):.1f} and above")
for share in (0.1, 0.5, 0.95):
    wanted = returns.quantile(share).item()
    print(f"asked for {wanted:6.1f}   reached {play(wanted):6.1f}")
