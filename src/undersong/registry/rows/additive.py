"""Additive linear recurrences: the state is a running weighted average."""

from ..architecture import Architecture

_AAREN = "undersong.modeling.aaren.modeling_aaren"
ROWS = [
    Architecture(
        model_type="aaren",
        config="undersong.modeling.aaren.configuration_aaren:AarenConfig",
        models={
            "AutoModel": f"{_AAREN}:AarenModel",
            "AutoModelForCausalLM": f"{_AAREN}:AarenForCausalLM",
            "AutoModelForSequenceClassification": f"{_AAREN}:AarenForSequenceClassification",
            "TimeSeriesClassification": f"{_AAREN}:AarenForTimeSeriesClassification",
        },
        title="Aaren",
        summary="Attention with one learned query per layer as a recurrence: parallel training, O(1) state.",
        paper="Attention as an RNN",
        arxiv="2405.13956",
        citation="""@article{feng2024attention,
  title   = {Attention as an {RNN}},
  author  = {Feng, Leo and Tung, Frederick and Hajimirsadeghi, Hossein and
             Ahmed, Mohamed Osama and Bengio, Yoshua and Mori, Greg},
  journal = {arXiv preprint arXiv:2405.13956},
  year    = {2024}
}""",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        feedforward_targets=("down_proj",),
        modalities=("text", "series"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "input_size": 3,
        },
    ),
]
