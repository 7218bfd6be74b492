"""Checkpoints of other BERT4Rec code in the layout of `BertForSequentialRecommendation`.

Known are RecBole's model, the authors' TensorFlow variables as arrays, and `BertForMaskedLM` over items as the
replicability study (arXiv 2207.07483) trains it. They differ in names, in which rows of the tables are padding and
mask, and in how positions count.
"""

import re

import torch

_RECBOLE = [
    (r"item_embedding\.weight", "bert.embeddings.word_embeddings.weight"),
    (r"position_embedding\.weight", "bert.embeddings.position_embeddings.weight"),
    (r"LayerNorm\.(\w+)", r"bert.embeddings.LayerNorm.\1"),
    (r"trm_encoder\.layer\.(\d+)\.multi_head_attention\.(query|key|value)\.(\w+)",
     r"bert.encoder.layer.\1.attention.self.\2.\3"),
    (r"trm_encoder\.layer\.(\d+)\.multi_head_attention\.(dense|LayerNorm)\.(\w+)",
     r"bert.encoder.layer.\1.attention.output.\2.\3"),
    (r"trm_encoder\.layer\.(\d+)\.feed_forward\.dense_1\.(\w+)", r"bert.encoder.layer.\1.intermediate.dense.\2"),
    (r"trm_encoder\.layer\.(\d+)\.feed_forward\.dense_2\.(\w+)", r"bert.encoder.layer.\1.output.dense.\2"),
    (r"trm_encoder\.layer\.(\d+)\.feed_forward\.LayerNorm\.(\w+)", r"bert.encoder.layer.\1.output.LayerNorm.\2"),
    (r"output_ffn\.(\w+)", r"cls.predictions.transform.dense.\1"),
    (r"output_ln\.(\w+)", r"cls.predictions.transform.LayerNorm.\1"),
    (r"output_bias", "cls.predictions.bias"),
]  # fmt: skip
_AUTHORS = [
    (r"bert/embeddings/(word|position|token_type)_embeddings", r"bert.embeddings.\1_embeddings.weight"),
    (r"cls/predictions/output_bias", "cls.predictions.bias"),
    (r"(bert|cls)/(.+)/(?:kernel|gamma)", r"\1/\2.weight"),
    (r"(bert|cls)/(.+)/(?:bias|beta)", r"\1/\2.bias"),
]
_TABLES = ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
SOURCES = ("recbole", "authors", "repro")


def convert_state_dict(reference_state_dict, config, *, source=None, mask_row=None):
    """The state dict of a `BertForSequentialRecommendation` with this configuration.

    Args:
        reference_state_dict: name -> tensor or array.
        config: a `SequentialRecConfig`. RecBole's and the authors' positions need `position_anchor="left"`, the
            authors' gelu is `hidden_act="gelu_pytorch_tanh"`.
        source: "recbole"; "authors", TensorFlow variables by name; or "repro", a `BertForMaskedLM` whose items are
            rows 0..N-1, padding N, mask N + 1. None recognises the first two by their names; a `BertForMaskedLM` in
            our layout of rows needs no conversion.
        mask_row: "authors" only: row of the mask in their table, one of the three behind the items. It is the id of
            "[MASK]" in the vocabulary saved with the checkpoint; the order of a Python set chose it.

    Returns:
        A state dict for `load_state_dict`. Where a source has no token types they are zero.

    Raises:
        ValueError: names of no known source, a table that does not fit `config.num_items`, a missing `mask_row`.
    """
    state = {name: torch.as_tensor(value) for name, value in reference_state_dict.items()}
    source = source or _recognise(state)
    if source not in SOURCES:
        raise ValueError(f"source ({source!r}) must be one of {', '.join(map(repr, SOURCES))}.")
    items = torch.arange(1, config.num_items + 1)
    if source == "recbole":
        state = _rename(state, _RECBOLE)
        rows = torch.tensor([0, *items, config.num_items + 1])
        state["cls.predictions.bias"] = _with_mask_bias(state, config)
    elif source == "authors":
        state = _rename_authors(state)
        if mask_row is None or not config.num_items < mask_row <= config.num_items + 3:
            raise ValueError(
                f"mask_row ({mask_row}) must be the authors' id of [MASK], {config.num_items + 1} to"
                f" {config.num_items + 3}; it is in the vocabulary saved with the checkpoint."
            )
        rows = torch.tensor([0, *items, mask_row])
    else:
        rows = torch.tensor([config.num_items, *(items - 1), config.num_items + 1])
    for name in _TABLES:
        if name not in state or len(state[name]) <= rows.max():
            raise ValueError(
                f"{name} of the {source} checkpoint ({list(state[name].shape) if name in state else 'missing'}) does"
                f" not hold {config.num_items} items and what is beside them; set num_items to its catalogue."
            )
        state[name] = state[name][rows]
    state["cls.predictions.decoder.weight"] = state[_TABLES[0]]
    state["cls.predictions.decoder.bias"] = state[_TABLES[1]]
    state.setdefault(
        "bert.embeddings.token_type_embeddings.weight", torch.zeros(config.type_vocab_size, config.hidden_size)
    )
    return {name: value for name, value in state.items() if not name.endswith(("position_ids", "token_type_ids"))}


def _recognise(state):
    if "item_embedding.weight" in state:
        return "recbole"
    if any(name.startswith("bert/") for name in state):
        return "authors"
    raise ValueError(
        f"reference_state_dict (names such as {next(iter(state), None)!r}) is neither RecBole's nor the authors'; name"
        " its source, 'repro' for a BertForMaskedLM whose items begin at row 0."
    )


def _rename(state, patterns):
    renamed = {}
    for name, value in state.items():
        for pattern, ours in patterns:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, ours, name)] = value
                break
    return renamed


def _rename_authors(state):
    renamed = {}
    for name, value in _rename(state, _AUTHORS).items():
        if "/" in name:
            name = re.sub(r"/layer_(\d+)/", r".layer.\1.", name).replace("/", ".")
            value = value.T if value.dim() == 2 else value  # a kernel is [in, out]
        renamed[name] = value
    return renamed


def _with_mask_bias(state, config):
    """RecBole's bias ends before the mask, which it never predicts; without head there is none."""
    bias = state.get("cls.predictions.bias")
    if bias is None or len(bias) != config.num_items + 1:
        raise ValueError(
            f"output_bias ({'missing' if bias is None else list(bias.shape)}) must be [num_items + 1] ="
            f" [{config.num_items + 1}]; RecBole before 1.1 had no such head, train again with 1.2.1."
        )
    return torch.cat([bias, bias.new_zeros(1)])


__all__ = ["convert_state_dict"]
