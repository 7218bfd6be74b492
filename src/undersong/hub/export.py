"""Self-contained model folders: weights, configuration, card, and the source that loads them without undersong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "undersong_export.json"
_WEIGHTS = ("model", "pytorch_model"), (".safetensors", ".bin", ".index.json")  # first and last part of their names


def export(model, folder, *, tokenizer=None, card=None, overwrite=False):
    """Writes a model as a flat folder that `trust_remote_code=True` loads on a machine without undersong.

    The folder holds config.json with `auto_map`, the weights as safetensors, generation_config.json, a model card,
    every source file of ours that the model's and the configuration's classes need, and `undersong_export.json`,
    the list of what was written. Reloading on the CPU gives bit-equal outputs; compare with `disable_mmap=True`, since
    memory-mapped weights may start at addresses for which a matrix product rounds differently. Where undersong is
    installed, the same folder loads without remote code. The model, its configuration and its class stay as they are.

    Args:
        model: a `PreTrainedModel` whose class is defined in an importable source file. Its dtype is kept.
        folder: where to write. The new content is complete before it takes the place of the old.
        tokenizer: saved beside the model if given; one of transformers' own classes.
        card: text, `ModelCard` or path of a Markdown file; made by `undersong.hub.model_card(model)` if None.
        overwrite: allow a folder that is not empty. Files that an earlier export wrote are replaced, or deleted if
            they are no longer needed; all other files stay.

    Returns:
        The folder as an absolute `pathlib.Path`.

    Raises:
        TypeError: `model` is not a `PreTrainedModel`, or is wrapped by PEFT.
        ValueError: the code cannot be flattened (see `undersong.hub._flatten`), a layer was replaced by a class
            that the source does not build, or `folder` would mix two sets of weights.
        FileExistsError: `folder` is not empty and `overwrite` is False.

    >>> import tempfile
    >>> from undersong import AarenConfig, AarenForCausalLM, registry
    >>> model = AarenForCausalLM(AarenConfig(**registry.ARCHITECTURES["aaren"].tiny))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in export(model, folder).glob("*aaren.py"))
    ['configuration_aaren.py', 'modeling_aaren.py']
    """
    from ._flatten import flatten

    _check_model(model)
    _check_tokenizer(tokenizer)
    folder = Path(folder).resolve()
    _check_folder(folder, overwrite)
    config_class = type(model.config)
    own_config = not config_class.__module__.startswith("transformers.")
    closure = flatten(type(model), *([config_class] if own_config else []))
    _check_layers(model, closure)

    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    fresh.mkdir()
    try:
        with _without_side_effects(model):
            model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        for name, text in closure.files.items():
            (fresh / name).write_text(text, encoding="utf-8")
        _edit_json(fresh / "config.json", auto_map=auto_map(model, closure), architectures=[_architecture(model)])
        (fresh / "README.md").write_text(_card_text(card, model, folder.name, tokenizer), encoding="utf-8")
        _write_manifest(fresh)
        _keep_foreign_files(folder, fresh)
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def auto_map(model, closure):
    """Which Auto class loads which class of the flat files.

    The model's own class comes first, under its own Auto class or, if transformers has none for its head, under
    `AutoModel`. With a head that transformers knows, `AutoModel` gives the backbone, and the other heads of the
    architecture are listed too when they live in files that are there anyway.
    """
    import transformers

    row, head = registry_entry(type(model))
    own = auto_class_name(type(model))
    entries = {} if type(model.config).__module__.startswith("transformers.") else {"AutoConfig": type(model.config)}
    entries[own] = type(model)
    if row is not None and hasattr(transformers, head):
        for name, path in row.models.items():
            if hasattr(transformers, name) and path.partition(":")[0] in closure.names:
                entries.setdefault(name, row.model_class(name))
    return {name: closure.reference(cls) for name, cls in entries.items()}


def auto_class_name(cls):
    """The Auto class that a model class belongs to: its registry row says, else its name; `AutoModel` if none fits."""
    import transformers

    head = registry_entry(cls)[1] or "AutoModelFor" + cls.__name__.partition("For")[2]
    return head if hasattr(transformers, head) else "AutoModel"


def registry_entry(cls):
    """`(row, head)` of a model class in the registry, or `(None, None)`."""
    from undersong.registry import ARCHITECTURES

    for row in ARCHITECTURES.values():
        for head, path in row.models.items():
            # a model that was loaded as remote code has the same class names in another module
            if path == f"{cls.__module__}:{cls.__name__}" or (
                cls.__module__.startswith("transformers_modules.") and path.endswith(f":{cls.__name__}")
            ):
                return row, head
    return None, None


def _check_model(model):
    from transformers import PreTrainedModel

    label = type(model).__name__
    if type(model).__module__.partition(".")[0] == "peft" or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"model ({label}) carries PEFT adapters, which an exported folder cannot hold; export"
            " model.merge_and_unload(), or save the adapter with model.save_pretrained."
        )
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model ({label}) must be a transformers PreTrainedModel; pass the model inside a wrapper (model.module,"
            " model._orig_mod)."
        )
    if type(model).__module__.startswith("transformers."):
        raise ValueError(
            f"model ({label}) is one of transformers' own and needs no code to load; use"
            " model.save_pretrained(folder)."
        )


def _check_tokenizer(tokenizer):
    if tokenizer is not None and not type(tokenizer).__module__.startswith("transformers."):
        raise ValueError(
            f"tokenizer ({type(tokenizer).__module__}.{type(tokenizer).__name__}) must be of one of transformers' own"
            " classes; export does not carry tokenizer code."
        )


def _check_layers(model, closure):
    for name, module in model.named_modules():
        cls = type(module)
        if not closure.holds(cls):
            raise ValueError(
                f"layer {name} is a {cls.__module__}.{cls.__name__}, which the source of {type(model).__name__} does"
                " not build, so a reload would differ; build it in the model's __init__, from a module it imports."
            )


def _check_folder(folder, overwrite):
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"folder ({folder}) is a file; name a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"folder ({folder}) is not empty; pass overwrite=True (--overwrite) to replace what an export wrote there."
        )
    here = Path.cwd().resolve()
    if folder == here or folder in here.parents:
        raise ValueError(
            f"folder ({folder}) holds the working directory, which cannot be swapped; call from outside it."
        )


def _card_text(card, model, name, tokenizer):
    if card is None:
        from .cards import model_card

        card = model_card(model, repo_id=name, tokenizer=tokenizer is not None)
    return Path(card).read_text(encoding="utf-8") if isinstance(card, os.PathLike) else str(card)


def _architecture(model):
    """The name for `architectures`: our class, unless transformers owns the type and has one for the head."""
    import transformers

    if type(model.config).__module__.startswith("transformers."):
        mapping = getattr(transformers, auto_class_name(type(model)))._model_mapping
        if type(model.config) in mapping and mapping[type(model.config)].__module__.startswith("transformers."):
            return mapping[type(model.config)].__name__
    return type(model).__name__


@contextmanager
def _without_side_effects(model):
    """save_pretrained notes dtype, architectures and auto_map in the live configuration: those are taken back.

    It also copies code, by rules that break on packages, when a class was registered for Auto classes (remote code
    always is): that is switched off meanwhile.
    """
    config, before = model.config, dict(vars(model.config))
    registered = [cls for cls in (type(model), type(config)) if cls._auto_class is not None]
    own = [vars(cls).get("_auto_class") for cls in registered]
    for cls in registered:
        cls._auto_class = None
    try:
        yield
    finally:
        for cls, value in zip(registered, own, strict=True):
            if value is None:
                del cls._auto_class  # it was inherited
            else:
                cls._auto_class = value
        vars(config).clear()
        vars(config).update(before)


def _edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder):
    from undersong import __version__

    files = {
        path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    content = {"undersong_version": __version__, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder):
    """File name -> sha256 of what an export wrote into the folder; empty if it is not an exported folder."""
    path = Path(folder) / MANIFEST
    return json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}


def _keep_foreign_files(old, fresh):
    """Carries over what the old folder holds besides an earlier export, as hard links where the disk allows it."""
    written = read_manifest(old)
    for parent, folders, names in os.walk(old):
        here = Path(parent).relative_to(old)
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in names + links:
            relative = here / name
            path = old / relative
            if (fresh / relative).exists() or relative.name == MANIFEST:
                continue
            if path.is_file() and written.get(relative.as_posix()) == _sha256(path):
                continue
            if here == Path() and name.startswith(_WEIGHTS[0]) and name.endswith(_WEIGHTS[1]):
                raise ValueError(
                    f"folder ({old}) holds weights that this export does not replace ({name}), and loading could"
                    " pick them up; move them away or name another folder."
                )
            (fresh / here).mkdir(parents=True, exist_ok=True)
            _link_or_copy(path, fresh / relative)


def _link_or_copy(source, target):
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(fresh, folder):
    if not folder.exists() or not any(folder.iterdir()):
        fresh.replace(folder)
        return
    old = fresh.with_name(f"{fresh.name}.old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old)
