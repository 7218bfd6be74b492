"""Runs metrics' folders as `evaluate` modules in a fresh process without network or undersong."""

import json
import os
import subprocess
import sys

_CODE = """
import json, sys
import evaluate
jobs = json.loads(sys.argv[1])
{setup}
out = []
for folder, calls in jobs:
    metric = evaluate.load(folder)
    out.append([metric.compute(**call, **extra) for call in calls])
assert not any(name.partition(".")[0] == "undersong" for name in sys.modules)
print(json.dumps(out))
"""


def compute(folder, calls, home, setup="extra = {}"):
    """What `evaluate.load(folder).compute(**call, **extra)` gives for every call; `setup` sets `extra`."""
    return compute_all([(folder, calls)], home, setup)[0]


def compute_all(jobs, home, setup="extra = {}"):
    """`compute` for several pairs `(folder, calls)` in one process."""
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    jobs = json.dumps([(str(folder), calls) for folder, calls in jobs])
    command = [sys.executable, "-c", _CODE.format(setup=setup), jobs]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
