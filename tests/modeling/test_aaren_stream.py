"""A stream answers as the whole series does, costs the same for ever, and leaves for the edge."""

import io

import pytest
import torch

from undersong.modeling.aaren_stream import AarenStream
from undersong.registry import ARCHITECTURES

from ..common.cases import build, make_inputs

AAREN = ARCHITECTURES["aaren"]
HEADS = ["AutoModelForCausalLM", "TimeSeriesClassification", "AutoModelForTimeSeriesPrediction", "EventForecasting"]


def model_and_inputs(head, batch=2, length=9):
    model = build(AAREN, head, dtype=torch.float64, scaling=None)
    return model, tuple(make_inputs(model, batch, length).values())


def whole(head, model, inputs):
    """What the model says about every prefix."""
    if head in ("AutoModelForCausalLM", "EventForecasting"):
        outputs = model(*inputs)
        return outputs.logits if head == "AutoModelForCausalLM" else outputs.gap_parameters
    name = "logits" if head == "TimeSeriesClassification" else "prediction_outputs"
    return torch.stack([model(inputs[0][:, : end + 1])[name] for end in range(inputs[0].shape[1])], 1)


def tensor_of(answer):
    return answer["gap_parameters"] if isinstance(answer, dict) else answer


@pytest.mark.parametrize("lengths", [[1] * 9, [4, 1, 4], [9]], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_any_split_answers_as_the_whole_series(head, lengths):
    model, inputs = model_and_inputs(head)
    stream = AarenStream(model, batch_size=2, dtype=torch.float64)
    parts = zip(*(x.split(lengths, 1) for x in inputs), strict=True)
    got = torch.cat([tensor_of(stream.update(*part)) for part in parts], 1)
    with torch.no_grad():
        torch.testing.assert_close(got, whole(head, model, inputs), rtol=0, atol=1e-9)
    assert stream.state[3].tolist() == [9, 9]


def test_events_are_forecast_at_the_same_times_and_of_the_same_kinds():
    model, inputs = model_and_inputs("EventForecasting")
    stream = AarenStream(model, batch_size=2, dtype=torch.float64)
    answers = [stream.update(*(x[:, i : i + 1] for x in inputs)) for i in range(9)]
    with torch.no_grad():
        want = model(*inputs)
    for key in ("type_logits", "next_time_mean"):
        torch.testing.assert_close(torch.cat([a[key] for a in answers], 1), want[key], rtol=1e-9, atol=1e-9)


def test_embeddings_and_classified_text_stream_too():
    model = build(AAREN, dtype=torch.float64)
    embeds = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64)
    stream = AarenStream(model, batch_size=2)
    got = torch.cat([stream.update(x) for x in embeds.split(1, 1)], 1)
    torch.testing.assert_close(got, model(inputs_embeds=embeds).last_hidden_state, rtol=0, atol=1e-9)
    model = build(AAREN, "AutoModelForSequenceClassification", dtype=torch.float64)
    ids = torch.randint(1, 99, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            AarenStream(model, batch_size=2).update(ids)[:, -1], model(ids).logits, rtol=0, atol=1e-9
        )


def test_reset_forgets_and_the_state_never_grows():
    model, inputs = model_and_inputs("TimeSeriesClassification", length=30)
    stream = AarenStream(model, batch_size=2)
    sizes = [x.shape for x in stream.state]
    first = stream.update(inputs[0])
    assert [x.shape for x in stream.state] == sizes
    stream.reset()
    assert torch.equal(stream.update(inputs[0]), first)


@pytest.mark.parametrize("head", HEADS)
def test_the_exported_step_equals_the_stream_and_survives_saving(head):
    model, inputs = model_and_inputs(head, length=3)
    stream = AarenStream(model, batch_size=2, dtype=torch.float64)
    pieces = [tuple(x[:, i : i + 1] for x in inputs) for i in range(3)]
    file = io.BytesIO()
    torch.export.save(stream.export(*pieces[0]), file)
    file.seek(0)
    step, state = torch.export.load(file).module(), stream.state
    for piece in pieces:
        answer, state = step(piece, state)
        torch.testing.assert_close(tensor_of(answer), tensor_of(stream.update(*piece)), rtol=0, atol=1e-12)


def test_half_precision_keeps_float32_states():
    model = build(AAREN, "TimeSeriesClassification").to(torch.bfloat16)
    stream = AarenStream(model)
    assert stream.update(torch.randn(1, 2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert {x.dtype for x in stream.state if x.is_floating_point()} == {torch.float32}


def test_what_cannot_stream_is_refused():
    with pytest.raises(TypeError, match=r"model \(Linear\) cannot stream"):
        AarenStream(torch.nn.Linear(2, 2))
    model = build(AAREN, "AutoModelForTimeSeriesPrediction")
    with pytest.raises(ValueError, match=r"scaling \('std'\) looks at a whole series"):
        AarenStream(model).update(torch.zeros(1, 1, 3))
