"""What `hub_configs/` holds loads, and does what its card says."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong import AarenForTimeSeriesClassification
from undersong.data import digits

FOLDER = Path(__file__).parents[2] / "hub_configs" / "aaren-digits"


def test_the_digits_model_reaches_the_accuracies_of_its_card():
    model, info = AarenForTimeSeriesClassification.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    results = ModelCard.load(FOLDER / "README.md").data.eval_results
    assert {result.dataset_split for result in results} == {"validation", "test"}
    data = digits()
    for result in results:
        split = data[result.dataset_split]
        with torch.no_grad():
            right = model.eval()(past_values=split.past_values).logits.argmax(-1) == split.labels
        # four decimals on the card; one digit in 360 may tip on another CPU
        assert right.float().mean().item() == pytest.approx(result.metric_value, abs=0.003)
