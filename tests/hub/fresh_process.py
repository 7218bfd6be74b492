"""Loads exported folders in a process where undersong cannot be imported, and hands back what the models compute."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

_CHILD = '''
import json, sys

task = json.loads(sys.argv[1])

class Without:
    """A finder that has never heard of the absent packages: for every check they are simply not installed."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in task["absent"] else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for package in task["absent"]:
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{package} can be imported here")

import torch, transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
outputs = {}
for name, job in task["jobs"].items():
    auto = getattr(transformers, job["auto_class"])
    model = auto.from_pretrained(job["model"], trust_remote_code=True, revision=job.get("revision")).eval()
    with torch.no_grad():
        for key, value in model(**load_file(job["inputs"])).items():
            if isinstance(value, torch.Tensor):
                outputs[f"{name}.{key}"] = value.contiguous()
    cls = type(model)
    fact = {"name": name, "class": cls.__name__, "module": cls.__module__, "dtype": str(model.dtype)}
    print(json.dumps(fact))
for package in task["absent"]:
    assert package not in sys.modules, package
save_file(outputs, task["outputs"])
'''


def load_elsewhere(jobs, scratch, *, absent=("undersong",), env=None):
    """jobs: name -> {"model", "auto_class", "inputs": dict of tensors, "revision"}.

    Returns `(outputs, facts)`: `outputs["name.logits"]` tensors, `facts["name"]` the class, module and dtype that
    came up. `env` replaces the environment, which is offline by default (`LocalHub.env()`).
    """
    scratch = Path(scratch)
    scratch.mkdir(parents=True, exist_ok=True)
    jobs = {name: dict(job) for name, job in jobs.items()}
    for name, job in jobs.items():
        save_file({key: value.contiguous() for key, value in job["inputs"].items()}, scratch / f"{name}.inputs")
        job["inputs"] = str(scratch / f"{name}.inputs")
        job["model"] = str(job["model"])
    task = {"jobs": jobs, "absent": list(absent), "outputs": str(scratch / "outputs")}
    env = {**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"} if env is None else dict(env)
    env.pop("PYTHONPATH", None)  # only what is installed, less the absent packages
    env |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(task)], env=env, cwd=scratch, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    facts = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return load_file(scratch / "outputs"), {fact.pop("name"): fact for fact in facts}
