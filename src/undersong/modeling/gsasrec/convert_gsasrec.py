"""The authors' gSASRec and SASRec checkpoints in the layout of `GSASRecForSequentialRecommendation`."""

import re

import torch

_NAMES = [
    (r"position_embedding\.weight", "model.embed_positions.weight"),
    (r"seq_norm\.(\w+)", r"model.norm.\1"),
    (r"transformer_blocks\.(\d+)\.first_norm\.(\w+)", r"model.layers.\1.attention_norm.\2"),
    (r"transformer_blocks\.(\d+)\.second_norm\.(\w+)", r"model.layers.\1.mlp_norm.\2"),
    (r"transformer_blocks\.(\d+)\.multihead_attention\.query_proj\.(\w+)", r"model.layers.\1.self_attn.q_proj.\2"),
    (r"transformer_blocks\.(\d+)\.multihead_attention\.key_proj\.(\w+)", r"model.layers.\1.self_attn.k_proj.\2"),
    (r"transformer_blocks\.(\d+)\.multihead_attention\.val_proj\.(\w+)", r"model.layers.\1.self_attn.v_proj.\2"),
    (r"transformer_blocks\.(\d+)\.dense1\.(\w+)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"transformer_blocks\.(\d+)\.dense2\.(\w+)", r"model.layers.\1.mlp.down_proj.\2"),
]


def convert_state_dict(reference_state_dict, config):
    """The state dict of a `GSASRecForSequentialRecommendation` with this configuration.

    Their table has items in rows 1..N and padding in row N + 1; here padding is row 0. Padding is masked everywhere,
    so its weights do not matter and are zero.

    Args:
        reference_state_dict: name -> tensor, as `torch.load(path, weights_only=True)` gives it.
        config: a `GSASRecConfig` with `block_type="sasrec"`, `max_position_embeddings` their sequence length, and
            `tie_word_embeddings=True` for checkpoints without an output embedding.

    Raises:
        ValueError: another `block_type`, a name that their model does not have, or a table that does not fit
            `config.num_items`.
    """
    if config.block_type != "sasrec":
        raise ValueError(f"block_type ({config.block_type!r}) must be 'sasrec', which is what the authors' blocks do.")
    state = {}
    for name, value in reference_state_dict.items():
        if name in ("item_embedding.weight", "output_embedding.weight"):
            ours = name.replace("item_embedding", "model.embed_tokens")
            state[ours] = _move_padding(name, value, config.num_items)
            continue
        pattern, ours = next(((p, o) for p, o in _NAMES if re.fullmatch(p, name)), (None, None))
        if pattern is None:
            raise ValueError(f"reference_state_dict holds {name!r}, which the authors' gSASRec does not have.")
        state[re.sub(pattern, ours, name)] = value
    if "model.embed_tokens.weight" not in state:
        raise ValueError("reference_state_dict has no 'item_embedding.weight'; pass the whole state dict.")
    state.setdefault("output_embedding.weight", state["model.embed_tokens.weight"])
    return state


def _move_padding(name, table, num_items):
    if len(table) != num_items + 2:
        raise ValueError(
            f"{name} has {len(table)} rows, but num_items ({num_items}) needs {num_items + 2}; set num_items to"
            f" {len(table) - 2}."
        )
    empty = torch.zeros_like(table[:1])
    return torch.cat([empty, table[1:-1], empty])


__all__ = ["convert_state_dict"]
