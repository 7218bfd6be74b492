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
    return {"input_ids": torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)}


def output_of(model, **inputs):
    """The tensor a head is about: logits, or the last hidden state."""
    outputs = model(**inputs)
    return outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state


def close(got, want, atol=1e-9):
    """Fails with the size of the difference."""
    difference = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape, f"shape {tuple(got.shape)} != {tuple(want.shape)}"
    assert difference <= atol, f"differs by {difference:.3g}, allowed {atol:.3g} (scale {want.abs().max().item():.3g})"
