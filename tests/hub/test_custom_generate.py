"""custom_generate repositories: they run without undersong, stream, and give what the methods give here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from undersong.generation import DecodingConfig
from undersong.generation.repeat_tokens import ReadTwice
from undersong.hub import publish
from undersong.hub.custom_generate import export_custom_generate

from ..generation.tiny_code_model import byte_tokenizer, tiny_code_model
from .generate_elsewhere import generate_elsewhere

HUB_CONFIGS = Path(__file__).parents[2] / "hub_configs"
REPOS = sorted(path.parents[1].name for path in HUB_CONFIGS.glob("*/custom_generate/generate.py"))
TEXT = "<document>b = 2\n</document>a = 1\n<|start_2d|>b = 2\n<|split_2d|>a = 1\n<|end_2d|>b = 2\nb = 2\nb = 2\n"
NEW = {"max_new_tokens": 16}
SETTINGS = {"repetition_cap": {"penalty": 0.1, "min_match": 2}, "generation": {"temperature": 0.7, "do_sample": True}}

# repository -> (its own arguments, the same as a config, whether it needs the tokenizer, whether it takes the text)
CASES = {
    "typical-sampling": ({"mass": 0.3, "top_k": 0}, {"typical_mass": 0.3, "generation": {"top_k": 0}}, False, False),
    "repetition-cap": (
        {"penalty": 0.1, "min_match": 2},
        {"repetition_cap": {"penalty": 0.1, "min_match": 2}},
        False,
        False,
    ),
    "grammar-penalty": ({"beta": 1e-3}, {"grammar_penalty": {"beta": 1e-3}}, True, False),
    "set-prompting": ({}, {"set_prompting": True}, True, True),
    "read-twice": ({}, {"read_times": 2}, True, True),
    "mbr": ({"num_samples": 3}, {"mbr": 3}, True, False),
    "decoding": ({"decoding": SETTINGS}, SETTINGS, True, False),
}
# of models that are no transformers, with test files of their own: what they take
ELSEWHERE = {"state-control": {"state_control"}, "pointer-decoding": {"task", "strict_geometry"}}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_code_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repos")
    return {name: export_custom_generate(name, folder / name) for name in REPOS}


@pytest.fixture(scope="module")
def model(model_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder).eval()


def form_b(model, config, tokenizer, **options):
    config = DecodingConfig(**config)
    torch.manual_seed(0)
    inputs = config.prepare(tokenizer, TEXT)
    return model.generate(
        **inputs, **config.generation, **options, custom_generate=config.loop(model, tokenizer)
    ).tolist()


def test_there_is_a_case_for_every_repository():
    assert set(REPOS) == set(CASES) | set(ELSEWHERE)


def test_an_exported_repository_runs_without_undersong_and_equals_the_loop(model_folder, exported, model, tmp_path):
    tokenizer = byte_tokenizer()
    ids = tokenizer(TEXT)["input_ids"]
    jobs = []
    for name, (own, _, needs_tokenizer, takes_text) in CASES.items():
        job = {"model": str(model_folder), "repo": str(exported[name]), "options": {**own, **NEW}, "stream": True}
        job["tokenizer"] = needs_tokenizer
        if takes_text:
            job["options"]["prompt"] = TEXT
        else:
            job["ids"] = [ids]
        jobs.append(job)
    results = dict(zip(CASES, generate_elsewhere(jobs, tmp_path), strict=True))
    for name, (_, config, _, _) in CASES.items():
        result = results[name]
        assert "error" not in result, (name, result)
        assert result["ids"] == form_b(model, config, tokenizer, **NEW), name
        prompt, new = result["ids"][0][: -NEW["max_new_tokens"]], result["ids"][0][-NEW["max_new_tokens"] :]
        assert (result["prompt"], result["tokens"], result["ended"]) == (prompt, new, 1), name


def test_mistakes_are_value_errors(model_folder, exported, tmp_path):
    base = {"model": str(model_folder), "ids": [[5, 6, 7]]}
    jobs, messages = [], []
    for name, options, message in [
        ("typical-sampling", {"masss": 0.3}, "masss"),
        ("typical-sampling", {"mass": 1.3}, "mass (1.3) must lie in (0, 1]"),
        (
            "typical-sampling",
            {"do_sample": False},
            "do_sample (False) must be True because typical_mass needs samples",
        ),
        ("repetition-cap", {"penalty": 2}, "penalty (2) must lie in [0, 1]"),
        ("repetition-cap", {"num_beams": 2}, "repetition_cap and num_beams do not compose"),
        ("mbr", {"num_samples": 2, "num_beams": 2, "utility": "bleu"}, "tokenizer (None) must be given"),
        ("decoding", {"decoding": {"mass": 1}}, "unknown fields mass"),
        ("decoding", {"decoding": {"read_times": 2}}, "read_times (2) repeats text; pass prompt= and tokenizer="),
        ("read-twice", {}, "context_start"),
    ]:
        jobs.append({**base, "repo": str(exported[name]), "options": {**options, **NEW}})
        messages.append(message)
    for result, message in zip(generate_elsewhere(jobs, tmp_path), messages, strict=True):
        assert result["error"].startswith("ValueError: "), result
        assert message in result["error"]


def test_read_twice_repeats_a_span_of_ids(model_folder, exported, model, tmp_path):
    ids = [[0, 5, 6, 7, 8], [9, 5, 6, 7, 8]]
    span = {"context_start": [0, 1], "context_end": [2, 4]}
    job = {"model": str(model_folder), "repo": str(exported["read-twice"]), "ids": ids, "options": {**span, **NEW}}
    (result,) = generate_elsewhere([job], tmp_path)
    tensor = torch.tensor(ids)
    expected = model.generate(tensor, attention_mask=(tensor != 0).long(), custom_generate=ReadTwice(), **span, **NEW)
    assert result["ids"] == expected.tolist()


def test_a_published_repository_works_by_its_name(hub, model_folder, exported, model, tmp_path):
    place = {"endpoint": hub.endpoint, "token": hub.token}
    publish(exported["repetition-cap"], "me/repetition-cap", **place)
    ids = byte_tokenizer()("b = 2\n")["input_ids"]
    job = {"model": str(model_folder), "repo": "me/repetition-cap", "ids": [ids], "options": {"penalty": 0.1, **NEW}}
    (result,) = generate_elsewhere([job], tmp_path, env=hub.env())
    config = DecodingConfig(repetition_cap=0.1)
    tensor = torch.tensor([ids])
    expected = model.generate(tensor, custom_generate=config.loop(model, None), **NEW)
    assert result["ids"] == expected.tolist()


def test_a_model_repository_carries_its_decoding(hub, model_folder, model, tmp_path):
    """Weights, decoding_config.json and custom_generate/ in one repository."""
    folder = tmp_path / "model"
    config = DecodingConfig(repetition_cap={"penalty": 0.0, "min_match": 2}, generation=NEW)
    for part in (model, byte_tokenizer(), config):
        part.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    export_custom_generate("decoding", folder)
    assert (folder / "README.md").read_text().endswith("# A model\n")
    publish(folder, "me/model", endpoint=hub.endpoint, token=hub.token)

    ids = byte_tokenizer()("b = 2\n")["input_ids"]
    job = {"model": "me/model", "ids": [ids], "options": {}, "tokenizer": True}
    trusted, by_position, plain = generate_elsewhere(
        [
            {**job, "trust": True},
            {**job, "trust": True, "by_position": True},
            {**job, "options": NEW, "tokenizer": False},
        ],
        tmp_path,
        env=hub.env(),
    )
    tensor = torch.tensor([ids])
    expected = model.generate(tensor, custom_generate=config.loop(model, None), **NEW).tolist()
    assert trusted["ids"] == by_position["ids"] == expected
    assert plain["ids"] == model.generate(tensor, **NEW).tolist() != expected


ROUND_TRIP = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from undersong.generation import DecodingConfig, generate

repo, revision = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repo, revision=revision).eval()
tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision)
results = []
for config in (DecodingConfig.from_pretrained(repo, revision=revision), DecodingConfig.beside(model, revision), None):
    torch.manual_seed(0)
    results.append(generate(model, tokenizer, "b = 2\\n", config, return_ids=True))
print("RESULT " + json.dumps(results))
"""


