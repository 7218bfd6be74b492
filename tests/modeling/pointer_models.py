"""Small pointer networks of every kind, and one computed step by step from its weights."""

import torch
from transformers import BertConfig

from undersong.modeling.pointer_network.configuration_pointer_network import PointerNetworkConfig
from undersong.modeling.pointer_network.modeling_pointer_network import PointerNetworkForConditionalGeneration

KINDS = {
    "lstm": {},
    "two layers, two glimpses": {"num_hidden_layers": 2, "num_glimpses": 2},
    "bilstm, clipped": {"encoder_type": "bilstm", "num_hidden_layers": 2, "logit_clip": 3.0},
    "set": {"encoder_type": "set", "num_glimpses": 1, "num_process_steps": 3},
    "transformer": {"encoder_type": "transformer"},
    "blend": {"attention_mode": "blend", "max_num_points": 9},
}


def bert():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertConfig(**sizes, vocab_size=2, max_position_embeddings=32, initializer_range=0.5)


def build(kind="lstm", dtype=torch.float64, seed=0, **overrides):
    values = {"hidden_size": 8, "initializer_range": 1.0} | KINDS[kind] | overrides
    if values.get("encoder_type") == "transformer":
        values.setdefault("encoder_config", bert())
    torch.manual_seed(seed)
    return PointerNetworkForConditionalGeneration(PointerNetworkConfig(**values)).to(dtype).eval()


def points(batch, n, seed=0, size=2, dtype=torch.float64):
    return torch.rand(batch, n, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padded(rows, side="right", fill=torch.nan):
    """Rows `[n, size]` of different lengths as a batch and its mask; what stands at the padding must not matter."""
    n = max(map(len, rows))
    values = torch.full((len(rows), n, rows[0].shape[1]), fill, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), n, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(n - len(row), n)
        values[index, where], mask[index, where] = row, 1
    return values, mask


def lstm_step(lstm, x, state):
    """One step of all layers of an `nn.LSTM`, from its weights. `state`: (h, c) per layer."""
    new = []
    for layer, (h, c) in enumerate(state):
        w_in, w, b_in, b = (
            getattr(lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        i, f, g, o = (w_in @ x + b_in + w @ h + b).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        new.append((x, c))
    return x, new


def scores(attention, memory, query):
    hidden = [attention.key_proj.weight @ e + attention.query_proj.weight @ query for e in memory]
    return torch.stack([attention.v @ h.tanh() for h in hidden])


def naive_logits(model, row, ids):
    """Logits `[T, 1 + n]` of one row of points for decoder inputs `ids`, by the equations of the papers in loops."""
    net, layers = model.model, model.config.num_hidden_layers
    zero = torch.zeros(model.config.hidden_size, dtype=row.dtype)
    state, memory = [(zero, zero)] * layers, [net.end]
    for x in row:
        h, state = lstm_step(net.encoder.layers.lstm, x, state)
        memory.append(h)
    memory, logits = torch.stack(memory), []
    for i in ids:
        d, state = lstm_step(net.decoder, net.go if i == 0 else row[i - 1], state)
        for glimpse in net.glimpses:
            weights = scores(glimpse.attention, memory, d).softmax(0)
            d = glimpse.out_proj.weight @ torch.cat([d, weights @ memory]) + glimpse.out_proj.bias
        u = scores(model.attention, memory, d)
        if model.config.attention_mode == "blend":
            content = u.softmax(0) @ memory
            u = (model.classifier.weight @ torch.cat([d, content]) + model.classifier.bias)[: len(memory)]
        logits.append(u if model.config.logit_clip is None else model.config.logit_clip * u.tanh())
    return torch.stack(logits)
