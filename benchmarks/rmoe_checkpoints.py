"""Writes what `bench_rmoe.py` trained for the retrofit as two Hub repositories: the base, and the router for it."""

import shutil
from pathlib import Path

import torch
from rmoe_training import BALANCING, Job, Training, build
from safetensors.torch import load_file
from transformers import OlmoeForCausalLM

from undersong import load_recurrent_router

BASE, ROUTER = "rmoe-retrofit-base", "rmoe-retrofit-router"
OWNER = "undersong"
LARGEST = 8 << 20  # bytes of the base

CARD = """---
library_name: {library}
license: apache-2.0
{more}tags:
- undersong
- {tag}
- arxiv:2408.06793
---

# {title}

{text}

## Figures

| bits a byte of held-out Python sources | |
| --- | --- |
| the base, as published (bfloat16) | {base:.4f} |
| with the recurrent router | {attached:.4f} |

Means over {seeds} seeds of the whole experiment, 95 % t intervals of differences paired by seed: with the recurrent
router minus the base {minus_base}; minus the base whose own routers were trained as long {minus_gate}.

Measured on {hardware} with `{command}` (torch {torch}, transformers {transformers}).

## Training data

Python sources of CPython's standard library and of torch, bytes as tokens (about {train:,}; other files were held
out).

## Limits

A demonstration of {parameters:,} parameters that has read nothing but Python sources, in windows of {length} bytes.
"""

USE_BASE = """A small OLMoE of transformers' own class, {layers} layers of {experts} experts, {top_k} of them for a
byte, trained from scratch as the base of [{owner}/{router}](https://huggingface.co/{owner}/{router}).

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{owner}/{base}")
```"""

USE_ROUTER = """A recurrent router for [{owner}/{base}](https://huggingface.co/{owner}/{base}): every token carries a
state of {size} numbers up the layers, and each layer adds scores from it to those of its own router ("Layerwise
Recurrent Router for Mixture-of-Experts", [arXiv 2408.06793](https://arxiv.org/abs/2408.06793)). Only the router was
trained, {steps} steps; the base stays as it is.

```python
import undersong
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{owner}/{base}")
undersong.load_recurrent_router(model, "{owner}/{router}")
```"""


def write_checkpoints(target, trained, found, setting, facts, device):
    """Seed 0 of the experiment; returns the test figures of what was written.

    Args:
        target: folder that gets the two repositories.
        trained: folder with what `retrofit` left.
        found: the part "retrofit" of the record.
        setting, facts: of the record.
        device: where the figures are measured.
    """
    target, trained, size = Path(target), Path(trained), setting.retrofit
    folders = target / BASE, target / ROUTER
    model = build(Job("base", 0, 0.0, 1), size)
    model.load_state_dict(load_file(trained / "base-0.safetensors"))
    model.config.router_aux_loss_coef = BALANCING
    model.to(torch.bfloat16).save_pretrained(folders[0])
    weights = (folders[0] / "model.safetensors").stat().st_size
    if weights > LARGEST:
        raise ValueError(f"the base has {weights:,} bytes, more than the {LARGEST:,} that the repository takes.")
    folders[1].mkdir(parents=True, exist_ok=True)
    source = trained / f"router-0-{found['rates']['attached']:g}"
    for path in source.iterdir():
        shutil.copy(path, folders[1] / path.name)
    about = folders[1] / "recurrent_router.json"
    about.write_text(about.read_text().replace('"name_or_path": null', f'"name_or_path": "{OWNER}/{BASE}"'))
    measured = published(folders, size, device)
    for folder, is_router in zip(folders, (False, True), strict=True):
        (folder / "README.md").write_text(card(is_router, measured, found, setting, facts), encoding="utf-8")
    return measured


def published(folders, size, device):
    """Bits a byte on test text of the files as they are."""
    training = Training(Job("base", 0, 0.0, 1), size, device)
    model = OlmoeForCausalLM.from_pretrained(folders[0], attn_implementation="causal").to(device)
    training.model = model if training.on_gpu else model.float()
    found = {"base": training.evaluate("test")[0]}
    load_recurrent_router(model, folders[1])
    return found | {"attached": training.evaluate("test")[0]}


def card(is_router, measured, found, setting, facts):
    size, versions = setting.retrofit, facts["versions"]
    names = {"owner": OWNER, "base": BASE, "router": ROUTER, "layers": size.layers, "experts": size.experts}
    names |= {"top_k": size.top_k, "size": size.router_size, "steps": setting.retrofit_steps}
    return CARD.format(
        library="undersong" if is_router else "transformers",
        more=f"base_model: {OWNER}/{BASE}\n" if is_router else "pipeline_tag: text-generation\n",
        tag="recurrent-router" if is_router else "olmoe",
        title="A recurrent router for a small OLMoE" if is_router else "A small OLMoE of bytes",
        text=(USE_ROUTER if is_router else USE_BASE).format(**names),
        base=measured["base"],
        attached=measured["attached"],
        seeds=setting.seeds,
        minus_base=signed(found["attached_minus"]["base"]),
        minus_gate=signed(found["attached_minus"]["gate"]),
        hardware=facts["hardware"]["device"],
        command=facts["command"],
        torch=versions["torch"],
        transformers=versions["transformers"],
        train=size.text * 9 // 10,
        parameters=next(run["parameters"] for run in found["runs"] if run["kind"] == "base"),
        length=size.length,
    )


def signed(difference):
    mean, half = difference["mean"], difference["half_width"]
    return f"{mean:+.4f}" + ("" if half is None else f" ± {half:.4f}")
