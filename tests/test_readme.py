"""Every python block of the README and the docs pages really runs, and every example script ends well."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks():
    """(id, code, slow) of every ```python block; one that follows `<!-- slow -->` needs a real model."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for found in re.finditer(r"(<!-- slow -->\n)?```python\n(.*?)```", text, flags=re.DOTALL):
            line = text[: found.start(2)].count("\n") + 1
            yield pytest.param(found[2], id=f"{page.name}:{line}", marks=[pytest.mark.slow] if found[1] else [])


def run(arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}  # LocalHub is a hub too
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.mark.parametrize("code", list(blocks()))
def test_block_runs(code, tmp_path):
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(script, tmp_path):
    done = run([str(script), "--fast"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d", done.stdout.strip().splitlines()[-1]), "an example ends in a sentence with a number"
