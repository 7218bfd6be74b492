"""Examples run as a reader runs them, in short form. The one that needs SmolLM2 runs in CI, outside the suite."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_classify_series_ends_in_a_sentence_with_a_number(tmp_path):
    command = [sys.executable, "-W", "error", EXAMPLES / "classify_series.py", "--fast"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HOME": str(tmp_path)}
    )
    assert run.returncode == 0, run.stderr
    match = re.search(r"names (\d+\.\d)% of 360 unseen digits\.$", run.stdout.strip())
    assert match, run.stdout
    assert float(match[1]) > 20  # two epochs; chance is 10
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_take_fast(path):
    text = path.read_text(encoding="utf-8")
    assert 30 <= len(text.splitlines()) <= 80
    assert "--fast" in text
