"""Runs a metric's folder as an `evaluate` module in a fresh process without network or undersong."""

import json
import os
import subprocess
import sys

_CODE = """
import json, sys
import evaluate
folder, calls = sys.argv[1], json.loads(sys.argv[2])
{setup}
metric = evaluate.load(folder)
out = [metric.compute(**call, **extra) for call in calls]
assert not any(name.partition(".")[0] == "undersong" for name in sys.modules)
print(json.dumps(out))
"""


def compute(folder, calls, home, setup="extra = {}"):
    """What `evaluate.load(folder).compute(**call, **extra)` gives for every call; `setup` sets `extra`."""
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    command = [sys.executable, "-c", _CODE.format(setup=setup), str(folder), json.dumps(calls)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
