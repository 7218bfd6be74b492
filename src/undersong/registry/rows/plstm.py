"""pLSTM: linear recurrences on sequences, grids and graphs."""

from ..architecture import Architecture

_PLSTM = "undersong.modeling.plstm.modeling_plstm"
_PLSTM_VISION = "undersong.modeling.plstm_vision.modeling_plstm_vision"
_PLSTM_GRAPH = "undersong.modeling.plstm_graph.modeling_plstm_graph"
_PLSTM_CITATION = """@article{poeppel2025plstm,
  title   = {pLSTM: parallelizable Linear Source Transition Mark networks},
  author  = {P{\\"o}ppel, Korbinian and Freinschlag, Richard and Schmied, Thomas and Lin, Wei and Hochreiter, Sepp},
  journal = {arXiv preprint arXiv:2506.11997},
  year    = {2025}
}"""
ROWS: list[Architecture] = [
    Architecture(
        model_type="plstm",
        config="undersong.modeling.plstm.configuration_plstm:PLSTMConfig",
        models={
            "AutoModel": f"{_PLSTM}:PLSTMModel",
            "AutoModelForCausalLM": f"{_PLSTM}:PLSTMForCausalLM",
            "AutoModelForSequenceClassification": f"{_PLSTM}:PLSTMForSequenceClassification",
            "AutoModelForTokenClassification": f"{_PLSTM}:PLSTMForTokenClassification",
        },
        title="pLSTM",
        summary="A gated linear recurrence whose transitions are small matrices, so that it can track states.",
        paper="pLSTM: parallelizable Linear Source Transition Mark networks",
        arxiv="2506.11997",
        citation=_PLSTM_CITATION,
        lora_targets=("up_proj", "down_proj"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "transition_dim": 3,
            "value_tracking_dim": 2,
            "output_tracking_dim": 4,
            "gate_bias": -1.0,
            "gate_initializer_range": 0.3,
            "chunk_size": 8,
        },
    ),
    Architecture(
        model_type="plstm_vision",
        config="undersong.modeling.plstm_vision.configuration_plstm_vision:PLSTMVisionConfig",
        models={
            "AutoModel": f"{_PLSTM_VISION}:PLSTMVisionModel",
            "AutoModelForImageClassification": f"{_PLSTM_VISION}:PLSTMVisionForImageClassification",
            "AutoBackbone": f"{_PLSTM_VISION}:PLSTMVisionBackbone",
        },
        title="pLSTM on images",
        summary="A linear recurrence over the grid of patches, from all four corners; reads larger images as well.",
        paper="pLSTM: parallelizable Linear Source Transition Mark networks",
        arxiv="2506.11997",
        citation=_PLSTM_CITATION,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        feedforward_targets=("down_proj",),
        modalities=("image",),
        causal=False,
        recurrent=False,  # over a grid: there is no sequence to continue, and so no cache
        has_cache=False,
        example='inputs = {"pixel_values": torch.rand(1, 3, 64, 64)}  # any sides divisible by config.patch_size',
        tiny={
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
        },
    ),
    Architecture(
        model_type="plstm_graph",
        config="undersong.modeling.plstm_graph.configuration_plstm_graph:PLSTMGraphConfig",
        models={
            "AutoModel": f"{_PLSTM_GRAPH}:PLSTMGraphModel",
            "GraphClassification": f"{_PLSTM_GRAPH}:PLSTMGraphForGraphClassification",
        },
        title="pLSTM on graphs",
        summary="A linear recurrence along the edges of a graph: one layer carries as far as there are paths.",
        paper="pLSTM: parallelizable Linear Source Transition Mark networks",
        arxiv="2506.11997",
        citation=_PLSTM_CITATION,
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj"),
        feedforward_targets=("down_proj",),
        modalities=("graph",),
        causal=False,
        recurrent=False,  # along edges: there is no sequence to continue, and so no cache
        has_cache=False,
        example='inputs = {"node_features": torch.rand(4, model.config.node_feature_dim),'
        ' "edge_index": torch.tensor([[0, 1, 2], [1, 2, 3]]),'
        ' "edge_attr": torch.rand(3, model.config.edge_feature_dim)}',
        tiny={
            "node_feature_dim": 5,
            "edge_feature_dim": 3,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
        },
    ),
]
