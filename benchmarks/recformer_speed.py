"""Recformer's attention and encoder against transformers' Longformer, for `bench_recformer.py`."""

from __future__ import annotations

import torch
from transformers import LongformerConfig, LongformerModel

from undersong.modeling.recformer.configuration_recformer import RecformerConfig
from undersong.modeling.recformer.modeling_recformer import RecformerModel
from undersong.modeling.recformer.packed_rows import PackedRows

WINDOW = 64


def encoder(layers, device, dtype, implementation):
    """The published sizes, with as many layers as the machine has time for."""
    torch.manual_seed(0)
    config = RecformerConfig(num_hidden_layers=layers, attention_window=WINDOW, vocab_size=5000)
    model = RecformerModel(config).to(device, dtype).eval()
    model.set_attn_implementation(implementation)
    return model


def stock_encoder(layers, device, dtype):
    """transformers' Longformer of the same sizes and weights, as far as it has them."""
    torch.manual_seed(0)
    config = LongformerConfig(
        num_hidden_layers=layers, attention_window=WINDOW, vocab_size=5000, pad_token_id=1, type_vocab_size=1,
        max_position_embeddings=4098, layer_norm_eps=1e-5,
    )  # fmt: skip
    stock = LongformerModel(config, add_pooling_layer=False).to(device, dtype).eval()
    ours = RecformerModel.from_encoder(stock, max_token_num=1024).to(device).eval()
    with torch.no_grad():
        ours.embeddings.token_type_embeddings.weight[:] = stock.embeddings.token_type_embeddings.weight
        ours.embeddings.item_position_embeddings.weight.zero_()
    return stock, ours


def histories(lengths, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 5000, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = 0
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 1).to(device), "attention_mask": mask.long().to(device)}


def mixed_lengths(count, longest, seed=0):
    """30 to `longest` tokens, uniform in the logarithm, the longest there."""
    generator = torch.Generator().manual_seed(seed)
    logs = torch.rand(count - 1, generator=generator) * torch.tensor(longest / 30).log()
    return [longest, *(30 * logs.exp()).long().tolist()]


def add_encoder_cases(bench, layers, device, dtype, batch, length, tolerance, implementations):
    """Vectors of histories: full rows, and lengths as they come."""
    stock, ours = stock_encoder(layers, device, dtype)
    for case, lengths in (
        (f"{length} tokens", [length] * batch),
        (f"30 to {length} tokens", mixed_lengths(4 * batch, length)),
    ):
        inputs = histories(lengths, device)
        first = torch.zeros_like(inputs["input_ids"])
        first[:, 0] = 1

        def theirs(inputs=inputs, first=first):
            with torch.inference_mode():
                return stock(**inputs, global_attention_mask=first).last_hidden_state[:, 0]

        def mine(implementation, inputs=inputs):
            if ours.config._attn_implementation != implementation:
                ours.set_attn_implementation(implementation)
            with torch.inference_mode():
                return ours(**inputs, pooled_only=True).pooler_output

        candidates = {"longformer": theirs}
        for implementation in implementations:
            candidates[implementation] = lambda implementation=implementation, mine=mine: mine(implementation)
        bench.add(
            f"vectors of histories, {case}", candidates, reference=theirs, tolerance=tolerance, baseline="longformer",
            layers=layers, histories=len(lengths), tokens=sum(lengths),
        )  # fmt: skip


def add_attention_cases(bench, device, dtype, batch, length, tolerance, implementations):
    """One layer's attention with its projections, forward and backward."""
    stock, ours = stock_encoder(1, device, dtype)
    theirs, mine = stock.encoder.layer[0].attention.self, ours.encoder.layer[0].attention.self
    shape = (batch, length, 768)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    mask = torch.zeros(batch, length, device=device, dtype=dtype)
    mask[:, 0] = 1.0
    rows = PackedRows(None, shape[:2], device)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def longformer():
        return theirs(hidden, mask, mask < 0, mask > 0, True)[0]

    def band(implementation):
        return mine.band(rows.packing.pack(hidden), rows, implementation).view(shape)

    def both_ways(forward):
        output = forward()
        (gradient,) = torch.autograd.grad(output, hidden, direction)
        return output, gradient

    def forward_only(forward):
        with torch.inference_mode():
            return forward()

    for case, way, names in (
        ("forward", forward_only, implementations),
        ("forward and backward", both_ways, [i for i in implementations if device == "cuda" or i == "sdpa_band"]),
    ):
        candidates = {"longformer": lambda way=way: way(longformer)}
        for name in names:
            candidates[name] = lambda way=way, name=name: way(lambda: band(name))
        bench.add(
            f"attention of one layer at {length} tokens, {case}", candidates, reference=candidates["longformer"],
            tolerance=tolerance, baseline="longformer", batch=batch,
        )  # fmt: skip
