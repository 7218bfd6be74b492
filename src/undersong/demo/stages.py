"""Stages "train" and "hub": a model of ours learns, travels through a Hub, and comes back without undersong."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..data.digits import digits
from ..hub import LocalHub, export, model_card
from .recipe import EPOCHS, LEARNING_RATES, NOISE, config, predict, train

__all__ = ["card", "round_trip", "train_both"]

REPO = "undersong/aaren-digits"

# What a user without undersong would run, less the first line, which hides undersong from that process.
_ELSEWHERE = """
import sys; sys.modules["undersong"] = None
import json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
repo, folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
try:
    import undersong
except ImportError:
    pass
else:
    raise SystemExit("undersong can be imported here")
# disable_mmap: in a mapped file weights start at any multiple of 8 bytes, for which CPU kernels may round differently
model = AutoModel.from_pretrained(repo, trust_remote_code=True, disable_mmap=True).eval()
with torch.no_grad():
    logits = model(**load_file(folder + "/inputs.safetensors")).logits
save_file({"logits": logits}, folder + "/logits.safetensors")
print(json.dumps({"class": type(model).__name__, "module": type(model).__module__}))
"""


def train_both(*, epochs=EPOCHS, seed=0, data=None, advance=lambda: None):
    """Trains Aaren and the Transformer of the same size.

    Args:
        advance: called after every epoch of either model.

    Returns:
        `(result, models)`: a dict of plain values (`data` sizes, `models`: facts per kind, `example`: one test series
        with its label and Aaren's probabilities), and the trained models by kind.
    """
    data = data or digits()
    trained = {kind: train(kind, epochs=epochs, seed=seed, data=data, advance=advance) for kind in LEARNING_RATES}
    models = {kind: run.model for kind, run in trained.items()}
    test = data["test"]
    probabilities = predict(models["aaren"], test.past_values[:1]).softmax(-1)[0]
    result = {
        "data": {name: len(part) for name, part in data.items()},
        "models": {kind: run.facts() for kind, run in trained.items()},
        "example": {
            "values": test.past_values[0, :, 0].tolist(),
            "label": int(test.labels[0]),
            "probabilities": probabilities.tolist(),
        },
    }
    return result, models


def card(model, facts, *, hardware, command, repo_id=REPO):
    """The Hub card of a digits model.

    Args:
        facts: `Trained.facts()` of the run that made it.
        hardware, command: where and how the accuracies were measured.
    """
    number = {
        "task_type": "time-series-classification",
        "dataset_type": "digits",
        "dataset_name": "scikit-learn digits as 64-step series",
        "metric_type": "accuracy",
    }
    results = [
        number | {"dataset_split": split, "metric_value": round(facts[split], 4)} for split in ("validation", "test")
    ]
    return model_card(
        model,
        repo_id=repo_id,
        results={"hardware": hardware, "command": command, "results": results},
        training_data=(
            "1,077 of scikit-learn's 1,797 handwritten digits (8 x 8 pixels), read row by row as series of 64 steps "
            f"with values in [0, 1] and noise of standard deviation {NOISE}; {facts['epochs']} epochs of AdamW with "
            "label smoothing and a peak learning rate of "
            f"{facts['learning_rate']}, seed {facts['seed']} (`undersong.demo.recipe`)."
        ),
        limitations=(
            "A demonstration on small images of centred digits. It knows series of 64 steps at most "
            f"(learned positions), one channel, and {config().num_labels} classes."
        ),
    )


def round_trip(model, inputs, *, model_card=None):
    """Publishes a series classifier to a Hub on this machine and loads it back in a process without undersong.

    Args:
        model: a trained `AarenForTimeSeriesClassification`.
        inputs: `[batch, length, channels]` to compare the logits on.
        model_card: of the exported folder; the standard card if None.

    Returns:
        Dict of plain values: `repo`, `files` (name -> bytes), `loaded_class`, `loaded_module`, `commit`, `series`,
        `bit_equal`, `largest_difference`, `seconds`.

    Raises:
        RuntimeError: a process failed; its last lines are in the message.
    """
    start = time.perf_counter()
    with LocalHub() as hub, tempfile.TemporaryDirectory() as scratch:
        folder = export(model, Path(scratch) / REPO.partition("/")[2], card=model_card)
        save_file({"past_values": inputs.contiguous()}, f"{scratch}/inputs.safetensors")
        # both in processes of their own: huggingface_hub reads the environment, HF_HUB_OFFLINE included, when imported
        command = ["-m", "undersong.cli", "publish", str(folder), REPO]
        _process("publishing", command, hub.env(), scratch)
        command = ["-c", _ELSEWHERE, REPO, scratch, str(torch.get_num_threads())]
        loaded = json.loads(_process("loading", command, hub.env(), scratch).splitlines()[-1])
        theirs = load_file(f"{scratch}/logits.safetensors")["logits"]
        ours = predict(model, inputs)
        return {
            "repo": REPO,
            "files": {name: len(content) for name, content in hub.files("models", REPO).items()},
            "commit": hub.commits("models", REPO)[0].oid,
            "loaded_class": loaded["class"],
            "loaded_module": loaded["module"],
            "series": len(inputs),
            "bit_equal": torch.equal(ours, theirs),
            "largest_difference": (ours - theirs).abs().max().item(),
            "seconds": time.perf_counter() - start,
        }


def _process(doing, arguments, env, folder):
    run = subprocess.run([sys.executable, *arguments], env=env, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        last = " | ".join(run.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{doing} {REPO} failed: {last}")
    return run.stdout.strip()
