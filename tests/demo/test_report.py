import copy
import re

import pytest

from undersong.demo.report import mark_repeats, render

from .result import LONG, RESULT


@pytest.fixture(scope="module")
def page():
    return render(RESULT)


def test_everything_that_matters_is_on_the_page(page):
    text = re.sub(r"\s+", " ", page)
    for expected in (
        "62 → 12 %",  # rep-4 of greedy and of the cap
        "0.98×",  # 30.5 / 31 tokens/s
        "95.8 %",
        "96.4 %",
        "Every logit is bit-equal",
        "AarenForTimeSeriesClassification",
        "105,098",
        "SelfReinforcementCapLogitsProcessor()",
        "2.13.0+cpu",
        "reduced run",
        LONG,
    ):
        assert expected in text


def test_texts_are_escaped(page):
    assert "<script>" not in page
    assert "&lt;script&gt;alert(&#39;no&#39;)&lt;/script&gt;" in page
    assert "<b>tick</b>" not in page


def test_repeats_are_marked(page):
    assert "the sea and the sky and <mark>the sea and the sky and the sea</mark>" in page


def test_page_refers_to_nothing_outside_itself(page):
    references = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page)
    assert all(reference.startswith(("#", "data:")) for reference in references)
    assert "url(http" not in page
    assert "@import" not in page


def test_plots_follow_the_page_colours(page):
    assert page.count("<svg") == 3
    assert "currentColor" in page
    assert "#010203" not in page
    assert not re.search(r'<svg[^>]* (width|height)="', page)


def test_rendering_is_reproducible(page):
    assert render(RESULT) == page


def test_unequal_logits_are_said_aloud():
    result = copy.deepcopy(RESULT)
    result["hub"] |= {"bit_equal": False, "largest_difference": 0.5}
    page = render(result)
    assert "The logits differ by up to 0.5." in page
    assert "bit-equal" not in page


def test_full_runs_carry_no_notice():
    result = copy.deepcopy(RESULT)
    result["about"]["fast"] = False
    assert "reduced run" not in render(result)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("   ", [("   ", False)]),
        ("a b c d", [("a b c d", False)]),
        ("a b c d. A b, c d! e", [("a b c d. ", False), ("A b, c d!", True), (" e", False)]),
        ("a a a a a", [("a ", False), ("a a a a", True)]),  # the grams overlap: only the first word is new
        ("x a b c d\n\na b c d ", [("x a b c d\n\n", False), ("a b c d", True), (" ", False)]),
    ],
)
def test_mark_repeats(text, expected):
    pieces = mark_repeats(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert pieces == expected
