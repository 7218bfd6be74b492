"""Decoding methods as Hub repositories: `model.generate(..., custom_generate="org/name", trust_remote_code=True)`.

A repository is a card and `custom_generate/generate.py`, a few lines over undersong's modules. The export puts these
modules beside it as flat files, since transformers fetches direct siblings only; so a repository runs where undersong
is not installed, and the methods exist once.
"""

from __future__ import annotations

import ast
import importlib
import shutil
from pathlib import Path

from ._flatten import CannotFlatten, flatten

_CHECKOUT = Path(__file__).parents[3] / "hub_configs"


def export_custom_generate(name_or_folder, folder, *, overwrite=False):
    """Writes a `custom_generate` repository that runs without undersong.

    Args:
        name_or_folder: a folder with `custom_generate/generate.py`, or, in a checkout of undersong, the name of one in
            `hub_configs/`, such as "typical-sampling".
        folder: where to write; a model's folder gets the method as its own `generate`. A card that is there stays.
        overwrite: replace a `custom_generate/` that is there.

    Returns:
        `folder` as an absolute `pathlib.Path`; `undersong.publish` uploads it.

    Raises:
        FileNotFoundError: there is no `custom_generate/generate.py`.
        FileExistsError: `folder` holds a `custom_generate/` and `overwrite` is False.
        ValueError: the code cannot be flattened (see `undersong.hub._flatten`).
    """
    source, folder = _source(name_or_folder), Path(folder).resolve()
    target = folder / "custom_generate"
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"folder ({folder}) holds a custom_generate/ already; pass overwrite=True to replace it."
        )
    files = _files(source / "custom_generate" / "generate.py")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, text in files.items():
        (target / name).write_text(text, encoding="utf-8")
    for path in (source / "custom_generate" / "requirements.txt", source / "README.md"):
        copy = folder / path.relative_to(source)
        if path.exists() and not copy.exists():
            shutil.copyfile(path, copy)
    return folder


def _source(name_or_folder):
    tried = [Path(name_or_folder), _CHECKOUT / name_or_folder]
    for source in tried:
        if (source / "custom_generate" / "generate.py").is_file():
            return source
    names = sorted(path.parents[1].name for path in _CHECKOUT.glob("*/custom_generate/generate.py"))
    known = f"one of {', '.join(names)}" if names else "a folder"
    raise FileNotFoundError(f"{name_or_folder} holds no custom_generate/generate.py; name {known}.")


def _files(path):
    """File name -> text: `generate.py` with sibling imports, and the modules that it needs."""
    text = path.read_text(encoding="utf-8")
    statements = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "undersong"
    ]
    objects = {}
    for node in statements:
        for alias in node.names:
            value = getattr(importlib.import_module(node.module), alias.name)
            if value.__module__ != node.module:
                raise CannotFlatten(
                    f"{path}, line {node.lineno}: {alias.name} is defined in {value.__module__}; import it from there."
                )
            objects[f"{node.module}.{alias.name}"] = value
    closure = flatten(*objects.values())
    for node in statements:
        text = text.replace(f"from {node.module} import", f"from .{closure.names[node.module]} import")
    return {**closure.files, "generate.py": text}
