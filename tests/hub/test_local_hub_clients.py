"""The libraries that read HF_ENDPOINT when they are imported, each in a fresh process against a LocalHub."""

import json
import subprocess
import sys


def run(hub, code):
    """Runs code in a fresh interpreter that sees this hub only, and returns what it prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], env=hub.env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_transformers_push_and_load(hub):
    code = """
import json, torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from huggingface_hub import ModelCard
model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=16)).eval()
model.push_to_hub("org/gpt")
with torch.no_grad():
    model.lm_head.weight.add_(1)
pushed = model.push_to_hub("org/gpt", revision="second", commit_message="other weights")
ModelCard("---\\nlicense: mit\\n---\\n# A card").push_to_hub("org/gpt")
x = torch.arange(5)[None]
first = AutoModelForCausalLM.from_pretrained("org/gpt")
second = AutoModelForCausalLM.from_pretrained("org/gpt", revision="second")
pinned = AutoModelForCausalLM.from_pretrained("org/gpt", revision=pushed.oid)
print(json.dumps([
    torch.equal(second(x).logits, model(x).logits), torch.equal(pinned(x).logits, model(x).logits),
    torch.equal(first(x).logits, model(x).logits), ModelCard.load("org/gpt").data.license]))
"""
    assert run(hub, code) == [True, True, False, "mit"]
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("models", "org/gpt"))
    assert hub.commits("models", "org/gpt", "second")[0].title == "other weights"


KERNEL = {
    "build/torch-cpu/__init__.py": b"__all__ = ['double']\n\ndef double(x):\n    return x + x\n",
    "build/torch-cpu/toy_op/__init__.py": b"from .. import *\n",
    "build/torch-cpu/metadata.json": json.dumps(
        {
            "name": "toy-op",
            "id": "_toy_op_cpu_1234567",
            "version": 1,
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": "cpu"},
        }
    ).encode(),
}


def test_kernel_with_trust_check(hub, api):
    api.create_repo("org/toy-op", repo_type="kernel")
    api.create_branch("org/toy-op", branch="v1", repo_type="kernel")
    hub.commit("kernels", "org/toy-op", KERNEL, branch="v1")
    code = """
import json, torch
from kernels import get_kernel
answers = []
for trust in (False, ["other/op"], ["org/toy-op"], True):
    try:
        kernel = get_kernel("org/toy-op", version=1, trust_remote_code=trust)
        answers.append(kernel.double(torch.ones(1)).item())
    except ValueError as error:
        answers.append("not from a trusted publisher" in str(error))
print(json.dumps(answers))
"""
    assert run(hub, code) == [True, True, 2.0, 2.0]
    hub.trusted_publishers.add("org")
    assert run(hub, code) == [2.0, 2.0, 2.0, 2.0]


def test_metric_from_a_space(hub):
    metric = b"""
import datasets
import evaluate


class Share(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        from .helper import share

        return {"share": share(predictions, references)}
"""
    helper = b"def share(a, b):\n    return sum(x == y for x, y in zip(a, b)) / len(a)\n"
    hub.create("spaces", "org/share")
    hub.commit(
        "spaces",
        "org/share",
        {
            "share.py": metric.replace(b"import evaluate\n", b"import evaluate\n\nfrom .helper import share\n", 1),
            "helper.py": helper,
        },
    )
    code = """
import json, evaluate
metric = evaluate.load("org/share")
print(json.dumps(metric.compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 0])))
"""
    assert run(hub, code) == {"share": 0.5}
    assert any(request.path == "/spaces/org/share/resolve/main/share.py" for request in hub.requests)


def test_datasets_push_and_load(hub):
    code = """
import json
from datasets import Dataset, load_dataset
Dataset.from_dict({"x": [1, 2, 3], "y": ["a", "b", "c"]}).push_to_hub("org/data")
print(json.dumps(load_dataset("org/data", split="train")[:]))
"""
    assert run(hub, code) == {"x": [1, 2, 3], "y": ["a", "b", "c"]}
    assert any(path.endswith(".parquet") for path in hub.files("datasets", "org/data"))
