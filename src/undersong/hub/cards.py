"""Model cards from the registry and from measured results; a number without its hardware and command is refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

_TEMPLATE = Path(__file__).with_name("card_template.md")


@dataclass(frozen=True)
class _Head:
    """What a card says about a kind of model: `inputs` and `call` are Python lines of its example."""

    pipeline_tag: str | None
    inputs: str
    call: str
    tag: str | None = None


_IDS = 'inputs = {"input_ids": torch.tensor([[1, 2, 3, 4]])}'
_HEADS = {
    "AutoModel": _Head("feature-extraction", _IDS, "print(model(**inputs).last_hidden_state.shape)"),
    "AutoModelForCausalLM": _Head(
        "text-generation", _IDS, "print(model.generate(**inputs, max_new_tokens=8, do_sample=False))"
    ),
    "AutoModelForMaskedLM": _Head("fill-mask", _IDS, "print(model(**inputs).logits.argmax(-1))"),
    "AutoModelForSeq2SeqLM": _Head(None, _IDS, "print(model.generate(**inputs, do_sample=False))"),
    "AutoModelForSequenceClassification": _Head(
        "text-classification", _IDS, "print(model(**inputs).logits.softmax(-1))"
    ),
    "AutoModelForTokenClassification": _Head("token-classification", _IDS, "print(model(**inputs).logits.argmax(-1))"),
    "TimeSeriesClassification": _Head(
        None,
        'inputs = {"past_values": torch.randn(1, 64, model.config.input_size)}  # [batch, length, channels]',
        "print(model(**inputs).logits.softmax(-1))",
        tag="time-series-classification",
    ),
    "AutoModelForTimeSeriesPrediction": _Head(
        "time-series-forecasting",
        'inputs = {"past_values": torch.randn(1, 64, model.config.input_size)}  # [batch, length, channels]',
        "print(model(**inputs).prediction_outputs.shape)",
    ),
    "AutoModelForImageClassification": _Head(
        "image-classification",
        "size = model.config.image_size\n"
        'inputs = {"pixel_values": torch.rand(1, model.config.num_channels, size, size)}',
        "print(model(**inputs).logits.softmax(-1))",
    ),
    "AutoModelForSequentialRecommendation": _Head(
        None,
        "histories = torch.tensor([[3, 5, 8]])  # item ids, oldest first; lists of lists hold external ids",
        "print(model.recommend(histories, k=5).item_ids)",
        tag="sequential-recommendation",
    ),
    "EventForecasting": _Head(
        None,
        'inputs = {"event_times": torch.tensor([[0.0, 0.7, 1.9]]), "event_types": torch.tensor([[0, 1, 0]])}',
        "outputs = model(**inputs)\nprint(outputs.next_time_mean[:, -1], outputs.type_logits[:, -1].softmax(-1))",
        tag="event-forecasting",
    ),
}
_TEXT = 'inputs = AutoTokenizer.from_pretrained("{model_id}"{trust})("The refrain", return_tensors="pt")'


def model_card(
    model_or_row,
    *,
    results=None,
    repo_id=None,
    head=None,
    tokenizer=False,
    training_data=None,
    datasets=None,
    limitations=None,
):
    """Makes the Hub card of a model: metadata, a runnable example, training data, numbers, limitations, citation.

    Args:
        model_or_row: a model, or a row of `undersong.registry.ARCHITECTURES`.
        results: dict, or path of a JSON file, `{"hardware": ..., "command": ..., "results": [...]}`. Each entry has
            the fields of `huggingface_hub.EvalResult` (task_type, dataset_type, dataset_name, metric_type,
            metric_value; others are optional) and may have its own hardware and command. `hardware` is text or a dict.
        repo_id: what the example's `from_pretrained` gets; the model type if None.
        head: key of the row's `models` that the example uses; the model's own, or the row's first after the
            backbone, if None.
        tokenizer: whether a tokenizer lies beside the model, so that the example can start from text.
        training_data, limitations: Markdown text of those sections.
        datasets: Hub ids of the training data, for the metadata.

    Returns:
        `huggingface_hub.ModelCard`; `card.save(path)` writes it.

    Raises:
        ValueError: a result lacks hardware or command, names an unknown field, or its value is not a finite number.

    >>> from undersong.registry import ARCHITECTURES
    >>> card = model_card(ARCHITECTURES["aaren"], repo_id="me/aaren")
    >>> card.data.library_name, "2405.13956" in card.content
    ('transformers', True)
    """
    from huggingface_hub import ModelCard, ModelCardData

    from undersong.registry import Architecture, is_stock_head

    if isinstance(model_or_row, Architecture):
        row = model_or_row
        head = head or next((name for name in row.models if name != "AutoModel"), "AutoModel")
        class_path = row.models[head]
        model_type = row.model_type
    else:
        from .export import auto_class_name, registry_entry

        cls = type(model_or_row)
        row, found = registry_entry(cls)
        head = head or found or auto_class_name(cls)
        class_path = row.models[head] if row is not None else f"{cls.__module__}:{cls.__name__}"
        model_type = model_or_row.config.model_type
    kind = _HEADS.get(head, _Head(None, _IDS, "print(model(**inputs))"))
    if row is not None and row.example is not None:
        kind = replace(kind, inputs=row.example)
    model_id = repo_id or model_type
    numbers = _read_results(results)
    data = ModelCardData(
        library_name="transformers",
        license=row.license if row is not None else None,
        pipeline_tag=kind.pipeline_tag,
        tags=[tag for tag in ("undersong", model_type, kind.tag, row and f"arxiv:{row.arxiv}") if tag],
        datasets=datasets,
        model_name=model_id.rpartition("/")[2] if numbers else None,
        eval_results=[number.result for number in numbers] or None,
    )
    text_in = tokenizer and kind.inputs is _IDS
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        row=row,
        model_id=model_id,
        title=row.title if row is not None else class_path.rpartition(":")[2],
        own=_import_line(class_path),
        class_name=class_path.rpartition(":")[2],
        auto_class=_auto_class(head),
        text_in=text_in,
        stock_head=row is not None and is_stock_head(row, head),
        backbone_instead=row is not None and head not in ("AutoModel", _auto_class(head)),
        # where the type is unknown, AutoTokenizer reads the configuration too, and that is code of the repository
        remote_inputs=_TEXT.format(model_id=model_id, trust=", trust_remote_code=True") if text_in else kind.inputs,
        inputs=_TEXT.format(model_id=model_id, trust="") if text_in else kind.inputs,
        call=kind.call,
        numbers=numbers,
        runs=list(dict.fromkeys((number.hardware, number.command) for number in numbers)),
        training_data=training_data,
        limitations=limitations,
    )


def _auto_class(head):
    import transformers

    return head if hasattr(transformers, head) else "AutoModel"


def _import_line(class_path):
    import undersong

    module, _, name = class_path.partition(":")
    return f"from undersong import {name}" if name in undersong.__all__ else f"from {module} import {name}"


@dataclass(frozen=True)
class _Number:
    result: object  # huggingface_hub.EvalResult
    hardware: str
    command: str


def _read_results(results):
    from huggingface_hub import EvalResult

    if results is None:
        return []
    if isinstance(results, (str, os.PathLike)):
        results = json.loads(Path(results).read_text(encoding="utf-8"))
    known = {field.name for field in fields(EvalResult)}
    numbers = []
    for entry in results["results"]:
        entry = {"hardware": results.get("hardware"), "command": results.get("command"), **entry}
        label = f"{entry.get('metric_type')} on {entry.get('dataset_name')}"
        for needed in ("hardware", "command"):
            if not entry[needed]:
                raise ValueError(f"result ({label}) has no {needed}; a number must say what produced it and where.")
        hardware, command = entry.pop("hardware"), entry.pop("command")
        if isinstance(hardware, dict):
            hardware = ", ".join(f"{key} {value}" for key, value in hardware.items() if value is not None)
        if unknown := sorted(set(entry) - known):
            raise ValueError(f"result ({label}) has unknown fields {unknown}; they must be fields of EvalResult.")
        value = entry.get("metric_value")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"metric_value ({value!r}) of result ({label}) must be a finite number.")
        try:
            numbers.append(_Number(EvalResult(**entry), hardware, command))
        except TypeError as error:
            raise ValueError(f"result ({label}) is incomplete: {error}.") from None
    return numbers
