"""State-space models: diagonal linear recurrences, with and without input-dependent gates."""

from ..architecture import Architecture

_MAMBA = "undersong.modeling.mamba.modeling_mamba"
_MAMBA2 = "undersong.modeling.mamba2.modeling_mamba2"
_S4D = "undersong.modeling.s4d.modeling_s4d"
_S5 = "undersong.modeling.s5.modeling_s5"
ROWS = [
    Architecture(
        model_type="mamba",
        config="transformers.models.mamba.configuration_mamba:MambaConfig",
        models={
            "AutoModel": f"{_MAMBA}:FastMambaModel",
            "AutoModelForCausalLM": f"{_MAMBA}:FastMambaForCausalLM",
            "AutoModelForSequenceClassification": f"{_MAMBA}:FastMambaForSequenceClassification",
            "AutoModelForTokenClassification": f"{_MAMBA}:FastMambaForTokenClassification",
        },
        title="Mamba",
        summary="transformers' Mamba, same checkpoints: right for padding, packing and chunks, fast on any device.",
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
        arxiv="2312.00752",
        citation="""@article{gu2023mamba,
  title   = {Mamba: Linear-Time Sequence Modeling with Selective State Spaces},
  author  = {Gu, Albert and Dao, Tri},
  journal = {arXiv preprint arXiv:2312.00752},
  year    = {2023}
}""",
        # dt_proj works too, but only in our classes: transformers' own reads its weight past the adapter
        lora_targets=("in_proj", "x_proj"),
        stock_owned=True,
        tiny={"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4},
    ),
    Architecture(
        model_type="mamba2",
        config="transformers.models.mamba2.configuration_mamba2:Mamba2Config",
        models={
            "AutoModel": f"{_MAMBA2}:FastMamba2Model",
            "AutoModelForCausalLM": f"{_MAMBA2}:FastMamba2ForCausalLM",
            "AutoModelForSequenceClassification": f"{_MAMBA2}:FastMamba2ForSequenceClassification",
            "AutoModelForTokenClassification": f"{_MAMBA2}:FastMamba2ForTokenClassification",
        },
        title="Mamba-2",
        summary="transformers' Mamba-2, same checkpoints: right for padding, packing and chunks, fast on any device.",
        paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space"
        " Duality",
        arxiv="2405.21060",
        citation="""@inproceedings{dao2024transformers,
  title     = {Transformers are {SSM}s: Generalized Models and Efficient Algorithms
               Through Structured State Space Duality},
  author    = {Dao, Tri and Gu, Albert},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2024}
}""",
        lora_targets=("in_proj",),
        stock_owned=True,
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,  # with more, transformers 5.22 computes something else
            "chunk_size": 8,
        },
    ),
    Architecture(
        model_type="s4d",
        config="undersong.modeling.s4d.configuration_s4d:S4DConfig",
        models={
            "AutoModel": f"{_S4D}:S4DModel",
            "AutoModelForCausalLM": f"{_S4D}:S4DForCausalLM",
            "AutoModelForSequenceClassification": f"{_S4D}:S4DForSequenceClassification",
            "TimeSeriesClassification": f"{_S4D}:S4DForTimeSeriesClassification",
        },
        title="S4D",
        summary="A diagonal state space in every channel: trains as a long convolution, decodes with an O(1) state.",
        paper="On the Parameterization and Initialization of Diagonal State Space Models",
        arxiv="2206.11893",
        citation="""@inproceedings{gu2022parameterization,
  title     = {On the Parameterization and Initialization of Diagonal State Space Models},
  author    = {Gu, Albert and Gupta, Ankit and Goel, Karan and R{\\'e}, Christopher},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2022}
}""",
        lora_targets=("out_proj",),
        modalities=("text", "series"),
        tiny={"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "input_size": 3},
    ),
    Architecture(
        model_type="s5",
        config="undersong.modeling.s5.configuration_s5:S5Config",
        models={
            "AutoModel": f"{_S5}:S5Model",
            "AutoModelForCausalLM": f"{_S5}:S5ForCausalLM",
            "AutoModelForSequenceClassification": f"{_S5}:S5ForSequenceClassification",
            "TimeSeriesClassification": f"{_S5}:S5ForTimeSeriesClassification",
        },
        title="S5",
        summary="One diagonal state space a layer, by parallel scan: O(1) state, steps of any size between tokens.",
        paper="Simplified State Space Layers for Sequence Modeling",
        arxiv="2208.04933",
        citation="""@inproceedings{smith2023simplified,
  title     = {Simplified State Space Layers for Sequence Modeling},
  author    = {Smith, Jimmy T. H. and Warrington, Andrew and Linderman, Scott W.},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2023}
}""",
        lora_targets=("out_proj",),
        modalities=("text", "series"),
        tiny={
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_blocks": 2,
            "input_size": 3,
        },
    ),
]
