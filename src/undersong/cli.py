"""The command line: `undersong list | export | publish | doctor | demo | generate | recommend`.

A user's mistake is one line on stderr and exit code 1 (2 for a wrong command line); a traceback is a bug of ours.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup


class _Commands(TyperGroup):
    """Turns the errors that undersong and the Hub raise on purpose into one line."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (typer.Exit, typer.Abort):
            raise
        # what huggingface_hub raises for a missing repository, a refused token or no network is an OSError
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            text = " ".join(str(error).split())
            notes = " ".join(getattr(error, "__notes__", ()))
            Console(stderr=True, soft_wrap=True).print(f"error: {text} {notes}".rstrip(), style="red", markup=False)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Recurrent and repetition-aware sequence modelling for the Hugging Face ecosystem.",
)


@app.command("list")
def list_architectures():
    """The architectures that undersong adds to transformers."""
    from undersong.registry import ARCHITECTURES

    table = Table("model_type", "Auto class or task", "class", "paper")
    for row in ARCHITECTURES.values():
        for index, (head, path) in enumerate(row.models.items()):
            first = index == 0
            table.add_row(
                row.model_type if first else "",
                head,
                path.partition(":")[2],
                f"{row.paper}, arXiv {row.arxiv}" if first else "",
            )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # in a pipe rich assumes 80 columns and would cut the names that scripts look for
    console.print(table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a model of one of undersong's types.")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an export wrote there before.")] = False,
):
    """Write a self-contained folder that loads without undersong (trust_remote_code=True)."""
    from undersong import hub

    loaded, tokenizer = _load(model, revision)
    path = hub.export(loaded, folder, tokenizer=tokenizer, overwrite=overwrite)
    typer.echo(f"{type(loaded).__name__} is in {path}")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="An exported model, a built kernel, or any folder with a card.")],
    repo: Annotated[str, typer.Argument(help="owner/name")],
    update: Annotated[
        bool, typer.Option("--update", help="Upload changed files to a repository that exists.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list, but upload nothing.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
):
    """Upload a folder to the Hub in one commit (token and endpoint as for `hf upload`: HF_TOKEN, HF_ENDPOINT)."""
    from undersong import hub

    done = hub.publish(folder, repo, update=update, private=private or None, dry_run=dry_run, revision=revision)
    would = "would be " if dry_run else ""
    for verb, paths in (("uploaded", done.uploaded), ("deleted", done.deleted)):
        for path in paths:
            typer.echo(f"{would}{verb}: {path}")
    if not (done.uploaded or done.deleted):
        typer.echo("nothing changed")
    typer.echo(done.url + (f" at {done.commit}" if done.commit else ""))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
):
    """What this machine has, and which path each op takes on it."""
    from undersong.diagnosis import doctor

    report = doctor()
    typer.echo(json.dumps(report.as_dict(), indent=2) if as_json else str(report))


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="A reduced run, for checks.")] = False,
    output: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("undersong-demo"),
):
    """Generation side by side, a trained model, its Hub round trip, and a report, in a few minutes on a CPU."""
    from undersong.demo import run

    run(output=output, fast=fast)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a language model.")],
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file; without both, from stdin.")] = None,
    decoding: Annotated[
        Path | None, typer.Option(help="A decoding_config.json; by default the one beside the model, if any.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt as a user's message.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the continuation.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU if there is one.")] = None,
):
    """Continue a prompt, streaming to the terminal."""
    text = _prompt(prompt, file)
    config = _decoding(decoding)  # a mistake in it shows before anything is loaded

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    from undersong.generation import DecodingConfig
    from undersong.generation import generate as run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(model, revision=revision).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    config = DecodingConfig.beside(loaded, revision) if config is None else config
    arguments = {"max_new_tokens": 256, **config.generation}
    if max_new_tokens is not None:
        arguments["max_new_tokens"] = max_new_tokens
    beams = arguments.get("num_beams") or loaded.generation_config.num_beams or 1
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if beams == 1 else None
    torch.manual_seed(seed)
    messages = [{"role": "user", "content": text}]
    result = run(loaded, tokenizer, messages if chat else text, config, streamer=streamer, **arguments)
    if streamer is None:  # beams are known when they are complete
        typer.echo(result if isinstance(result, str) else "\n---\n".join(result))


