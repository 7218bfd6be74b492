"""What the experiments with Aaren share: the Transformer of the same size, how to train, how to choose the rate."""

import statistics
import time

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from undersong.modeling.aaren_layers import AarenPositionEmbedding

KINDS = ("aaren", "transformer")
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)


class CausalTransformer(nn.Module):
    """`torch.nn.TransformerEncoder` with a causal mask in the place of `AarenModel`: same embeddings, sizes, heads."""

    def __init__(self, config):
        super().__init__()
        self.embed_positions = AarenPositionEmbedding(config)
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=True,
        )
        # dropout only where Aaren has it: on both blocks' outputs
        layer.self_attn.dropout, layer.dropout = 0.0, nn.Identity()
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = nn.TransformerEncoder(layer, config.num_hidden_layers, norm, enable_nested_tensor=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, inputs_embeds, attention_mask=None, use_cache=False):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask must be all ones; the experiments have no padding.")
        length = inputs_embeds.shape[1]
        positions = torch.arange(length, device=inputs_embeds.device)
        hidden_states = inputs_embeds + self.embed_positions(positions, inputs_embeds.dtype)
        future = torch.ones(length, length, dtype=torch.bool, device=inputs_embeds.device).triu(1)
        return BaseModelOutputWithPast(last_hidden_state=self.encoder(hidden_states, mask=future, is_causal=True))


def build(kind, model_class, config, seed, device):
    """A head of Aaren, with its own trunk or the Transformer's."""
    torch.manual_seed(seed)
    model = model_class(config)
    if kind == "transformer":
        model.model = CausalTransformer(config)
    return model.to(device)


def train(model, batches, *, steps, learning_rate):
    """AdamW with warm-up and a cosine to zero; `batches` yields keyword arguments for the model, without end.

    Returns:
        Seconds it took.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, steps // 20)

    def factor(step):
        return min((step + 1) / warmup, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item()))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    begin = time.perf_counter()
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return time.perf_counter() - begin


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def choose(runs, score):
    """The rate whose runs have the lowest mean validation `score`, and what they reached on the test data.

    Args:
        runs: dicts with `learning_rate`, `validation` and `test`, each a dict of figures.
    """
    rates = sorted({run["learning_rate"] for run in runs})
    mean = {
        rate: statistics.mean(r["validation"][score] for r in runs if r["learning_rate"] == rate) for rate in rates
    }
    best = min(mean, key=mean.get)
    chosen = [run for run in runs if run["learning_rate"] == best]
    test = {key: statistics.mean(run["test"][key] for run in chosen) for key in chosen[0]["test"]}
    spread = statistics.stdev(run["test"][score] for run in chosen) if len(chosen) > 1 else None
    return {"learning_rate": best, "validation_mean": mean, "test": test, "test_sd": spread, "runs": runs}
