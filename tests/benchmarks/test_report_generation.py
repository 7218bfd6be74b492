"""The generation report: sections with and without results, figures that name their origin, honest verdicts."""

import copy
import html
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.demo.test_browser import browser, full_page_screenshot, requests  # noqa: F401

from .generation_records import RECORDS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("report_generation")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def page(script):
    return script.render(RECORDS)


def section(page, name):
    """Plain text of a section."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, flags=re.DOTALL)
    text = re.sub(r"<svg.*?</svg>", " ", found[1], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_without_results_every_section_names_its_files_and_commands(script):
    page = script.render({})
    for own in script.SECTIONS:
        text = section(page, own.id)
        for name in own.files:
            candidate = name.replace("*", "cuda")
            assert f"Not there: benchmarks/results/{own.files[0].replace('*', 'cuda')}.json" in text
            assert f"benchmarks/results/{candidate}.json" in text
            assert f"bench_{candidate.rpartition('_')[0]}.py" in text
        assert "Found." not in text
    assert "<svg" not in page
    assert page.count("no results yet") == len(script.SECTIONS)


def test_the_records_here_cover_every_section(script):
    for own in script.SECTIONS:
        for name in own.files:
            assert any(name.replace("*", device) in RECORDS for device in ("cuda", "cpu")), name


def test_with_all_results_nothing_is_missing_and_every_section_ends_in_a_finding(script, page):
    for own in script.SECTIONS:
        text = section(page, own.id)
        assert "Not there" not in text
        assert text.count("Found.") == 1
        assert re.search(r"\d", text[text.index("Found.") :])
    assert "no results yet" not in page


def test_every_figure_names_file_hardware_versions_and_command(page):
    captions = re.findall(r'<span class="source">(.*?)</span>', page)
    assert len(captions) == len(re.findall(r"<figure|<p class=\"soft note\">", page))
    for caption in captions:
        caption = html.unescape(caption)
        name = re.match(r"benchmarks/results/(\w+)\.json · Toy GPU 9000 · 2026-01-02 · ", caption)[1]
        assert "python 3.11.7, undersong 0.1.0, torch 2.13.0, transformers 5.22.2" in caption
        assert "triton" not in caption  # not installed there
        assert f"python benchmarks/bench_{name.rpartition('_')[0]}.py" in caption


def test_parts_of_one_file_name_their_own_runs(page):
    assert "bench_repetition.py --part quality" in page
    assert "bench_repetition.py --part speed" in page


def test_verdicts_count_what_was_met(page):
    typical = section(page, "typical")
    assert "Acceptance not met in 1 of 3 criteria." in typical
    assert "REP(typical 0.2) < REP(top-p 0.95): not met (typical 0.2 0.4, top-p 0.95 0.3)" in typical
    assert "gap <= 0.5 x ancestral: met (ratio 0.25)" in typical
    repetition = section(page, "repetition")
    assert "rep-4 of the cap / greedy <= 0.5: met (0.33)" in repetition
    assert "NLL of the cap - repetition_penalty=1.2 <= 0: not met (1)" in repetition
    summary = page[: page.index("<section")]
    assert "met: 2 of 3" in summary


def test_met_acceptance_is_said_as_such(script):
    records = copy.deepcopy(RECORDS)
    records["repetition_cpu"]["acceptance"]["NLL of the cap - repetition_penalty=1.2 <= 0"] = -0.5
    assert "Acceptance met." in section(script.render(records), "repetition")


@pytest.mark.parametrize(
    ("acceptance", "met"),
    [
        ({"a <= 0.5": 0.5}, True),
        ({"a < 0.5": 0.5}, False),
        ({"a >= 0.9": {"x": 0.95, "y": {"z": 0.8}}}, False),
        ({"a > -1": 0.0}, True),
        ({"a <= 0.3 ms": 0.2}, True),
        ({"a <= 0.3, otherwise": 0.2}, None),
        ({"a == 0": 0.0}, True),
        ({"a == 0": 1e-9}, False),
        ({"all orders agree": True}, True),
        ({"all orders agree": {"figures": {"a": 1}, "met": False}}, False),
        ({"a >= 0.9": {"value": 0.1, "met": True}}, True),
        ({"a <= 0.5": None}, False),
        ({"a <= 0.5": [0.4, 0.6]}, False),
        ({"a / control": 0.4}, None),
    ],
)
def test_criteria_in_every_form(script, acceptance, met):
    (criterion,) = script.criteria(acceptance)
    assert criterion["met"] is met


def test_criteria_of_groups_carry_the_group(script):
    first, second = script.criteria({"strong": {"a <= 0.5": 0.25, "b": [1.0, None]}})
    assert first == {"claim": "strong: a <= 0.5", "figures": "0.25", "met": True}
    assert second == {"claim": "strong: b", "figures": "1, ", "met": None}


def test_code_is_judged_by_the_criterion_that_applies(page):
    text = section(page, "code_loops")
    assert "chat: EGP - EGP(greedy) >= 0.3: not met (0.2)" in text
    assert "chat: unit-level repetition / that of greedy: 0.25" in text
    assert "raw: EGP - EGP(greedy): 0.2" in text
    assert "raw: unit-level repetition / that of greedy <= 0.3: met (0.25)" in text
    assert text.count("identical to greedy where greedy does not loop >= 0.95: met (0.98)") == 1


def test_the_same_claim_on_two_devices_names_the_device(page):
    text = section(page, "typical_mask")
    assert "GPU: speed / stock >= 7: met (20)" in text
    assert "CPU: speed / stock >= 7: met (20)" in text
    assert "Toy GPU 9000: batch 1: undersong 20.0x as fast as stock" in text


def test_texts_are_escaped_and_repeats_marked(page):
    assert "<i>nobler</i>" not in page
    assert "&lt;i&gt;nobler&lt;/i&gt;" in page
    assert "<mark>a b c d</mark>" in page


def test_page_refers_to_nothing_outside_itself(page):
    references = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert references
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert "url(http" not in page
    assert "@import" not in page


def test_plots_follow_the_page_colours(page):
    assert page.count("<svg") >= 8
    assert "currentColor" in page
    assert "#010203" not in page
    assert not re.search(r'<svg[^>]* (width|height)="', page)


def test_rendering_is_reproducible(script, page):
    assert script.render(copy.deepcopy(RECORDS)) == page


def test_script_reads_a_folder_and_prefers_the_gpu(script, tmp_path, monkeypatch, capsys):
    for name, record in RECORDS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "digits_cpu.json").write_text("{}")  # another issue's
    assert script.load(tmp_path) == RECORDS
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report_generation.py", "--results", str(tmp_path), "--out", str(out)])
    script.main()
    assert out.read_text(encoding="utf-8") == script.render(RECORDS)
    assert f"{len(RECORDS)} results files" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_is_quiet_and_asks_for_nothing(page, browser, tmp_path, width, scheme):  # noqa: F811
    given = os.environ.get("UNDERSONG_GENERATION_REPORT")  # a real report to look at
    path = Path(given) if given else tmp_path / "report.html"
    if not given:
        path.write_text(page, encoding="utf-8")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preference})
    browser.get_log("performance")  # what start-up asked for is not the page's doing
    browser.get(path.absolute().as_uri())
    too_wide = browser.execute_script(  # wide tables scroll inside their frame
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll > *'))"
        ".filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + e.textContent.slice(0, 40))"
    )
    assert too_wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    assert requests(browser) == [path.absolute().as_uri()]
    if folder := os.environ.get("UNDERSONG_SCREENSHOTS"):
        full_page_screenshot(browser, os.path.join(folder, f"generation-{width}-{scheme}.png"))
