"""Prompts that end in a loop of code: a loader for CodeRepetEval and a generator of prompts of its artificial kind.

CodeRepetEval (Dong et al., "Rethinking Repetition Problems of LLMs in Code Generation", ACL 2025, arXiv 2505.10402)
has three scenarios. Its files come without a licence, so they are read from where you keep them. The synthetic
prompts are made here: correct Python that ends in a pattern, and the pattern repeated 5 to 10 times more.
"""

import json
import random
from pathlib import Path

__all__ = ["SCENARIOS", "load_code_repeteval", "make_synthetic"]

# scenario -> number of prompts
SCENARIOS = {"ArtificialSynthesis": 512, "CodeGenerationBenchmarks": 512, "Real-worldRepositories": 1024}

_NOUNS = ["order", "user", "file", "price", "color", "score", "node", "city", "token", "image", "event", "record"]
_WORDS = [
    "red", "green", "blue", "north", "south", "apple", "pear", "plum", "monday", "friday", "alpha", "beta", "gamma",
    "delta", "iron", "zinc", "oak", "pine", "maple", "cedar", "otter", "heron", "lynx", "stoat",
]  # fmt: skip


def load_code_repeteval(path, scenario=None):
    """The prompts of a local copy.

    Args:
        path: a jsonl file with `prompt` and optionally `samples` per line, or a folder that holds one file per
            scenario, named after it.
        scenario: one of `SCENARIOS`; needed for a folder.

    Returns:
        A list of dicts with `prompt` and `samples` (a list of texts, empty if the file has none).

    Raises:
        ValueError: an unknown scenario, a folder without scenario, or a line without a prompt.
        FileNotFoundError: nothing there.
    """
    path = Path(path)
    if scenario is not None and scenario not in SCENARIOS:
        raise ValueError(f"scenario ({scenario!r}) must be one of {', '.join(SCENARIOS)}.")
    if path.is_dir():
        if scenario is None:
            raise ValueError(f"path ({path}) is a folder; name a scenario, one of {', '.join(SCENARIOS)}.")
        files = sorted(f for f in path.rglob("*.jsonl") if scenario in f.relative_to(path).as_posix())
        if not files:
            raise FileNotFoundError(f"no jsonl file for {scenario} under {path}.")
        path = files[0]
    examples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            entry = json.loads(line)
            if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
                raise ValueError(f"{path}, line {number} must be an object with a text 'prompt'.")
            samples = entry.get("samples", [])
            samples = [samples] if isinstance(samples, str) else samples
            examples.append({"prompt": entry["prompt"], "samples": samples})
    return examples


def make_synthetic(seed=0, n=100):
    """Prompts whose last pattern has been repeated 5 to 10 times beyond what the code needs.

    Args:
        seed: the same seed gives the same prompts, on every machine.
        n: how many; the templates take turns.

    Returns:
        A list of dicts: `prompt` (without a line break at its end, which tokenizers join with the indentation that
        comes after it), `template`, `repeats` (copies of the pattern at the end) and `pattern_lines`.

    >>> example = make_synthetic(seed=0, n=1)[0]
    >>> example["template"], example["repeats"] >= 6
    ('elif chain', True)
    """
    if n < 1:
        raise ValueError(f"n ({n}) must be at least 1.")
    rng = random.Random(seed)
    examples = []
    for index in range(n):
        name = list(_TEMPLATES)[index % len(_TEMPLATES)]
        noun, words = rng.choice(_NOUNS), rng.sample(_WORDS, len(_WORDS))
        first = rng.randrange(10)
        head, pattern = _TEMPLATES[name](noun)
        repeats = 1 + rng.randint(5, 10)
        copies = [
            pattern.format(noun=noun, word=words[i % len(words)], i=first + i, j=first + 3 * i + 1)
            for i in range(repeats)
        ]
        examples.append(
            {
                "prompt": (head + "".join(copies)).rstrip("\n"),
                "template": name,
                "repeats": repeats,
                "pattern_lines": pattern.count("\n"),
            }
        )
    return examples


# name -> noun -> (correct beginning, pattern)
_TEMPLATES = {
    "elif chain": lambda noun: (
        f"def {noun}_name(code):\n    if code < 0:\n        return None\n",
        '    elif code == {i}:\n        return "{word}"\n',
    ),
    "appends": lambda noun: (f"def all_{noun}s():\n    result = []\n", '    result.append("{word}")\n'),
    "dict entries": lambda noun: (f"{noun}_codes = {{\n", '    "{word}": {i},\n'),
    "prints": lambda noun: (
        f'def show({noun}):\n    print("The {noun}:")\n',
        '    print("{word}", {noun}.{word}, {i})\n',
    ),
    "asserts": lambda noun: (
        f"from shop import next_{noun}\n\n\ndef test_next_{noun}():\n",
        "    assert next_{noun}({i}) == {j}\n",
    ),
    "list elements": lambda noun: (f"{noun.upper()}S = [\n", '    ("{word}", {i}),\n'),
    "method stubs": lambda noun: (
        f"class {noun.title()}:\n    def __init__(self, name):\n        self.name = name\n",
        "\n    def {word}(self):\n        return self.name\n",
    ),
    "assignments": lambda noun: (
        f"class {noun.title()}Settings:\n    def __init__(self, size):\n        self.size = size\n",
        "        self.{word} = {i}\n",
    ),
    "ifs in a loop": lambda noun: (
        f"def count({noun}s):\n    total = 0\n    for {noun} in {noun}s:\n",
        '        if {noun}.kind == "{word}":\n            total += {i}\n',
    ),
    "comments": lambda noun: (
        f"def parse_{noun}(text):\n    # Reads one {noun} from a line of text.\n",
        "    # Hint {i}: look at the {noun} with the number {j} first.\n",
    ),
    "try blocks": lambda noun: (
        f"def load_{noun}(source):\n    data = {{}}\n",
        '    try:\n        data["{word}"] = source.read({i})\n    except KeyError:\n        pass\n',
    ),
    "exact copies": lambda noun: (
        f"def wait_for_{noun}({noun}):\n    {noun}.start()\n",
        "    {noun}.poll()\n    time.sleep(1)\n",
    ),
}
