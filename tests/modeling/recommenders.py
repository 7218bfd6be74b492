"""Small recommenders for tests, with weights large enough that every part of them matters."""

import torch

from undersong.modeling.bert4rec.configuration_bert4rec import SequentialRecConfig
from undersong.modeling.bert4rec.modeling_bert4rec import BertForSequentialRecommendation
from undersong.modeling.gsasrec.configuration_gsasrec import GSASRecConfig
from undersong.modeling.gsasrec.modeling_gsasrec import GSASRecForSequentialRecommendation

CLASSES = {
    "bert4rec": (SequentialRecConfig, BertForSequentialRecommendation),
    "gsasrec": (GSASRecConfig, GSASRecForSequentialRecommendation),
}
SIZES = {
    "num_items": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "initializer_range": 0.5,
}


def recommender(kind, dtype=torch.float32, seed=0, **options):
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(seed)
    model = model_class(config_class(**SIZES | options)).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model
