"""When will the next event come, and of what kind? A live stream of events that excite one another.

    python examples/forecast_events.py            # about a minute on 2 cores
    python examples/forecast_events.py --fast

A Hawkes process has an exact likelihood, so the model's nats per event can be compared with the truth. Then the
trained model follows a stream event by event: the state has a fixed size, however long it runs.
"""

import sys

import torch

from undersong import AarenConfig, AarenForEventForecasting
from undersong.data.point_processes import HawkesProcess
from undersong.modeling.aaren.modeling_aaren_events import log_gap_statistics
from undersong.modeling.aaren_stream import AarenStream

STEPS = 30 if "--fast" in sys.argv else 400
process = HawkesProcess(decay=4.0)
generator = torch.Generator().manual_seed(0)
times, types = process.sample(1000, 64, generator=generator)

torch.manual_seed(0)
config = AarenConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    initializer_range=0.177,  # 1 / sqrt(hidden_size): a narrow model learns faster than from the usual 0.02
    num_event_types=process.num_event_types,
    num_mixtures=16,
    **log_gap_statistics(times),
)
model = AarenForEventForecasting(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
for _ in range(STEPS):
    rows = torch.randint(len(times), (32,), generator=generator)
    loss = model(times[rows], types[rows]).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
test = process.sample(200, 64, generator=generator)
with torch.no_grad():
    ours = model(*test).loss.item()
truth = -process.log_likelihood(*test)[:, 1:].mean().item()
print(f"nats per event on new streams: Aaren {ours:.3f}, the process itself {truth:.3f}\n")

print("   now   kind   next within (half the time)   kind 0 next")
stream = AarenStream(model, dtype=torch.float64)
for time, kind in zip(test[0][0, :8], test[1][0, :8], strict=True):
    answer = stream.update(time.view(1, 1), kind.view(1, 1))
    median = model.next_gap(answer["gap_parameters"]).quantile(0.5).item()
    print(f"{time:6.2f}   {kind:>4}   {median:>27.2f}   {answer['type_logits'].softmax(-1)[0, 0, 0]:>11.0%}")
