"""What `hub_configs/` holds loads, and does what its card says."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong import AarenForEventForecasting, AarenForTimeSeriesClassification
from undersong.data import digits
from undersong.data.point_processes import HawkesProcess

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


def test_the_event_model_reaches_the_figures_of_its_card():
    folder = FOLDER.with_name("aaren-events")
    model, info = AarenForEventForecasting.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    process = HawkesProcess(base_rates=(0.2, 0.1), excitation=((0.5, 0.2), (0.4, 0.3)), decay=4.0)
    times, types = process.sample(500, 64, generator=torch.Generator().manual_seed(2))  # the test streams
    with torch.no_grad():
        outputs = model.eval()(times, types)
    median = model.next_gap(outputs.gap_parameters).quantile(0.5)[:, :-1]
    found = {
        "nll": outputs.loss.item(),
        "time_rmse": (median - times.diff(dim=1)).square().mean().sqrt().item(),
        "kind_accuracy": (outputs.type_logits[:, :-1].argmax(-1) == types[:, 1:]).double().mean().item(),
    }
    results = ModelCard.load(folder / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in results} == pytest.approx(found, abs=1e-3)
