"""Every python block of the README and the docs pages really runs, and every example script ends well."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Each block by itself, in one process, as importing everything anew takes longer than most blocks.
RUNNER = """
import sys, traceback, pathlib
failed = 0
for path in sys.argv[1:]:
    path = pathlib.Path(path)
    try:
        exec(compile(path.read_text(), path.stem, "exec"), {"__name__": "__main__"})
    except BaseException:
        failed += 1
        print("block at line", path.stem, file=sys.stderr)
        traceback.print_exc()
sys.exit(failed)
"""


def blocks(page, slow):
    """{first line: code} of a page's ```python blocks; one that follows `<!-- slow -->` needs a real model."""
    text = page.read_text()
    found = re.finditer(r"(<!-- slow -->\n)?```python\n(.*?)```", text, flags=re.DOTALL)
    return {text[: block.start(2)].count("\n") + 1: block[2] for block in found if bool(block[1]) == slow}


def run(arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}  # LocalHub is a hub too
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def check_blocks(page, slow, folder):
    files = []
    for line, code in blocks(page, slow).items():
        files.append(folder / f"{line}.py")
        files[-1].write_text(code)
    done = run(["-c", RUNNER, *map(str, files)], folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, False)], ids=lambda page: page.name)
def test_blocks_run(page, tmp_path):
    check_blocks(page, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, True)], ids=lambda page: page.name)
def test_slow_blocks_run(page, tmp_path):
    check_blocks(page, True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(script, tmp_path):
    done = run([str(script), "--fast"], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"\d", done.stdout.strip().splitlines()[-1]), "an example ends in a sentence with a number"