def test_a_config_published_beside_a_model_reproduces_its_tokens(hub, model, tmp_path):
    from undersong.generation import generate

    folder, place = tmp_path / "model", {"endpoint": hub.endpoint, "token": hub.token}
    config = DecodingConfig(
        typical_mass=0.9, repetition_cap={"penalty": 0.1, "min_match": 2}, grammar_penalty="python", generation=NEW
    )
    for part in (model, byte_tokenizer(), config):
        part.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    commit = publish(folder, "me/model", **place).commit
    DecodingConfig(generation={"max_new_tokens": 3}).save_pretrained(folder)  # of main; the revision keeps its own
    publish(folder, "me/model", update=True, **place)
    run = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP, "me/model", commit],
        env={**hub.env(), "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    named, beside, main = json.loads(line.removeprefix("RESULT "))
    torch.manual_seed(0)
    assert named == beside == generate(model, byte_tokenizer(), "b = 2\n", config, return_ids=True)
    assert len(main) == 3


def test_an_export_does_not_overwrite_by_accident(tmp_path):
    folder = export_custom_generate("typical-sampling", tmp_path / "repo")
    (folder / "custom_generate" / "old.py").touch()
    with pytest.raises(FileExistsError, match=r"holds a custom_generate/ already; pass overwrite=True to replace it"):
        export_custom_generate("typical-sampling", folder)
    export_custom_generate(HUB_CONFIGS / "typical-sampling", folder, overwrite=True)
    assert not (folder / "custom_generate" / "old.py").exists()
    with pytest.raises(
        FileNotFoundError, match="atypical holds no custom_generate/generate.py; name one of decoding,"
    ):
        export_custom_generate("atypical", tmp_path / "other")


@pytest.mark.parametrize("name", REPOS)
def test_an_exported_folder_holds_what_the_loader_fetches(name, exported):
    """Direct siblings by single-dot imports, no import of undersong, and a short generate.py over one source."""
    folder = exported[name] / "custom_generate"
    assert len((HUB_CONFIGS / name / "custom_generate" / "generate.py").read_text().splitlines()) <= 60
    files = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert set(files) == {path.name for path in folder.iterdir()} - {"requirements.txt"}
    for text in files.values():
        assert "import undersong" not in text
        assert "from undersong" not in text
        assert "from .." not in text


@pytest.mark.parametrize("name", REPOS)
def test_a_card_says_what_users_of_the_hub_look_for(name):
    card = ModelCard.load(HUB_CONFIGS / name / "README.md")
    assert card.data.library_name == "transformers"
    assert "custom_generate" in card.data.tags
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Description",
        "## Base model",
        "## Model compatibility",
        "## Additional Arguments",
        "## Output Type changes",
        "## Example usage",
    ]
    for argument in ELSEWHERE[name] if name in ELSEWHERE else CASES[name][0].keys() - {"top_k"}:
        assert f"`{argument}`" in card.text
