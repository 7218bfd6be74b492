"""Networks that read sets and point at their items."""

from ..architecture import Architecture

_POINTER = "undersong.modeling.pointer_network.modeling_pointer_network"
_SET2SET = "undersong.modeling.set2set.modeling_set2set"
ROWS = [
    Architecture(
        model_type="pointer-network",
        config="undersong.modeling.pointer_network.configuration_pointer_network:PointerNetworkConfig",
        models={
            "AutoModel": f"{_POINTER}:PointerNetworkModel",
            "AutoModelForSeq2SeqLM": f"{_POINTER}:PointerNetworkForConditionalGeneration",
        },
        title="Pointer network",
        summary="Answers with positions of its own input: hulls, tours, orders, selections, by stock generate().",
        paper="Pointer Networks",
        arxiv="1506.03134",
        citation="""@inproceedings{vinyals2015pointer,
  title     = {Pointer Networks},
  author    = {Vinyals, Oriol and Fortunato, Meire and Jaitly, Navdeep},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2015}
}""",
        lora_targets=("key_proj", "query_proj"),
        modalities=("points", "text"),
        causal=False,
        seq2seq=True,
        example='inputs = {"input_values": torch.rand(1, 10, model.config.input_size)}  # [batch, items, numbers]',
        tiny={"input_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_glimpses": 1},
    ),
    Architecture(
        model_type="set2set",
        config="undersong.modeling.set2set.configuration_set2set:Set2SetConfig",
        models={
            "AutoModel": f"{_SET2SET}:Set2SetModel",
            "AutoModelForSequenceClassification": f"{_SET2SET}:Set2SetForSequenceClassification",
        },
        title="Set2Set",
        summary="Encodes sets, of vectors or of token ids, whatever the order of their elements.",
        paper="Order Matters: Sequence to sequence for sets",
        arxiv="1511.06391",
        citation="""@inproceedings{vinyals2016order,
  title     = {Order Matters: Sequence to sequence for sets},
  author    = {Vinyals, Oriol and Bengio, Samy and Kudlur, Manjunath},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2016}
}""",
        lora_targets=("dense",),
        modalities=("points", "text"),
        causal=False,
        recurrent=False,
        has_cache=False,
        tiny={"vocab_size": 99, "hidden_size": 32, "read_hidden_sizes": [24], "num_process_steps": 3},
    ),
]
