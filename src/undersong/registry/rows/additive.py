"""Additive linear recurrences: the state is a running weighted average."""

from ..architecture import Architecture

_AAREN = "undersong.modeling.aaren.modeling_aaren"
_AAREN_CITATION = """@article{feng2024attention,
  title   = {Attention as an {RNN}},
  author  = {Feng, Leo and Tung, Frederick and Hajimirsadeghi, Hossein and
             Ahmed, Mohamed Osama and Bengio, Yoshua and Mori, Greg},
  journal = {arXiv preprint arXiv:2405.13956},
  year    = {2024}
}"""
_AAREN_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_LIGHTNET = "undersong.modeling.lightnet.modeling_lightnet"
_LIGHTNET_VISION = "undersong.modeling.lightnet_vision.modeling_lightnet_vision"
_LIGHTNET_CITATION = """@article{qin2024lightnet,
  title   = {You Only Scan Once: Efficient Multi-dimension Sequential Modeling with {LightNet}},
  author  = {Qin, Zhen and Mao, Yuxin and Shen, Xuyang and Li, Dong and Zhang, Jing and Dai, Yuchao and
             Zhong, Yiran},
  journal = {arXiv preprint arXiv:2405.21022},
  year    = {2024}
}"""
_LIGHTNET_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "g_proj.0", "g_proj.1"),
    *("gate_proj", "up_proj", "down_proj"),
)
ROWS = [
    Architecture(
        model_type="aaren",
        config="undersong.modeling.aaren.configuration_aaren:AarenConfig",
        models={
            "AutoModel": f"{_AAREN}:AarenModel",
            "AutoModelForCausalLM": f"{_AAREN}:AarenForCausalLM",
            "AutoModelForSequenceClassification": f"{_AAREN}:AarenForSequenceClassification",
            "TimeSeriesClassification": f"{_AAREN}:AarenForTimeSeriesClassification",
            "AutoModelForTimeSeriesPrediction": f"{_AAREN}_prediction:AarenForPrediction",
            "EventForecasting": f"{_AAREN}_events:AarenForEventForecasting",
        },
        title="Aaren",
        summary="Attention with one learned query per layer as a recurrence: parallel training, O(1) state.",
        paper="Attention as an RNN",
        arxiv="2405.13956",
        citation=_AAREN_CITATION,
        lora_targets=_AAREN_TARGETS,
        feedforward_targets=("down_proj",),
        modalities=("text", "series", "events"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "input_size": 3,
            "prediction_length": 4,
            "num_event_types": 3,
            "num_mixtures": 5,
        },
    ),
    Architecture(
        model_type="aaren_decision_transformer",
        config="undersong.modeling.aaren_decision_transformer.configuration_aaren_decision_transformer"
        ":AarenDecisionTransformerConfig",
        models={
            "AutoModel": "undersong.modeling.aaren_decision_transformer.modeling_aaren_decision_transformer"
            ":AarenDecisionTransformerModel",
        },
        title="Aaren Decision Transformer",
        summary="A Decision Transformer whose state has a fixed size: acting costs the same at every step.",
        paper="Attention as an RNN",
        arxiv="2405.13956",
        citation=_AAREN_CITATION,
        lora_targets=_AAREN_TARGETS,
        feedforward_targets=("down_proj",),
        modalities=("control",),
        has_cache=False,  # forward reads whole episodes; acting step by step is AarenStream's
        example='inputs = {"states": torch.randn(1, 3, model.config.state_dim), "actions": torch.randn(1, 3,'
        ' model.config.act_dim), "returns_to_go": torch.ones(1, 3, 1), "timesteps": torch.arange(3)[None]}',
        tiny={
            "state_dim": 5,
            "act_dim": 2,
            "max_ep_len": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        },
    ),
    Architecture(
        model_type="lightnet",
        config="undersong.modeling.lightnet.configuration_lightnet:LightNetConfig",
        models={
            "AutoModel": f"{_LIGHTNET}:LightNetModel",
            "AutoModelForCausalLM": f"{_LIGHTNET}:LightNetForCausalLM",
            "AutoModelForMaskedLM": f"{_LIGHTNET}:LightNetForMaskedLM",
            "AutoModelForSequenceClassification": f"{_LIGHTNET}:LightNetForSequenceClassification",
        },
        title="LightNet",
        summary="Linear attention with keys normalised over positions: causal with O(1) state, or both ways at once.",
        paper="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        arxiv="2405.21022",
        citation=_LIGHTNET_CITATION,
        lora_targets=_LIGHTNET_TARGETS,
        feedforward_targets=("down_proj",),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "expand_ratio": 8,
            "intermediate_size": 64,
            "gate_low_rank_dim": 16,
            "use_lrpe": True,
            "use_tpe": True,
        },
    ),
    Architecture(
        model_type="lightnet_vision",
        config="undersong.modeling.lightnet_vision.configuration_lightnet_vision:LightNetVisionConfig",
        models={
            "AutoModel": f"{_LIGHTNET_VISION}:LightNetVisionModel",
            "AutoModelForImageClassification": f"{_LIGHTNET_VISION}:LightNetVisionForImageClassification",
        },
        title="LightNet for images",
        summary="Images of any size in one pass of linear cost: keys are normalised over all patches.",
        paper="You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet",
        arxiv="2405.21022",
        citation=_LIGHTNET_CITATION,
        lora_targets=_LIGHTNET_TARGETS,
        feedforward_targets=("down_proj",),
        modalities=("image",),
        causal=False,
        recurrent=False,
        has_cache=False,
        example='inputs = {"pixel_values": torch.rand(1, model.config.num_channels, model.config.image_size,'
        " model.config.image_size)}",
        tiny={
            "image_size": 8,
            "patch_size": 2,
            "num_channels": 2,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "expand_ratio": 8,
            "intermediate_size": 64,
            "gate_low_rank_dim": 16,
        },
    ),
]