@app.command()
def recommend(
    interactions: Annotated[
        Path, typer.Argument(help="A .csv or .tsv with a header, a RecBole .inter, or a .txt with `user item` a line.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the model and its report.")],
    items: Annotated[Path | None, typer.Option(help="A table or RecBole .item with the items' titles.")] = None,
    model: Annotated[str, typer.Option(help="bert4rec, gsasrec or sasrec.")] = "bert4rec",
    user: Annotated[str | None, typer.Option(help="Name of the users' column.")] = None,
    item: Annotated[str | None, typer.Option(help="Name of the items' column.")] = None,
    time: Annotated[str | None, typer.Option(help="Name of the time column; without one, the file's order.")] = None,
    title: Annotated[str | None, typer.Option(help="Name of the titles' column of --items.")] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Leave out users and items with fewer interactions.")] = 1,
    epochs: Annotated[int, typer.Option(min=1, help="At most so many.")] = 400,
    patience: Annotated[int, typer.Option(min=1, help="Evaluations without progress that end the training.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-3,
    hidden_size: Annotated[int, typer.Option(min=1)] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Items of a history that the model reads.")] = 100,
    k: Annotated[int, typer.Option(min=1, help="Recommendations a user in the report.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu; by default a GPU if there is one.")] = None,
):
    """Train a recommender on a file of interactions, test it by full ranking, and save it with a report."""
    from undersong.data.interactions import Interactions

    data = Interactions.read(interactions, items, user=user, item=item, time=time, title=title)
    data = data.core(min_count) if min_count > 1 else data
    from undersong.training.recommend_run import recommend_run

    recommend_run(
        data,
        output,
        model,
        k=k,
        config={"hidden_size": hidden_size, "max_position_embeddings": max_length},
        max_epochs=epochs,
        patience=patience,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        device=device,
    )


def _prompt(prompt, file):
    if prompt is not None and file is not None:
        raise ValueError("--prompt and --file both name a prompt; give one.")
    text = prompt if prompt is not None else file.read_text("utf-8") if file else sys.stdin.read()
    if not text.strip():
        raise ValueError("the prompt is empty; give --prompt, --file, or a text on stdin.")
    return text


def _decoding(path):
    if path is None:
        return None
    from undersong.generation import DecodingConfig

    return DecodingConfig.from_file(path)


def _load(model, revision):
    """The model in the class its configuration names, and its tokenizer if it has one."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import cached_file

    import undersong

    config = AutoConfig.from_pretrained(model, revision=revision)
    row = undersong.registry.ARCHITECTURES.get(config.model_type)
    if row is None:
        known = ", ".join(undersong.registry.ARCHITECTURES)
        raise ValueError(f"model_type ({config.model_type}) of {model} must be one of undersong's: {known}.")
    classes = {path.partition(":")[2]: path for path in row.models.values()}
    if row.stock_owned:  # such folders name transformers' class
        classes |= {name.removeprefix("Fast"): path for name, path in classes.items()}
    name = (config.architectures or [None])[0]
    if name not in classes:
        raise ValueError(f"architectures ({name}) of {model} must name one of {', '.join(classes)}.")
    module, _, attribute = classes[name].partition(":")
    loaded = getattr(importlib.import_module(module), attribute).from_pretrained(model, revision=revision)
    has_tokenizer = cached_file(
        model,
        "tokenizer_config.json",
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return loaded, AutoTokenizer.from_pretrained(model, revision=revision) if has_tokenizer else None


if __name__ == "__main__":
    app()
