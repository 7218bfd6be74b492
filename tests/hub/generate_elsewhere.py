"""Runs `model.generate` with custom_generate repositories in a process where undersong cannot be imported."""

import json
import os
import subprocess
import sys

_CHILD = """
import json, sys

task = json.loads(sys.argv[1])

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "undersong" else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
try:
    import undersong
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("undersong can be imported here")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

class Collector(BaseStreamer):
    def __init__(self):
        self.prompt, self.tokens, self.ended = None, [], 0

    def put(self, value):
        if self.prompt is None:
            self.prompt = value.flatten().tolist()
        else:
            self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1

torch.set_num_threads(1)
for job in task:
    trust = job.get("trust", False)
    auto = AutoModelForSeq2SeqLM if job.get("seq2seq") else AutoModelForCausalLM
    model = auto.from_pretrained(job["model"], trust_remote_code=trust).eval()
    options = dict(job["options"])
    if "repo" in job:
        options |= {"custom_generate": job["repo"], "trust_remote_code": True}
    if job.get("tokenizer"):
        options["tokenizer"] = AutoTokenizer.from_pretrained(job["model"])
    options |= {name: torch.tensor(value) for name, value in job.get("inputs", {}).items()}
    inputs = []
    if "ids" in job:
        ids = torch.tensor(job["ids"])
        if job.get("by_position"):
            inputs = [ids]
        else:
            options |= {"input_ids": ids, "attention_mask": (ids != 0).long()}
    result = {}
    if job.get("stream"):
        options["streamer"] = streamer = Collector()
    torch.manual_seed(0)
    try:
        result["ids"] = model.generate(*inputs, **options).tolist()
    except (ValueError, TypeError, ImportError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    if job.get("stream"):
        result |= {"prompt": streamer.prompt, "tokens": streamer.tokens, "ended": streamer.ended}
    print("RESULT " + json.dumps(result), flush=True)
assert "undersong" not in sys.modules
"""


def generate_elsewhere(jobs, scratch, *, env=None):
    """jobs: a list of {"model", "repo", "ids", "options", "tokenizer", "stream", "trust", "by_position", "seq2seq",
    "inputs"}; "inputs" are nested lists by name, for what is no ids.

    Returns a result per job: {"ids"} or {"error"}, and with "stream" also "prompt", "tokens" and "ended". `env`
    replaces the environment, which is offline by default (`LocalHub.env()`).
    """
    env = {**os.environ, "HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"} if env is None else dict(env)
    env.pop("PYTHONPATH", None)
    env |= {"TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(jobs)], env=env, cwd=scratch, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    prefix = "RESULT "
    return [json.loads(line.removeprefix(prefix)) for line in run.stdout.splitlines() if line.startswith(prefix)]
