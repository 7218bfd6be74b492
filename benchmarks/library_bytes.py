"""Bytes of Python sources that are on every machine that runs our benchmarks: the standard library's, then torch's.

Files come in the order of a hash of their name, so that any number of them is a fair sample, and the same hash says
whether a file is for training, validation or test. Versions differ between machines: figures compare only where the
fingerprint agrees.
"""

import hashlib
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

NOT_THE_LIBRARY = {
    "__pycache__",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
PARTS = {0: "validation", 1: "test"}  # of every 20 files; the others are for training


def library_bytes(limit):
    """About `limit` bytes, `({"train", "validation", "test"}: uint8 tensor, fingerprint)`; a zero ends each file."""
    roots = Path(sysconfig.get_path("stdlib")), Path(find_spec("torch").origin).parent
    parts, seen, size = {"train": [], "validation": [], "test": []}, set(), 0
    for root in roots:
        found = (path for path in root.rglob("*.py") if NOT_THE_LIBRARY.isdisjoint(path.relative_to(root).parts[:-1]))
        hashed = {hashlib.sha256(path.relative_to(root).as_posix().encode()).digest(): path for path in found}
        for key in sorted(hashed):
            if size >= limit:
                break
            content = hashed[key].read_bytes()
            if content and content not in seen:
                seen.add(content)
                size += len(content)
                # the hash's other end: its first bytes are the order
                parts[PARTS.get(int.from_bytes(key[-4:]) % 20, "train")].append(content)
    texts = {part: b"\0".join(files) + b"\0" for part, files in parts.items()}
    fingerprint = hashlib.sha256(b"".join(texts.values())).hexdigest()[:12]
    return {part: torch.frombuffer(bytearray(text), dtype=torch.uint8) for part, text in texts.items()}, fingerprint
