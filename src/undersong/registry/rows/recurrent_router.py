"""Mixtures of experts whose routers recur over the layers."""

from ..architecture import Architecture

_RMOE = "undersong.modeling.rmoe.modeling_rmoe"
_RMOE_CITATION = """@inproceedings{qiu2025layerwise,
  title     = {Layerwise Recurrent Router for Mixture-of-Experts},
  author    = {Qiu, Zihan and Huang, Zeyu and Cheng, Shuang and Zhou, Yizhi and Wang, Zili and
               Titov, Ivan and Fu, Jie},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025}
}"""
ROWS = [
    Architecture(
        model_type="rmoe",
        config="undersong.modeling.rmoe.configuration_rmoe:RMoEConfig",
        models={
            "AutoModel": f"{_RMOE}:RMoEModel",
            "AutoModelForCausalLM": f"{_RMOE}:RMoEForCausalLM",
            "AutoModelForSequenceClassification": f"{_RMOE}:RMoEForSequenceClassification",
            "AutoModelForTokenClassification": f"{_RMOE}:RMoEForTokenClassification",
        },
        title="RMoE",
        summary="A mixture of experts whose router carries a state up the layers, through one cell all layers share.",
        paper="Layerwise Recurrent Router for Mixture-of-Experts",
        arxiv="2408.06793",
        citation=_RMOE_CITATION,
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        recurrent=False,
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
            "router_hidden_size": 16,
            "max_position_embeddings": 128,
        },
    ),
    *(
        Architecture(
            model_type=f"rmoe_{family}",
            config=f"undersong.modeling.rmoe_{family}.configuration_rmoe_{family}:RMoE{name}Config",
            models={
                head: f"undersong.modeling.rmoe_{family}.modeling_rmoe_{family}:RMoE{name}{suffix}"
                for head, suffix in (("AutoModel", "Model"), ("AutoModelForCausalLM", "ForCausalLM"))
            },
            title=f"{title} with a recurrent router",
            summary=f"{title} after attach_recurrent_router: experts are chosen with a memory of layers below.",
            paper="Layerwise Recurrent Router for Mixture-of-Experts",
            arxiv="2408.06793",
            citation=_RMOE_CITATION,
            lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
            recurrent=False,
            tiny={
                "vocab_size": 99,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_experts_per_tok": 2,
                "recurrent_router": {"router_hidden_size": 16, "router_type": "gru", "mode": "residual"},
                "max_position_embeddings": 128,
                **tiny,
            },
        )
        for family, name, title, tiny in (
            ("mixtral", "Mixtral", "Mixtral", {"num_local_experts": 4}),
            ("olmoe", "Olmoe", "OLMoE", {"num_experts": 4, "eos_token_id": 2}),
            ("qwen3_moe", "Qwen3Moe", "Qwen3-MoE", {"num_local_experts": 4, "moe_intermediate_size": 16}),
        )
    ),
]
