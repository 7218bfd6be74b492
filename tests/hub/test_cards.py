"""Cards: metadata the Hub understands, examples that run, numbers that say where they come from."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from undersong import registry
from undersong.hub import export, model_card

AAREN = registry.ARCHITECTURES["aaren"]
POINTER = registry.ARCHITECTURES["pointer-network"]
RESULTS = {
    "hardware": {"device": "Some CPU", "cpu_count": 2, "gpu": None},
    "command": "python benchmarks/digits.py",
    "results": [
        {
            "task_type": "time-series-classification",
            "dataset_type": "digits",
            "dataset_name": "digits",
            "dataset_split": "test",
            "metric_type": "accuracy",
            "metric_value": 0.9625,
        },
        {
            "task_type": "time-series-classification",
            "dataset_type": "digits",
            "dataset_name": "digits",
            "metric_type": "seconds",
            "metric_value": 12,
            "hardware": "one H100",
            "command": "python benchmarks/speed.py",
        },
    ],
}


def changed(**entry):
    return {**RESULTS, "results": [RESULTS["results"][0] | entry]}


def test_metadata_and_sections_come_from_the_registry():
    card = model_card(AAREN, repo_id="me/aaren", datasets=["me/songs"], limitations="Small.", training_data="Songs.")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "datasets": ["me/songs"],
        "tags": ["undersong", "aaren", "arxiv:2405.13956"],
    }
    sections = re.findall(r"^## (.+)$", card.text, flags=re.MULTILINE)
    assert sections == ["Use", "Training data", "Numbers", "Limitations", "Citation"]
    for part in (AAREN.citation, AAREN.summary, "Songs.", "Small.", "None measured."):
        assert part in card.text
    assert "time-series-classification" in model_card(AAREN, head="TimeSeriesClassification").data.tags


def test_results_become_a_table_and_a_model_index(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    card = model_card(AAREN, results=path, repo_id="me/aaren")
    assert card.content == model_card(AAREN, results=RESULTS, repo_id="me/aaren").content
    assert "| time-series-classification | digits (test) | accuracy | 0.9625 | 1 |" in card.text
    assert "| time-series-classification | digits | seconds | 12 | 2 |" in card.text
    assert "Run 1, on device Some CPU, cpu_count 2:\n\n```bash\npython benchmarks/digits.py\n```" in card.text
    assert "Run 2, on one H100:\n\n```bash\npython benchmarks/speed.py\n```" in card.text
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.model_name == "aaren"
    assert [(r.metric_type, r.metric_value) for r in again.data.eval_results] == [
        ("accuracy", 0.9625),
        ("seconds", 12),
    ]


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({**RESULTS, "hardware": None}, r"result \(accuracy on digits\) has no hardware"),
        ({**RESULTS, "command": ""}, r"result \(accuracy on digits\) has no command; a number must say"),
        (changed(metric_value="0.96"), r"metric_value \('0.96'\) of result \(accuracy on digits\) must be a finite"),
        (changed(metric_value=float("nan")), r"metric_value \(nan\)"),
        (changed(metric_value=True), r"metric_value \(True\)"),
        (changed(f1=0.5), r"unknown fields \['f1'\]"),
        ({**RESULTS, "results": [{"metric_type": "f1", "metric_value": 1.0}]}, r"result \(f1 on None\) is incomplete"),
    ],
)
def test_a_number_without_its_origin_is_refused(results, message):
    with pytest.raises(ValueError, match=message):
        model_card(AAREN, results=results)


def test_both_examples_of_a_card_run(tmp_path):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "The": 3, "refrain": 4}, unk_token="<unk>")
        ),
        unk_token="<unk>",
        eos_token="</s>",
    )
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    blocks = []
    for row, head in [*((AAREN, head) for head in AAREN.models), *((POINTER, head) for head in POINTER.models)]:
        config = row.config_class()(**row.tiny, num_labels=10)
        with_tokenizer = tokenizer if head == "AutoModelForCausalLM" else None
        folder = export(
            row.model_class(head)(config).eval(),
            tmp_path / f"{row.model_type}-{head.lower()}",
            tokenizer=with_tokenizer,
        )
        found = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
        assert len(found) == 2
        blocks.append(found)
    absent = "import sys; sys.modules['undersong'] = None\n"  # makes every import of it an ImportError
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    outputs = []
    for start, scripts in zip([absent, ""], zip(*blocks, strict=True), strict=True):
        code = start + "".join(f"exec({'import torch; torch.manual_seed(1); ' + chr(10) + s!r})\n" for s in scripts)
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        outputs.append(run.stdout)
    assert outputs[0] == outputs[1]
    assert "torch.Size([1, 4, 32])" in outputs[0]
    assert "torch.Size([1, 1, 16])\ntensor([[0, " in outputs[0], "a pointer network's first state, then its answer"


def test_the_card_of_a_type_that_transformers_owns_says_which_class_comes_without_remote_code():
    says = "load the same weights into `transformers`' own class"
    card = model_card(registry.ARCHITECTURES["mamba"], repo_id="me/mamba")
    assert says in " ".join(card.content.split())
    assert "from undersong import FastMambaForCausalLM" in card.content
    missing = model_card(registry.ARCHITECTURES["mamba"], repo_id="me/mamba", head="AutoModelForTokenClassification")
    assert says not in " ".join(missing.content.split())
    assert missing.data.pipeline_tag == "token-classification"
    assert says not in model_card(registry.ARCHITECTURES["aaren"]).content
