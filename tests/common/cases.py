"""What the common tests share: the registry's rows, a small model of each head, and inputs for it."""

import torch
import transformers

from undersong.registry import ARCHITECTURES, is_stock_head

ROWS = list(ARCHITECTURES.values())
RECURRENT = [row for row in ROWS if row.recurrent and row.causal and row.has_cache]
HEADS = [(row, head) for row in ROWS for head in row.models]
SEQ2SEQ_LM = [row for row in ROWS if "AutoModelForSeq2SeqLM" in row.models]
CAUSAL_LM = [row for row in ROWS if "AutoModelForCausalLM" in row.models]


def name(case):
    """Readable ids: `aaren`, `aaren-AutoModelForCausalLM`."""
    if isinstance(case, tuple):
        return "-".join(name(part) for part in case)
    return case if isinstance(case, str) else case.model_type


def stock_class(row, head):
    """transformers' own class for a head of a type that it owns; None where it has none."""
    if not is_stock_head(row, head):
        return None
    table = getattr(transformers, head)._model_mapping
    return table._load_attr_from_module(row.model_type, table._model_mapping[row.model_type])


def make_config(row, **overrides):
    return row.config_class()(
        **{**row.tiny, "initializer_range": 0.3, "pad_token_id": 0, "num_labels": 3, **overrides}
    )


def build(row, head="AutoModel", dtype=torch.float32, seed=0, **overrides):
    """A small random model with weights large enough that every part of it matters to the output."""
    config = make_config(row, **overrides)
    torch.manual_seed(seed)
    model = row.model_class(head)(config).to(dtype).eval()
    if dtype == torch.float64 and getattr(config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation("eager")  # the default of transformers knows no float64
    return model


def make_inputs(model, batch, length, seed=0):
    """Main input of a model as keyword arguments: token ids (never the pad id), a series, or items to point at."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_values":
        items = torch.randn((batch, length, model.config.input_size), generator=generator).to(model.dtype)
        if not model.config.is_encoder_decoder:
            return {"input_values": items}
        ids = torch.randint(1, length + 1, (batch, length), generator=generator)
        return {"input_values": items, "decoder_input_ids": torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)}
    if model.main_input_name == "past_values":
        shape = (batch, length, model.config.input_size)
        return {"past_values": torch.randn(shape, generator=generator).to(model.dtype)}
    if model.main_input_name == "pixel_values":  # of `length` patches, in as square a grid as there is
        rows = max(n for n in range(1, length + 1) if length % n == 0 and n * n <= length)
        patch = model.config.patch_size
        shape = (batch, model.config.num_channels, rows * patch, length // rows * patch)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    if model.main_input_name == "node_features":  # rings of `length` nodes
        sizes = {"node_features": model.config.node_feature_dim, "edge_attr": model.config.edge_feature_dim}
        features = {
            key: torch.randn((batch * length, size), generator=generator).to(model.dtype)
            for key, size in sizes.items()
        }
        node = torch.arange(batch * length)
        behind = (node + 1) % length + node // length * length
        return {**features, "edge_index": torch.stack([node, behind]), "batch": node // length}
    if model.main_input_name == "event_times":
        gaps = torch.rand((batch, length), generator=generator) + 0.1
        types = torch.randint(model.config.num_event_types, (batch, length), generator=generator)
        return {"event_times": gaps.cumsum(1).to(model.dtype), "event_types": types}
    if model.main_input_name == "states":
        sizes = {"states": model.config.state_dim, "actions": model.config.act_dim, "returns_to_go": 1}
        steps = {
            key: torch.randn((batch, length, size), generator=generator).to(model.dtype) for key, size in sizes.items()
        }
        return {**steps, "timesteps": torch.arange(length).expand(batch, length)}
    return {"input_ids": torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)}


# What a head is about, by the name of its output: the first that is there.
OUTPUTS = ("logits", "prediction_outputs", "type_logits", "action_preds", "last_hidden_state", "feature_maps")


def output_of(model, **inputs):
    """The tensor a head is about."""
    outputs = model(**inputs)
    value = next(outputs[name] for name in OUTPUTS if name in outputs)
    return value[-1] if isinstance(value, tuple) else value  # a backbone's last stage


def close(got, want, atol=1e-9):
    """Fails with the size of the difference."""
    difference = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape, f"shape {tuple(got.shape)} != {tuple(want.shape)}"
    assert difference <= atol, f"differs by {difference:.3g}, allowed {atol:.3g} (scale {want.abs().max().item():.3g})"
